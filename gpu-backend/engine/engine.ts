/**
 * The engine as the API sees it: token ids in, a stream of events out. Everything behind it (scheduler,
 * slots, runner, cache, sampler) runs in a worker thread, because `session.run` blocks its thread.
 */
import type { Mask, ModelHash, SurrogatesId } from '../../shared/mask/mask.ts';
import type { MaskrouteError } from '../../shared/wire/errors.ts';
import type { KvType } from '../model/model-source.ts';
import type { Device } from '../onnx/device.ts';
import type { GrammarSession } from './grammar.ts';

export interface Engine {
  readonly model: EngineModel;
  /**
   * @throws MaskrouteError `queue_full` at once when the waiting line is full, `queue_timeout` when the request
   * waited too long, `engine_failed` when the runtime failed. Aborting `signal` ends the stream with a
   * `finished` event of reason `cancelled` within one step.
   */
  generate(request: GenerateRequest, signal: AbortSignal): AsyncIterable<EngineEvent>;
  /**
   * To be asked before anything of a request is read, since most of what is refused is refused for this.
   * @throws MaskrouteError `queue_full` when a request of `tenant` would find no place in the waiting line.
   */
  expectRoom(tenant: string): void;
  stats(): EngineStats;
  /** Why the engine has stopped for good; undefined while it lives. */
  readonly failure: MaskrouteError | undefined;
  /** How long the engine has owed a sign of life, in ms; asking for it is what asks the engine. */
  silence_ms(): number;
  /** Finishes what runs, takes nothing new. */
  close(): Promise<void>;
}

export type EngineModel = {
  readonly hash: ModelHash;
  readonly blockCount: number;
  readonly contextTokens: number;
  readonly vocabularySize: number;
  /** What computes it. */
  readonly device: Device;
  /** How K and V are kept, and what a page of them takes. */
  readonly kv: { readonly type: KvType; readonly page_bytes: number };
  /** The model's table of surrogates, if it has one. */
  readonly surrogates?: SurrogatesId;
};

export type GenerateRequest = {
  readonly requestId: string;
  /** Whose it is: tenants take turns, and each shares computed prompts with itself alone. Empty for the key's holder. */
  readonly tenant: string;
  /** When the whole answer began, since the epoch; now, unless given. This may be a late choice of it. */
  readonly answerSince_ms?: number;
  readonly promptTokenIds: Int32Array;
  readonly plan: MaskPlan;
  readonly sampling: Sampling;
  /** 0 scores the prompt only. */
  readonly maxTokens: number;
  readonly minTokens: number;
  /** Ids that end the answer; they are not part of it. Empty with `ignore_eos`. */
  readonly stopTokenIds: readonly number[];
  /** Log-probabilities of each generated token with this many alternatives; undefined = none. */
  readonly logprobs: number | undefined;
  /** The same for the prompt's own tokens (`echo` with `logprobs`). */
  readonly promptLogprobs: number | undefined;
  /** What the answer must look like; who asks closes it. */
  readonly grammar?: GrammarSession | undefined;
};

/** What the model may do in this request. */
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
  /** Equal seeds give equal tokens; the engine draws one when it is absent. */
  readonly seed: number | undefined;
};

/** `prompt` comes at most once and first; `finished` or a rejection ends the stream. */
export type EngineEvent =
  /** One entry a prompt token; the first is null (nothing precedes it). */
  | { readonly type: 'prompt'; readonly logprobs: readonly (TokenLogprob | null)[] }
  | { readonly type: 'token'; readonly tokenId: number; readonly logprob: TokenLogprob | undefined }
  | {
      readonly type: 'finished';
      /** `stop`: a stop token id came, or the grammar allows nothing more; `length`: maxTokens or the context is full; `cancelled`: by the signal. */
      readonly reason: 'stop' | 'length' | 'cancelled';
      /** Of the stop token, when `logprobs` was asked for: it is no `token` event. */
      readonly stopLogprob?: TokenLogprob;
      readonly promptTokens: number;
      readonly completionTokens: number;
      /** Tokens of the prompt that were taken over from another prompt that began the same. */
      readonly cachedTokens: number;
      readonly timings: Timings;
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
  /** The longest wait between two steps. */
  readonly stepGap_ms: number;
};

export type EngineStats = {
  readonly requestsRunning: number;
  readonly requestsWaiting: number;
  readonly queueCapacity: number;
  /** The longest time since its last step of a request that had one; 0 when none runs. */
  readonly stepAge_ms: number;
  /** The longest wait of a request that has had no step; 0 when there is none. */
  readonly queueAge_ms: number;
  /** Share of the cache's token slots that are taken, 0 to 1. */
  readonly kvCacheUsage: number;
  /** Sequences in the last step. */
  readonly batchSize: number;
  /** Pages of K and V: of those that run, and kept for prompts that begin the same. */
  readonly pagesUsed: number;
  readonly pagesTotal: number;
  /** Tokens of prompts that were looked up among kept pages, and found. */
  readonly prefixQueriesTotal: number;
  readonly prefixHitsTotal: number;
  readonly preemptionsTotal: number;
  readonly stepsTotal: number;
  readonly promptTokensTotal: number;
  readonly generatedTokensTotal: number;
};

/** What the engine's thread counts. Times are since the epoch, 0 for none: their ages grow while the thread computes. */
export type ThreadStats = Omit<EngineStats, 'queueCapacity' | 'stepAge_ms' | 'queueAge_ms'> & {
  readonly leastRecentStep_ms: number;
  readonly oldestUnstarted_ms: number;
};

/* Shared memory holds those numbers in this order, so that they can be read while the thread computes. */

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
