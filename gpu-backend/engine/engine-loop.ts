/**
 * The loop of the engine's thread: step = schedule → run → update. Plain data goes between the scheduler, which
 * decides, and the runner, which computes; events of requests come out.
 */
import type { Mask, SurrogatesId } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { EngineEvent, GenerateRequest, ThreadStats, TokenLogprob } from './engine.ts';
import type { KvCache } from './kv-cache.ts';
import { PrefixCache } from './prefix-cache.ts';
import type { Runner } from './runner.ts';
import { sample, tokenLogprob } from './sampler.ts';
import type { ScheduledRequest, SchedulerLimits } from './scheduler.ts';
import { queueFull, Scheduler } from './scheduler.ts';
import type { Sequence } from './sequence.ts';
import {
  appendToken,
  finishedEvent,
  generatedTokens,
  logitRows,
  newSequence,
  promptTokens,
  samplerState,
} from './sequence.ts';

export type LoopOutput = {
  event(requestId: string, event: EngineEvent): void;
  failed(requestId: string, error: MaskrouteError): void;
};

export type LoopLimits = SchedulerLimits & {
  /** Room of all caches that are kept for prompts that begin the same, in tokens; 0 keeps none. */
  readonly prefixTokensMax: number;
};

/** A freed cache up to this size is kept for the next request; larger ones give their memory back. */
const KEPT_CACHE_TOKENS_MAX = 1024;
/** Room for a usual answer is made at once; a longer one makes the cache grow. */
const RESERVED_ANSWER_TOKENS = 256;
/** How often the waiting line is checked for requests that waited too long. */
const EXPIRE_INTERVAL_ms = 100;

export class EngineLoop {
  readonly #runner: Runner;
  readonly #limits: SchedulerLimits;
  readonly #scheduler: Scheduler;
  readonly #prefixes: PrefixCache;
  readonly #output: LoopOutput;
  readonly #sequences = new Map<string, Sequence>();
  readonly #freeCaches: KvCache[] = [];
  readonly #totals = { steps: 0, promptTokens: 0, generatedTokens: 0 };
  #expiredAt_ms = 0;
  #wake: (() => void) | undefined;
  #closing = false;

  constructor(runner: Runner, { prefixTokensMax, ...limits }: LoopLimits, output: LoopOutput) {
    this.#runner = runner;
    this.#limits = limits;
    this.#scheduler = new Scheduler(limits);
    this.#prefixes = new PrefixCache({ chunkTokens: limits.chunkTokens, tokensMax: prefixTokensMax });
    this.#output = output;
  }

  add(request: GenerateRequest): void {
    try {
      if (this.#closing)
        throw new MaskrouteError('not_ready', 'The server is shutting down.', { retryAfter_s: 5 });
      if (this.#sequences.has(request.requestId))
        throw new Error(`request ${request.requestId} runs already`);
      checkRequest(request, this.#runner);
      const sequence = newSequence(request, this.#runner.config.contextTokens, performance.now());
      this.#sequences.set(request.requestId, sequence);
      const displaced = this.#scheduler.add(sequence.scheduled);
      if (displaced !== undefined) this.#displace(displaced.requestId);
      this.#wake?.();
    } catch (error) {
      this.#sequences.delete(request.requestId);
      this.#output.failed(request.requestId, asEngineError(error));
    }
  }

  /** Its tenant has most in the line, and a tenant that has less comes. */
  #displace(requestId: string): void {
    this.#sequences.delete(requestId);
    this.#output.failed(requestId, queueFull(this.#limits.waitingMax));
  }

  cancel(requestId: string): void {
    const sequence = this.#sequences.get(requestId);
    if (sequence !== undefined) this.#finish(sequence, 'cancelled');
  }

  /** Takes nothing new; `run` returns once everything has finished. */
  close(): void {
    this.#closing = true;
    this.#wake?.();
  }

  stats(): ThreadStats {
    return {
      requestsRunning: this.#scheduler.runningCount,
      requestsWaiting: this.#scheduler.waitingCount,
      kvCacheUsage: this.#scheduler.cacheTokensReserved / this.#limits.cacheTokensMax,
      ...this.#oldest(),
      stepsTotal: this.#totals.steps,
      promptTokensTotal: this.#totals.promptTokens,
      generatedTokensTotal: this.#totals.generatedTokens,
    };
  }

  #oldest(): Pick<ThreadStats, 'leastRecentStep_ms' | 'oldestUnstarted_ms'> {
    let [step_ms, unstarted_ms] = [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY];
    for (const { steppedAt_ms, scheduled } of this.#sequences.values()) {
      if (steppedAt_ms === undefined) unstarted_ms = Math.min(unstarted_ms, scheduled.arrivedAt_ms);
      else step_ms = Math.min(step_ms, steppedAt_ms);
    }
    const epoch = (at_ms: number) => (Number.isFinite(at_ms) ? performance.timeOrigin + at_ms : 0);
    return { leastRecentStep_ms: epoch(step_ms), oldestUnstarted_ms: epoch(unstarted_ms) };
  }

  /** `afterStep` is called after every step and whenever the loop falls idle. */
  async run(afterStep: () => void): Promise<void> {
    for (;;) {
      this.#expire();
      const next = this.#scheduler.next;
      if (next !== undefined) await this.#step(next);
      afterStep();
      if (next === undefined) {
        if (this.#closing && this.#sequences.size === 0) return;
        await new Promise<void>((resolve) => {
          this.#wake = resolve;
        });
        this.#wake = undefined;
      }
    }
  }

  async #step(scheduled: ScheduledRequest): Promise<void> {
    const sequence = this.#sequences.get(scheduled.requestId)!;
    const begun_ms = performance.now();
    sequence.stepGap_ms = Math.max(sequence.stepGap_ms, begun_ms - (sequence.steppedAt_ms ?? begun_ms));
    try {
      this.#start(sequence);
      const step = this.#scheduler.schedule()!;
      const { computedCount } = scheduled;
      const rows = logitRows(sequence, step.tokens);
      const logits = await this.#runner.run({
        cache: sequence.cache!,
        tokenIds: sequence.tokenIds.slice(computedCount, computedCount + step.tokens),
        plan: sequence.request.plan,
        logitRows: rows,
      });
      this.#totals.steps++;
      sequence.steppedAt_ms = performance.now();
      // It may have been cancelled while the runtime held the thread.
      if (!this.#sequences.has(sequence.scheduled.requestId)) {
        this.#recycle(sequence);
        return;
      }
      this.#scheduler.update(step);
      this.#advance(sequence, rows, computedCount, logits);
    } catch (error) {
      this.#remove(sequence);
      this.#output.failed(sequence.scheduled.requestId, asEngineError(error));
    } finally {
      this.#scheduler.charge(scheduled, performance.now() - begun_ms);
    }
  }

  #start(sequence: Sequence): void {
    if (sequence.cache !== undefined) return;
    const { request, scheduled } = sequence;
    sequence.startedAt_ms = performance.now();
    sequence.cache = this.#freeCaches.pop() ?? this.#runner.newCache();
    sequence.cache.truncate(0);
    sequence.cache.reserve(Math.min(scheduled.cacheTokens, scheduled.tokenCount + RESERVED_ANSWER_TOKENS));
    // A prompt that is scored needs the logits of all its tokens.
    if (request.promptLogprobs !== undefined) return;
    const known = this.#prefixes.find(request, request.promptTokenIds);
    if (known === undefined) return;
    sequence.cache.copyFrom(known.cache, known.tokens);
    scheduled.computedCount = known.tokens;
    sequence.cachedTokens = known.tokens;
  }

  /** Reads the logits of a step: scores the prompt, then samples once all tokens are computed. */
  #advance(sequence: Sequence, rows: readonly number[], start: number, logits: Float32Array): void {
    const { request, scheduled } = sequence;
    const width = this.#runner.config.vocabularySize;
    const inPrompt = start < promptTokens(sequence);
    if (request.promptLogprobs !== undefined && inPrompt) {
      rows.forEach((row, i) => {
        const next = start + row + 1;
        if (next >= promptTokens(sequence)) return;
        const line = logits.subarray(i * width, (i + 1) * width);
        sequence.promptLogprobs.push(tokenLogprob(line, sequence.tokenIds[next]!, request.promptLogprobs!));
      });
    }
    if (scheduled.computedCount < scheduled.tokenCount) return;
    if (inPrompt) this.#promptDone(sequence);
    if (sequence.generatedMax === 0) this.#finish(sequence, 'length');
    else this.#sampleOne(sequence, logits.subarray((rows.length - 1) * width, rows.length * width));
  }

  #promptDone(sequence: Sequence): void {
    sequence.prefilledAt_ms = performance.now();
    this.#totals.promptTokens += promptTokens(sequence);
    if (sequence.request.promptLogprobs !== undefined) {
      this.#output.event(sequence.scheduled.requestId, { type: 'prompt', logprobs: sequence.promptLogprobs });
    }
  }

  #sampleOne(sequence: Sequence, logits: Float32Array): void {
    const { request } = sequence;
    // Without stop ids nothing else ends an answer that is whole.
    if (request.stopTokenIds.length === 0 && sequence.grammar?.isOver) {
      this.#finish(sequence, 'stop');
      return;
    }
    // Sampling changes the logits, log-probabilities are the model's own.
    const own = request.logprobs === undefined ? undefined : logits.slice();
    const tokenId = sample(logits, request.sampling, samplerState(sequence));
    if (!Number.isFinite(logits[tokenId])) throw new Error('the model gave no finite logits');
    const logprob = own && tokenLogprob(own, tokenId, request.logprobs!);
    if (request.stopTokenIds.includes(tokenId)) {
      this.#finish(sequence, 'stop', logprob);
      return;
    }
    appendToken(sequence, tokenId);
    this.#totals.generatedTokens++;
    this.#output.event(request.requestId, { type: 'token', tokenId, logprob });
    if (generatedTokens(sequence) >= sequence.generatedMax) this.#finish(sequence, 'length');
  }

  #finish(sequence: Sequence, reason: 'stop' | 'length' | 'cancelled', stopLogprob?: TokenLogprob): void {
    this.#remove(sequence);
    const event = finishedEvent(sequence, reason, performance.now());
    this.#output.event(
      sequence.scheduled.requestId,
      stopLogprob === undefined ? event : { ...event, stopLogprob },
    );
  }

  #remove(sequence: Sequence): void {
    this.#sequences.delete(sequence.scheduled.requestId);
    this.#scheduler.remove(sequence.scheduled.requestId);
    this.#recycle(sequence);
  }

  /** Its cache is kept for prompts that begin the same, or used again as it is. */
  #recycle(sequence: Sequence): void {
    const { cache, request, scheduled } = sequence;
    sequence.cache = undefined;
    if (cache === undefined) return;
    for (const free of this.#prefixes.keep(request, request.promptTokenIds, scheduled.computedCount, cache)) {
      const isWanted = this.#freeCaches.length < this.#limits.runningMax;
      if (isWanted && free.capacity_tokens <= KEPT_CACHE_TOKENS_MAX) this.#freeCaches.push(free);
    }
  }

  #expire(): void {
    const now_ms = performance.now();
    if (now_ms - this.#expiredAt_ms < EXPIRE_INTERVAL_ms) return;
    this.#expiredAt_ms = now_ms;
    for (const { requestId } of this.#scheduler.expire(now_ms)) {
      this.#sequences.delete(requestId);
      const message = `The request waited over ${this.#limits.queueTimeout_ms / 1000} s for its turn.`;
      this.#output.failed(requestId, new MaskrouteError('queue_timeout', message, { retryAfter_s: 1 }));
    }
  }
}

function checkRequest(request: GenerateRequest, { config, surrogates }: Runner): void {
  const promptTokens = request.promptTokenIds.length;
  const room = config.contextTokens - promptTokens;
  if (promptTokens === 0)
    throw new MaskrouteError('invalid_request', 'The prompt is empty.', { param: 'prompt' });
  if (room < 0 || (room === 0 && request.maxTokens > 0)) {
    throw new MaskrouteError(
      'context_length_exceeded',
      `The prompt has ${promptTokens} tokens; the model's context is ${config.contextTokens} with the answer.`,
    );
  }
  if (request.promptTokenIds.some((id) => id < 0 || id >= config.vocabularySize)) {
    throw new MaskrouteError('invalid_request', `Token ids must be below ${config.vocabularySize}.`, {
      param: 'prompt',
    });
  }
  if (request.plan.mask.runs.length !== 2 * config.layerCount) {
    throw new MaskrouteError(
      'mask_model_mismatch',
      `The mask has ${request.plan.mask.runs.length} blocks, the model ${2 * config.layerCount}.`,
      { param: 'mask' },
    );
  }
  checkSurrogates(request.plan.mask, surrogates);
}

/** A mask that was learned with other surrogates means nothing here. */
function checkSurrogates({ surrogates: wanted }: Mask, served: SurrogatesId | undefined): void {
  if (wanted === undefined || wanted === served) return;
  const has = served === undefined ? 'none' : served;
  throw new MaskrouteError(
    'surrogates_mismatch',
    `The mask wants surrogates ${wanted}; this model has ${has}.`,
    {
      param: 'mask',
    },
  );
}

const asEngineError = (error: unknown): MaskrouteError =>
  error instanceof MaskrouteError
    ? error
    : new MaskrouteError('engine_failed', 'The engine failed on this request.', { cause: error });
