/** Turns a checked request body into a plan that can run: mask, prompts as token ids, choices, sampling. */
import { DENSE_MASK_ID, type MaskId, maskId, sparsity } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import {
  type ChatRequest,
  type CompletionRequest,
  joinedText,
  messageTexts,
} from '../../shared/wire/openai.ts';
import { DENSE_SUFFIX, type RouteEcho, splitModelName } from '../../shared/wire/protocol.ts';
import { chatOfResponse, type ResponsesRequest, translated } from '../../shared/wire/responses.ts';
import type { MaskPlan, Sampling } from '../engine/engine.ts';
import { nextTurn } from '../event-loop.ts';
import type { TextJob } from '../model/tokenizer/text-service.ts';
import { type AnswerForm, answerForm } from './answer-form.ts';
import type { ChoiceJob } from './choice.ts';
import type { ApiParts, Places, ServedModel } from './parts.ts';

export type Endpoint = 'chat' | 'completions' | 'responses';

/** A checked request, ready to run. */
export type AnswerPlan = {
  readonly endpoint: Endpoint;
  /** The completion's id from the edge, or else the request's id. */
  readonly id: string;
  /** As the client wrote it. */
  readonly modelName: string;
  readonly mask: ChosenMask;
  /** The edge's routing decision, which the answer repeats; empty on a direct call. */
  readonly route: RouteEcho;
  readonly jobs: readonly ChoiceJob[];
  /** For the Responses API, whose answers repeat the request. */
  readonly response?: ResponsesRequest;
  /** When the request was planned. */
  readonly created_s: number;
  readonly withLogprobs: boolean;
  readonly stream: boolean;
  readonly includeUsage: boolean;
};

type ChosenMask = { readonly id: MaskId; readonly sparsity: number; readonly plan: MaskPlan };

/** The caller of a completion; `signal` aborts when nobody waits for the answer any more. */
export type Call = {
  readonly id: string;
  readonly requestId: string;
  /** Empty for holders of the backend key. */
  readonly tenant: string;
  /** The edge's address according to the caller's token, if it has one. */
  readonly edge: string | undefined;
  readonly signal: AbortSignal;
  /** In the engine's queue. The plan takes them, and whoever made the call gives them back. */
  readonly places: Places;
  /** Tokens of the prompts that were tokenized so far, also if that fails. */
  readonly spent: { tokens: number };
};

type PlanParts = Pick<ApiParts, 'model' | 'masks' | 'limits'>;

/** The fields that the endpoints name differently. */
type Wanted = {
  readonly endpoint: Endpoint;
  /** Undefined: until the context is full. */
  readonly maxTokens: number | undefined;
  readonly logprobs: number | undefined;
  readonly echo: boolean;
};

/** OpenAI's default for the legacy endpoint; chat answers until the context is full. */
const COMPLETION_TOKENS_DEFAULT = 16;

/** Rejects with MaskrouteError. */
export async function planChat(parts: PlanParts, call: Call, request: ChatRequest): Promise<AnswerPlan> {
  const wanted: Wanted = {
    endpoint: 'chat',
    maxTokens: request.max_completion_tokens ?? request.max_tokens ?? undefined,
    logprobs: request.logprobs === true ? (request.top_logprobs ?? 0) : undefined,
    echo: false,
  };
  const frame = await planFrame(parts, call, request, wanted);
  const form = await answerForm(parts.model, call, request);
  const prompts = await chatPrompt(parts.model, request, form, call);
  const jobs = choiceJobs(parts.model, call, request, wanted, frame.mask, prompts);
  const predictedTokenIds = await predictedTokens(parts.model, request, call);
  return {
    ...frame,
    jobs: jobs.map((job) => ({ ...job, form, request: { ...job.request, predictedTokenIds } })),
  };
}

/** Rejects with MaskrouteError. */
export async function planResponse(
  parts: PlanParts,
  call: Call,
  request: ResponsesRequest,
): Promise<AnswerPlan> {
  const chat = chatOfResponse(request);
  const plan = await planChat(parts, call, chat).catch((error: unknown) => {
    throw translated(error);
  });
  return { ...plan, endpoint: 'responses', response: request };
}

/** Rejects with MaskrouteError. */
export async function planCompletion(
  parts: PlanParts,
  call: Call,
  request: CompletionRequest,
): Promise<AnswerPlan> {
  const wanted: Wanted = {
    endpoint: 'completions',
    maxTokens: request.max_tokens ?? COMPLETION_TOKENS_DEFAULT,
    logprobs: request.logprobs ?? undefined,
    echo: request.echo === true,
  };
  const frame = await planFrame(parts, call, request, wanted);
  const prompts = await completionPrompts(parts.model, request, call);
  return { ...frame, jobs: choiceJobs(parts.model, call, request, wanted, frame.mask, prompts) };
}

/** The plan without its choices. All cheap checks are here, before the prompts are tokenized. */
async function planFrame(
  { model, masks, limits }: PlanParts,
  { id, edge, places }: Call,
  request: ChatRequest | CompletionRequest,
  { endpoint, maxTokens, logprobs }: Wanted,
): Promise<Omit<AnswerPlan, 'jobs'>> {
  requireModel(model.name, request.model);
  requireTokens(request.logit_bias, model.engine.model.vocabularySize);
  const choices = choiceCount(request, limits.choicesMax);
  requireMinTokens(request.min_tokens ?? 0, maxTokens);
  // Last, since the mask may have to be fetched from the edge.
  const mask = await masks.resolve(request.mask ?? DENSE_MASK_ID, edge);
  const chosen = chosenMask(model, request, { mask, kv: request.kv ?? 'preserve' });
  // Not before: while the edge is slow, requests whose masks are known would find the queue full of others that cannot run.
  places.take(choices);
  return {
    endpoint,
    id,
    created_s: Math.floor(Date.now() / 1000),
    modelName: request.model,
    mask: chosen,
    route: plainFields(request.maskroute ?? {}),
    withLogprobs: logprobs !== undefined,
    stream: request.stream === true,
    includeUsage: request.stream_options?.include_usage === true,
  };
}

/** @throws MaskrouteError `model_not_found` when the request names a model that is not served here. */
function requireModel(served: string, requested: string): void {
  if (splitModelName(requested).model === served) return;
  throw new MaskrouteError('model_not_found', `The model ${JSON.stringify(requested)} is not served here.`, {
    param: 'model',
  });
}

/** @throws MaskrouteError `invalid_request` when the model name and the mask contradict each other. */
function chosenMask(
  { engine }: ServedModel,
  { model }: { readonly model: string },
  plan: MaskPlan,
): ChosenMask {
  const id = maskId(engine.model.hash, plan.mask);
  if (splitModelName(model).dense && id !== DENSE_MASK_ID) {
    throw refusal('mask', `A model name that ends in ${DENSE_SUFFIX} allows only the mask "dense".`);
  }
  return { id, sparsity: sparsity(plan.mask), plan };
}

function requireTokens(logitBias: ChatRequest['logit_bias'], vocabularySize: number): void {
  const unknown = Object.keys(logitBias ?? {}).find((id) => Number(id) >= vocabularySize);
  if (unknown !== undefined) throw unknownToken('logit_bias', Number(unknown), vocabularySize);
}

/** @throws MaskrouteError `invalid_request` when there are too many. */
function choiceCount(request: ChatRequest | CompletionRequest, choicesMax: number): number {
  const prompt = 'prompt' in request ? request.prompt : undefined;
  const several = Array.isArray(prompt) && typeof prompt[0] !== 'number';
  const count = (several ? prompt.length : 1) * (request.n ?? 1);
  if (count <= choicesMax) return count;
  const param = several ? 'prompt' : 'n';
  throw refusal(param, `${param}: prompts times n is ${count}; the maximum is ${choicesMax}.`);
}

function requireMinTokens(minTokens: number, maxTokens: number | undefined): void {
  if (maxTokens === undefined || minTokens <= maxTokens) return;
  throw refusal('min_tokens', `min_tokens: ${minTokens} is more than max_tokens, ${maxTokens}.`);
}

/** The fields that are not nested, since deep nesting could overflow the stack when they are written out again. */
const plainFields = (route: RouteEcho): RouteEcho =>
  Object.fromEntries(
    Object.entries(route).filter(
      ([name, value]) => name !== 'completion' && (value === null || typeof value !== 'object'),
    ),
  );

function choiceJobs(
  model: ServedModel,
  { requestId, tenant }: Call,
  request: ChatRequest | CompletionRequest,
  { endpoint, maxTokens, logprobs, echo }: Wanted,
  { plan }: ChosenMask,
  prompts: readonly Prompt[],
): ChoiceJob[] {
  const sampling = samplingOf(request);
  const perPrompt = request.n ?? 1;
  const stops = [request.stop ?? []].flat().filter((stop) => stop !== '');
  const endIds = request.ignore_eos === true ? [] : model.endTokenIds;
  const stopTokenIds = [...new Set([...endIds, ...(request.stop_token_ids ?? [])])];
  return prompts.flatMap(({ tokenIds, text }, promptIndex) => {
    const room = model.engine.model.contextTokens - tokenIds.length;
    return Array.from(
      { length: perPrompt },
      (_, choice): ChoiceJob => ({
        index: promptIndex * perPrompt + choice,
        countsPrompt: choice === 0,
        stops,
        echo: echo ? text : undefined,
        // lm-evaluation-harness drops the last entry as that of the one token that it lets the model generate.
        scoresStopToken: endpoint === 'completions',
        request: {
          requestId: engineRequestId(requestId),
          tenant,
          promptTokenIds: tokenIds,
          plan,
          sampling: withChoiceSeed(sampling, choice),
          maxTokens: Math.min(maxTokens ?? room, room),
          minTokens: Math.min(request.min_tokens ?? 0, room),
          stopTokenIds,
          logprobs,
          promptLogprobs: echo ? logprobs : undefined,
        },
      }),
    );
  });
}

let engineRequests = 0;
/** Unique in this process: a client may send one request id twice, and every choice is a request to the engine. */
const engineRequestId = (requestId: string): string => `${requestId}#${++engineRequests}`;

/** Defaults are OpenAI's. */
const samplingOf = (request: ChatRequest | CompletionRequest): Sampling => ({
  temperature: request.temperature ?? 1,
  topP: request.top_p ?? 1,
  topK: Math.max(0, request.top_k ?? 0),
  minP: request.min_p ?? 0,
  presencePenalty: request.presence_penalty ?? 0,
  frequencyPenalty: request.frequency_penalty ?? 0,
  repetitionPenalty: request.repetition_penalty ?? 1,
  logitBias: Object.entries(request.logit_bias ?? {}).map(([id, bias]) => [Number(id), bias] as const),
  seed: request.seed ?? undefined,
});

/** The largest seeds to which the number of a choice can be added exactly. */
const SEED_RANGE = 2 ** 52;

/** Each choice of a prompt adds its number to the request's seed, so that the choices differ. Larger seeds are folded. */
function withChoiceSeed(sampling: Sampling, choice: number): Sampling {
  const { seed } = sampling;
  if (seed === undefined) return sampling;
  return { ...sampling, seed: (seed % SEED_RANGE) + Math.trunc(seed / SEED_RANGE) + choice };
}

/* Prompts as token ids, checked against the model's context before anything is queued. */

type Prompt = {
  readonly tokenIds: Int32Array;
  /** For `echo`. */
  readonly text: string;
};

/** Rejects with MaskrouteError `invalid_request`, `context_length_exceeded`, and as `TextService.encode`. */
async function chatPrompt(
  model: ServedModel,
  { messages }: ChatRequest,
  { tools }: AnswerForm,
  call: Call,
): Promise<Prompt[]> {
  refuseLongText(model, messages.flatMap(messageTexts), 'messages');
  const tokensMax = model.engine.model.contextTokens - 1;
  const told = tools.length === 0 ? {} : { tools };
  const said = messages.map((message) =>
    // OpenAI's newer name for it. Most templates do not know it: they leave such a message out, or refuse it.
    message.role === 'developer' ? { ...message, role: 'system' as const } : message,
  );
  const prompts = await encode(model, { type: 'chat', messages: said, tokensMax, ...told }, call, 'messages');
  return prompts.map((tokenIds) => ({ tokenIds, text: '' }));
}

/** Undefined where nothing is predicted. Rejects as `chatPrompt`. */
async function predictedTokens(
  model: ServedModel,
  { prediction }: ChatRequest,
  call: Call,
): Promise<Int32Array | undefined> {
  const text = joinedText(prediction?.content);
  if (text === '') return undefined;
  refuseLongText(model, [text], 'prediction');
  const tokensMax = model.engine.model.contextTokens;
  const job = { type: 'prompts', texts: [text], tokensMax, addSpecial: false, parseSpecial: false } as const;
  // A prediction is no part of the prompt, so nobody pays for its tokens.
  const [tokenIds] = await encode(model, job, { ...call, spent: { tokens: 0 } }, 'prediction');
  return tokenIds;
}

/**
 * The field `prompt`: one prompt or a list, as text or as token ids. Special tokens spelled out in a text are plain text,
 * unless the request sets `parse_special`. Rejects as `chatPrompt`.
 */
async function completionPrompts(
  model: ServedModel,
  request: CompletionRequest,
  call: Call,
): Promise<Prompt[]> {
  const tokensMax = model.engine.model.contextTokens - (request.max_tokens === 0 ? 0 : 1);
  const { prompt } = request;
  if (typeof prompt !== 'string' && typeof prompt[0] !== 'string') {
    const several = (typeof prompt[0] === 'number' ? [prompt] : prompt) as number[][];
    return await idPrompts(model, several, tokensMax, request.echo === true);
  }
  const texts = [prompt].flat() as string[];
  for (const text of texts) refuseLongText(model, [text], 'prompt');
  const job = {
    type: 'prompts',
    texts,
    tokensMax,
    addSpecial: request.add_special_tokens !== false,
    parseSpecial: request.parse_special === true,
  } as const;
  const found = await encode(model, job, call, 'prompt');
  return found.map((tokenIds, i) => ({ tokenIds, text: texts[i]! }));
}

async function encode(
  model: ServedModel,
  job: TextJob,
  call: Call,
  param: string,
): Promise<readonly Int32Array[]> {
  const encoded = await model.text.encode(job, call);
  if (encoded.type === 'too_long') throw tooLong(model, `more than ${job.tokensMax}`, param);
  if (encoded.prompts.some((tokenIds) => tokenIds.length === 0)) throw empty(param);
  return encoded.prompts;
}

async function idPrompts(
  model: ServedModel,
  prompts: readonly (readonly number[])[],
  tokensMax: number,
  isEchoed: boolean,
): Promise<Prompt[]> {
  const { vocabularySize } = model.engine.model;
  const found: Prompt[] = [];
  for (const ids of prompts) {
    if (ids.length === 0) throw empty('prompt');
    if (ids.length > tokensMax) throw tooLong(model, String(ids.length), 'prompt');
    const unknown = ids.find((id) => id >= vocabularySize);
    if (unknown !== undefined) throw unknownToken('prompt', unknown, vocabularySize);
    found.push({ tokenIds: Int32Array.from(ids), text: isEchoed ? textOf(model, ids) : '' });
    // Lets other requests' tokens go out between long prompts.
    if (prompts.length > 1) await nextTurn();
  }
  return found;
}

function textOf(model: ServedModel, ids: readonly number[]): string {
  const decoder = model.text.createDecoder({ showSpecial: true });
  return ids.map((id) => decoder.push(id)).join('') + decoder.flush();
}

/** Refuses text by its bytes, without tokenizing it, if even the longest tokens would be too many. */
function refuseLongText(model: ServedModel, texts: readonly string[], param: string): void {
  const bytes = texts.reduce((sum, text) => sum + Buffer.byteLength(text), 0);
  const tokensMin = Math.ceil(bytes / model.text.tokenBytesMax);
  if (tokensMin > model.engine.model.contextTokens) throw tooLong(model, `at least ${tokensMin}`, param);
}

const empty = (param: string): MaskrouteError =>
  refusal(param, `${param}: the prompt is empty; this model needs at least one token.`);

const unknownToken = (param: string, tokenId: number, vocabularySize: number): MaskrouteError =>
  refusal(param, `${param}: token ${tokenId} is outside the vocabulary of ${vocabularySize} tokens.`);

const refusal = (param: string, message: string): MaskrouteError =>
  new MaskrouteError('invalid_request', message, { param });

/** LiteLLM knows the error by OpenAI's words "This model's maximum context length is", not by its code. */
function tooLong(model: ServedModel, tokens: string, param: string): MaskrouteError {
  const most = `This model's maximum context length is ${model.engine.model.contextTokens} tokens`;
  const message =
    param === 'prediction'
      ? `${most}; the prediction has ${tokens}.`
      : `${most}; the prompt has ${tokens} and leaves no room for an answer.`;
  return new MaskrouteError('context_length_exceeded', message, { param });
}
