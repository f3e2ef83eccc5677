/** From a checked body to a plan that can run: mask, prompts, choices and sampling of both endpoints. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { ChatRequest, CompletionRequest } from '../../shared/openai.ts';
import type { RouteEcho } from '../../shared/protocol.ts';
import type { TextCall } from '../model/text-service.ts';
import type { MaskRegistry } from '../serving/mask-registry.ts';
import type { AnswerPlan } from './answer-plan.ts';
import type { Caller } from './auth.ts';
import type { ChoiceJob } from './choice.ts';
import type { ApiLimits } from './limits.ts';
import type { ChosenMask } from './mask-choice.ts';
import { chooseMask, requireModel } from './mask-choice.ts';
import type { Prompt } from './prompts.ts';
import { chatPrompt, completionPrompts } from './prompts.ts';
import { samplingOf, withChoiceSeed } from './sampling.ts';
import type { ServedModel } from './served-model.ts';
import { chatWire, completionWire } from './wire.ts';

export type PlanContext = {
  readonly model: ServedModel;
  readonly masks: MaskRegistry;
  readonly limits: ApiLimits;
  readonly requestId: string;
  readonly caller: Caller;
  readonly signal: AbortSignal;
  /** What reading the prompts costs, also when it fails. */
  readonly spent: { tokens: number };
};

/** Rejects with MaskrouteError. */
export async function planChat(context: PlanContext, request: ChatRequest): Promise<AnswerPlan> {
  return plan(context, request, {
    prompts: async () => [await chatPrompt(context.model, request.messages, textCall(context))],
    maxTokens: request.max_completion_tokens ?? request.max_tokens ?? undefined,
    logprobs: request.logprobs === true ? (request.top_logprobs ?? 0) : undefined,
    echo: false,
    scoresStopToken: false,
    wire: chatWire(context.model.text),
  });
}

/** Rejects with MaskrouteError. */
export async function planCompletion(context: PlanContext, request: CompletionRequest): Promise<AnswerPlan> {
  return plan(context, request, {
    prompts: () => completionPrompts(context.model, request, textCall(context)),
    maxTokens: request.max_tokens ?? COMPLETION_TOKENS_DEFAULT,
    logprobs: request.logprobs ?? undefined,
    echo: request.echo === true,
    // lm-evaluation-harness takes the last entry for the one token that it let the model generate.
    scoresStopToken: true,
    wire: completionWire(context.model.text),
  });
}

const textCall = ({ caller, signal, spent }: PlanContext): TextCall => ({
  tenant: caller.tenant ?? '',
  signal,
  spent,
});

/** OpenAI's default for the legacy endpoint; chat answers until the context is full. */
const COMPLETION_TOKENS_DEFAULT = 16;

/** Echoed as it came, but flat: what a client nests in there could be too deep to write out again. */
const plainFields = (route: RouteEcho): RouteEcho =>
  Object.fromEntries(
    Object.entries(route).filter(
      ([name, value]) => name !== 'completion' && (value === null || typeof value !== 'object'),
    ),
  );

type Shape = {
  /** Called once the cheaper checks have passed. */
  readonly prompts: () => Promise<readonly Prompt[]>;
  /** Undefined: until the context is full. */
  readonly maxTokens: number | undefined;
  readonly logprobs: number | undefined;
  readonly echo: boolean;
  readonly scoresStopToken: boolean;
  readonly wire: AnswerPlan['wire'];
};

async function plan(
  context: PlanContext,
  request: ChatRequest | CompletionRequest,
  shape: Shape,
): Promise<AnswerPlan> {
  const { model, caller } = context;
  requireModel(model.name, request.model);
  const mask = await chooseMask(request, model.engine.model, context.masks, caller.edge);
  return {
    requestId: context.requestId,
    completion: request.maskroute?.completion ?? undefined,
    modelName: request.model,
    mask,
    route: plainFields(request.maskroute ?? {}),
    wire: shape.wire,
    jobs: await choiceJobs(context, request, shape, mask),
    withLogprobs: shape.logprobs !== undefined,
    stream: request.stream === true,
    includeUsage: request.stream_options?.include_usage === true,
  };
}

async function choiceJobs(
  { model, limits, requestId, caller }: PlanContext,
  request: ChatRequest | CompletionRequest,
  shape: Shape,
  mask: ChosenMask,
): Promise<ChoiceJob[]> {
  const { contextTokens, vocabularySize } = model.engine.model;
  const sampling = samplingOf(request, vocabularySize);
  const perPrompt = request.n ?? 1;
  requireCount(request, perPrompt, limits.choicesMax);
  requireMinTokens(request.min_tokens ?? 0, shape.maxTokens);
  const stops = request.stop == null ? [] : [request.stop].flat();
  const endIds = request.ignore_eos === true ? [] : model.endTokenIds;
  const stopTokenIds = [...new Set([...endIds, ...(request.stop_token_ids ?? [])])];
  const prompts = await shape.prompts();
  return prompts.flatMap(({ tokenIds, text }, promptIndex) => {
    const room = contextTokens - tokenIds.length;
    return Array.from({ length: perPrompt }, (_, choice): ChoiceJob => {
      const index = promptIndex * perPrompt + choice;
      return {
        index,
        countsPrompt: choice === 0,
        stops,
        echo: shape.echo ? text : undefined,
        scoresStopToken: shape.scoresStopToken,
        request: {
          requestId: engineRequestId(requestId),
          tenant: caller.tenant ?? '',
          promptTokenIds: tokenIds,
          plan: mask.plan,
          sampling: withChoiceSeed(sampling, choice),
          maxTokens: Math.min(shape.maxTokens ?? room, room),
          minTokens: Math.min(request.min_tokens ?? 0, room),
          stopTokenIds,
          logprobs: shape.logprobs,
          promptLogprobs: shape.echo ? shape.logprobs : undefined,
        },
      };
    });
  });
}

let engineRequests = 0;
/** Unique in this process: a client may send one request id twice, and every choice is a request to the engine. */
const engineRequestId = (requestId: string): string => `${requestId}#${++engineRequests}`;

function requireCount(request: object, perPrompt: number, choicesMax: number): void {
  const prompt = 'prompt' in request ? request.prompt : undefined;
  const several = Array.isArray(prompt) && typeof prompt[0] !== 'number';
  const count = (several ? prompt.length : 1) * perPrompt;
  if (count <= choicesMax) return;
  throw refusal(several ? 'prompt' : 'n', `prompts times n is ${count}, the most is ${choicesMax}`);
}

function requireMinTokens(minTokens: number, maxTokens: number | undefined): void {
  if (maxTokens === undefined || minTokens <= maxTokens) return;
  throw refusal('min_tokens', `${minTokens} is more than max_tokens, ${maxTokens}`);
}

const refusal = (param: string, why: string): MaskrouteError =>
  new MaskrouteError('invalid_request', `${param}: ${why}.`, { param });
