/**
 * The engine's interface for the API: token ids in, a stream of events out. Everything behind it (scheduler, runner,
 * cache, sampler) runs in a worker thread, because `session.run` blocks its thread.
 */
import type { Mask, ModelHash, SurrogatesId } from '../../shared/mask/mask.ts';
import type { MaskrouteError } from '../../shared/wire/errors.ts';
import type { KvType } from '../model/model-source.ts';
import type { Device } from '../onnx/device.ts';
import type { GrammarSession } from './grammar.ts';

export interface Engine {
  readonly model: EngineModel;
  /**
   * @throws MaskrouteError `queue_full` at once when the queue is full, `queue_timeout` when the request waited too
   * long, `engine_failed` when the runtime failed. Aborting `signal` ends the stream with a
   * `finished` event of reason `cancelled` within one step. `onToken` is called for each token when it is computed, which
   * may be long before its event is read.
   */
  generate(request: GenerateRequest, signal: AbortSignal, onToken?: () => void): AsyncIterable<EngineEvent>;
  /**
   * Call it before reading a request: a full queue is the most common reason for a refusal.
   * @throws MaskrouteError `queue_full` when a request of `tenant` would find no place in the queue.
   */
  expectRoom(tenant: string): void;
  /**
   * Keeps places in the queue for requests of one tenant that are about to come: `countMax`, or fewer if there are fewer.
   * @returns for each place what gives it back, just before its request comes; later calls of it do nothing.
   * @throws MaskrouteError as `expectRoom`.
   */
  reserve(tenant: string, countMax: number): (() => void)[];
  stats(): EngineStats;
  /** Why the engine has stopped for good; undefined while it runs. */
  readonly failure: MaskrouteError | undefined;
  /** How long the engine has not answered the last ping; each call sends a ping if none is pending. */
  silence_ms(): number;
  /** Refuses new requests; resolves when the accepted ones have finished. */
  close(): Promise<void>;
}

export type EngineModel = {
  readonly hash: ModelHash;
  readonly blockCount: number;
  readonly contextTokens: number;
  readonly vocabularySize: number;
  readonly device: Device;
  /** Number type of the KV cache, and the size of one page. */
  readonly kv: { readonly type: KvType; readonly page_bytes: number };
  /** The model's table of surrogates, if it has one. */
  readonly surrogates?: SurrogatesId;
};

export type GenerateRequest = {
  readonly requestId: string;
  /** Tenants take turns, and no tenant reads another's cached prompts. Empty for a holder of the backend key. */
  readonly tenant: string;
  /**
   * When the answer's first choice was submitted, since the epoch, by a clock that is never set; now unless given. This may
   * be a later choice.
   */
  readonly answerSince_ms?: number;
  readonly promptTokenIds: Int32Array;
  readonly plan: MaskPlan;
  readonly sampling: Sampling;
  /** 0 scores the prompt only. */
  readonly maxTokens: number;
  readonly minTokens: number;
  /** Ids that end the answer and are not part of it. `ignore_eos` leaves out the model's own. */
  readonly stopTokenIds: readonly number[];
  /** Number of alternatives in each generated token's log-probabilities; undefined = no log-probabilities. */
  readonly logprobs: number | undefined;
  /** The same for the prompt's own tokens (`echo` with `logprobs`). */
  readonly promptLogprobs: number | undefined;
  /** The grammar that the answer must match; the caller closes it. */
  readonly grammar?: GrammarSession | undefined;
  /** A text that the answer probably repeats in large part (`prediction.ts`). */
  readonly predictedTokenIds?: Int32Array | undefined;
};

/** How the model runs for this request. */
export type MaskPlan = { readonly mask: Mask; readonly kv: KvMode };

export type KvMode = 'preserve' | 'elide';

export type Sampling = {
  /** 0 is greedy. */
  readonly temperature: number;
  readonly topP: number;
  /** 0 means no limit. */
  readonly topK: number;
  readonly minP: number;
  readonly presencePenalty: number;
  readonly frequencyPenalty: number;
  readonly repetitionPenalty: number;
  readonly logitBias: readonly (readonly [tokenId: number, bias: number])[];
  /** Equal seeds give equal tokens; without, the engine draws a seed. */
  readonly seed: number | undefined;
};

/** Draws from the model's own distribution. */
export const PLAIN_SAMPLING: Sampling = {
  temperature: 1,
  topP: 1,
  topK: 0,
  minP: 0,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
  logitBias: [],
  seed: undefined,
};

/** `prompt` comes at most once and first; `finished` or a rejection ends the stream. */
export type EngineEvent =
  /** One entry a prompt token; the first is null (nothing precedes it). */
  | { readonly type: 'prompt'; readonly logprobs: readonly (TokenLogprob | null)[] }
  | { readonly type: 'token'; readonly tokenId: number; readonly logprob: TokenLogprob | undefined }
  | {
      readonly type: 'finished';
      /**
       * `stop`: a stop token was sampled, or the grammar allows no further token; `length`: `maxTokens` is reached or
       * the context is full; `cancelled`: by the signal.
       */
      readonly reason: 'stop' | 'length' | 'cancelled';
      /** The stop token's, if `logprobs` is given; a stop token has no `token` event. */
      readonly stopLogprob?: TokenLogprob;
      readonly promptTokens: number;
      readonly completionTokens: number;
      /** Prompt tokens whose K and V came from the prefix cache. */
      readonly cachedTokens: number;
      /** With `predictedTokenIds` or prompt lookup: predicted tokens that the answer has, and those that were computed in vain. */
      readonly predicted?: PredictedTokens;
      readonly timings: Timings;
    };

export type PredictedTokens = {
  /** What predicted them: the client, or the engine's lookup in the prompt. */
  readonly by: 'client' | 'prompt';
  readonly accepted: number;
  readonly rejected: number;
};

export type TokenLogprob = {
  readonly tokenId: number;
  readonly logprob: number;
  readonly top: readonly { readonly tokenId: number; readonly logprob: number }[];
};

export type Timings = {
  readonly queue_ms: number;
  readonly prefill_ms: number;
  readonly decode_ms: number;
  /** The longest time between two consecutive steps of the request. */
  readonly stepGap_ms: number;
};

export type EngineStats = {
  readonly requestsRunning: number;
  readonly requestsWaiting: number;
  readonly queueCapacity: number;
  /** The time since the last step of the request that has gone longest without one; 0 when none runs. */
  readonly stepAge_ms: number;
  /** The age of the oldest request that has had no step yet; 0 when there is none. */
  readonly queueAge_ms: number;
  /** Share of the pages for running requests that are in use, 0 to 1. */
  readonly kvCacheUsage: number;
  /** Sequences in the last step. */
  readonly batchSize: number;
  /** Pages of K and V: those of running requests and those in the prefix cache. */
  readonly pagesUsed: number;
  readonly pagesTotal: number;
  /** Prompt tokens that were looked up in the prefix cache, and those that were found. */
  readonly prefixQueriesTotal: number;
  readonly prefixHitsTotal: number;
  readonly preemptionsTotal: number;
  readonly stepsTotal: number;
  readonly promptTokensTotal: number;
  readonly generatedTokensTotal: number;
};

/**
 * What the engine's thread reports. Instead of ages it has times since the epoch (0 = none), so that the main thread
 * computes current ages even during a long step.
 */
export type ThreadStats = Omit<EngineStats, 'queueCapacity' | 'stepAge_ms' | 'queueAge_ms'> & {
  readonly leastRecentStep_ms: number;
  readonly oldestUnstarted_ms: number;
};

/* Shared memory holds the statistics in this order, so that the main thread reads them while the engine computes. */

const STATS = [
  'requestsRunning',
  'requestsWaiting',
  'kvCacheUsage',
  'leastRecentStep_ms',
  'oldestUnstarted_ms',
  'batchSize',
  'pagesUsed',
  'pagesTotal',
  'prefixQueriesTotal',
  'prefixHitsTotal',
  'preemptionsTotal',
  'stepsTotal',
  'promptTokensTotal',
  'generatedTokensTotal',
] as const satisfies readonly (keyof ThreadStats)[];

export const newSharedStats = (): SharedArrayBuffer =>
  new SharedArrayBuffer(STATS.length * Float64Array.BYTES_PER_ELEMENT);

export function writeStats(shared: Float64Array, stats: ThreadStats): void {
  STATS.forEach((name, i) => {
    shared[i] = stats[name];
  });
}

export const readStats = (shared: Float64Array): ThreadStats =>
  Object.fromEntries(STATS.map((name, i) => [name, shared[i]!])) as ThreadStats;
