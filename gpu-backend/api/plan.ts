/** From a checked body to a plan that can run: mask, prompts, choices and sampling of both endpoints. */

import {
  DENSE_MASK_ID,
  type Mask,
  type MaskId,
  maskFromSkippedLayers,
  maskId,
  sparsity,
  withSurrogates,
} from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { ChatRequest, CompletionRequest, MaskField } from '../../shared/wire/openai.ts';
import { DENSE_SUFFIX, type RouteEcho, splitModelName } from '../../shared/wire/protocol.ts';
import type { EngineModel, KvMode, MaskPlan, Sampling } from '../engine/engine.ts';
import type { MaskRegistry } from '../engine/mask-registry.ts';
import type { TextCall } from '../model/tokenizer/text-service.ts';
import type { Caller } from './auth.ts';
import type { ChoiceEvent, ChoiceJob, Progress } from './choice.ts';
import { chatPrompt, completionPrompts, type Prompt } from './prompts.ts';
import type { ApiLimits, ServedModel } from './served-model.ts';
import { chatWire, completionWire, type Wire } from './wire.ts';

/* Which mask a request runs under: from its `mask` field and its model name. */

type ChosenMask = { readonly id: MaskId; readonly sparsity: number; readonly plan: MaskPlan };

type MaskRequest = {
  readonly model: string;
  readonly mask?: MaskField | null | undefined;
  readonly kv?: KvMode | null | undefined;
};

/** @throws MaskrouteError `model_not_found` when the request names a model that is not served here. */
function requireModel(served: string, requested: string): void {
  if (splitModelName(requested).model === served) return;
  throw new MaskrouteError('model_not_found', `The model ${JSON.stringify(requested)} is not served here.`, {
    param: 'model',
  });
}

/**
 * No `mask` means dense. Rejects with MaskrouteError `invalid_request` when the model name and the mask
 * contradict each other or a layer lies outside the model, and with what the registry says about an id.
 */
async function chooseMask(
  request: MaskRequest,
  model: EngineModel,
  masks: MaskRegistry,
  edge: string | undefined,
): Promise<ChosenMask> {
  const field = request.mask ?? DENSE_MASK_ID;
  const mask =
    typeof field === 'string' ? await masks.resolve(field as MaskId, edge) : inlineMask(model, field);
  const id = maskId(model.hash, mask);
  if (splitModelName(request.model).dense && id !== DENSE_MASK_ID) {
    const message = `A model name that ends in ${DENSE_SUFFIX} takes no mask but "dense".`;
    throw new MaskrouteError('invalid_request', message, { param: 'mask' });
  }
  return { id, sparsity: sparsity(mask), plan: { mask, kv: request.kv ?? 'preserve' } };
}

/** `surrogate: true` means those of the table that the served model has. */
function inlineMask({ blockCount, surrogates }: EngineModel, field: Exclude<MaskField, string>): Mask {
  if (field.surrogate && surrogates === undefined) {
    const message = 'This model has no surrogates: ask for "surrogate": false.';
    throw new MaskrouteError('surrogates_mismatch', message, { param: 'mask.surrogate' });
  }
  try {
    return withSurrogates(maskFromSkippedLayers(blockCount, field), field.surrogate ? surrogates : null);
  } catch (error) {
    throw new MaskrouteError('invalid_request', `mask: ${(error as Error).message}.`, { param: 'mask' });
  }
}

/* What is to be answered, and what is being answered: the data between planning, running and accounting. */

/** A checked request, ready to run. */
export type AnswerPlan = {
  readonly requestId: string;
  /** The edge's name for the completion. */
  readonly completion: string | undefined;
  /** As the client wrote it. */
  readonly modelName: string;
  readonly mask: ChosenMask;
  /** The edge's decision; empty on a direct call. */
  readonly route: RouteEcho;
  readonly wire: Wire;
  readonly jobs: readonly ChoiceJob[];
  readonly withLogprobs: boolean;
  readonly stream: boolean;
  readonly includeUsage: boolean;
};

/** A plan that runs. `progress` is current at any time, also after an abort. */
export type RunningAnswer = {
  readonly plan: AnswerPlan;
  readonly progress: readonly Progress[];
  readonly events: AsyncGenerator<ChoiceEvent, void>;
};

/* From a request's fields to what the engine samples with. Defaults are OpenAI's. */

type SamplingFields = Pick<
  ChatRequest & CompletionRequest,
  | 'temperature'
  | 'top_p'
  | 'top_k'
  | 'min_p'
  | 'presence_penalty'
  | 'frequency_penalty'
  | 'repetition_penalty'
  | 'logit_bias'
  | 'seed'
>;

/** @throws MaskrouteError `invalid_request` when `logit_bias` names a token that the model does not have. */
function samplingOf(request: SamplingFields, vocabularySize: number): Sampling {
  const logitBias = Object.entries(request.logit_bias ?? {}).map(([id, bias]) => [Number(id), bias] as const);
  const unknown = logitBias.find(([id]) => id >= vocabularySize);
  if (unknown !== undefined) throw unknownToken('logit_bias', unknown[0], vocabularySize);
  return {
    temperature: request.temperature ?? 1,
    topP: request.top_p ?? 1,
    topK: Math.max(0, request.top_k ?? 0),
    minP: request.min_p ?? 0,
    presencePenalty: request.presence_penalty ?? 0,
    frequencyPenalty: request.frequency_penalty ?? 0,
    repetitionPenalty: request.repetition_penalty ?? 1,
    logitBias,
    seed: request.seed ?? undefined,
  };
}

/** Choices of one prompt differ: each adds its number to the request's seed. */
const withChoiceSeed = (sampling: Sampling, choice: number): Sampling =>
  sampling.seed === undefined ? sampling : { ...sampling, seed: sampling.seed + choice };

export const unknownToken = (param: string, tokenId: number, vocabularySize: number): MaskrouteError =>
  new MaskrouteError(
    'invalid_request',
    `${param}: token ${tokenId} is outside the vocabulary of ${vocabularySize} tokens.`,
    { param },
  );

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
