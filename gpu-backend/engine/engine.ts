/**
 * The engine as the API sees it: token ids in, a stream of events out. Everything behind it (scheduler,
 * slots, runner, cache, sampler) runs in a worker thread, because `session.run` blocks its thread.
 */
import type { Mask, ModelHash, SurrogatesId } from '../../shared/mask/mask.ts';
import type { MaskrouteError } from '../../shared/wire/errors.ts';

/* What a run of the model is told: which blocks run, how tokens are drawn. */

export type KvMode = 'preserve' | 'elide';

/** What the model may do in this request. */
export type MaskPlan = { readonly mask: Mask; readonly kv: KvMode };

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

export type TokenLogprob = {
  readonly tokenId: number;
  readonly logprob: number;
  readonly top: readonly { readonly tokenId: number; readonly logprob: number }[];
};

export type GenerateRequest = {
  readonly requestId: string;
  /** Whose it is: tenants take turns, and each shares computed prompts with itself alone. Empty for the key's holder. */
  readonly tenant: string;
  /** When the answer began that this is a choice of, since the epoch; now, unless given. */
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
};

export type Timings = {
  readonly queue_ms: number;
  readonly prefill_ms: number;
  readonly decode_ms: number;
  /** The longest that it waited between two of its steps. */
  readonly stepGap_ms: number;
};

/** `prompt` comes at most once and first; `finished` or a rejection ends the stream. */
export type EngineEvent =
  /** One entry a prompt token; the first is null (nothing precedes it). */
  | { readonly type: 'prompt'; readonly logprobs: readonly (TokenLogprob | null)[] }
  | { readonly type: 'token'; readonly tokenId: number; readonly logprob: TokenLogprob | undefined }
  | {
      readonly type: 'finished';
      /** `stop`: a stop token id came; `length`: maxTokens or the context is full; `cancelled`: by the signal. */
      readonly reason: 'stop' | 'length' | 'cancelled';
      /** Of the stop token, which is no `token` event, when `logprobs` was asked for. */
      readonly stopLogprob?: TokenLogprob;
      readonly promptTokens: number;
      readonly completionTokens: number;
      /** Of the prompt: taken over from another one that began the same. */
      readonly cachedTokens: number;
      readonly timings: Timings;
    };

type EngineStats = {
  readonly requestsRunning: number;
  readonly requestsWaiting: number;
  readonly queueCapacity: number;
  /** The longest time since its last step of a request that had one; 0 when none runs. */
  readonly stepAge_ms: number;
  /** The longest wait of a request that has had no step; 0 when there is none. */
  readonly queueAge_ms: number;
  /** Share of the cache's token slots that are taken, 0 to 1. */
  readonly kvCacheUsage: number;
  readonly stepsTotal: number;
  readonly promptTokensTotal: number;
  readonly generatedTokensTotal: number;
};

export type EngineModel = {
  readonly hash: ModelHash;
  readonly blockCount: number;
  readonly contextTokens: number;
  readonly vocabularySize: number;
  /** The model's table of surrogates, if it has one. */
  readonly surrogates?: SurrogatesId;
};

export interface Engine {
  readonly model: EngineModel;
  /**
   * @throws MaskrouteError `queue_full` at once when the waiting line is full, `queue_timeout` when the request
   * waited too long, `engine_failed` when the runtime failed. Aborting `signal` ends the stream with a
   * `finished` event of reason `cancelled` within one step.
   */
  generate(request: GenerateRequest, signal: AbortSignal): AsyncIterable<EngineEvent>;
  stats(): EngineStats;
  /** Why the engine has stopped for good; undefined while it lives. */
  readonly failure: MaskrouteError | undefined;
  /** How long the engine has owed a sign of life, in ms; asking for it is what asks the engine. */
  silence_ms(): number;
  /** Finishes what runs, takes nothing new. */
  close(): Promise<void>;
}
