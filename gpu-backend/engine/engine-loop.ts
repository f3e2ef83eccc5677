/**
 * The loop of the engine's thread: step = schedule → run → update. The scheduler decides, the runner computes, plain data
 * passes between them, and the output is a stream of events.
 *
 * An answer is bit-identical alone or in a batch, however its prompt is chunked, after a preemption, and with its prompt
 * taken from the prefix cache. The runtime sums a row the same way among any other rows; only attention sums a single row
 * in another order. So a piece of a prompt has at least two rows, and a token of an answer is always a single row
 * (`test/gpu-backend/engine/batch.test.ts`). The exception: a prompt that repeats an earlier answer may reuse that answer's
 * pages, which were computed as single rows; its logits then differ by rounding. And the tokens of a predicted answer are rows
 * together where they were predicted (`prediction.ts`).
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { EngineEvent, GenerateRequest, ThreadStats, TokenLogprob } from './engine.ts';
import type { SequenceCache } from './kv-cache.ts';
import { PrefixCache } from './prefix-cache.ts';
import { queueFull } from './queue.ts';
import type { RunInput } from './run-input.ts';
import { checkSurrogates, type Prefixes, type Runner } from './runner-interface.ts';
import { sample, tokenLogprob } from './sampler.ts';
import {
  isDrafted,
  type ScheduledRequest,
  Scheduler,
  type SchedulerLimits,
  type Step,
  type StepPart,
} from './scheduler.ts';
import {
  appendToken,
  finishedEvent,
  generatedTokens,
  logitRows,
  newSequence,
  nextTokenIds,
  promptTokens,
  type Sequence,
  samplerState,
} from './sequence.ts';
import { StepCost, type StepTimes } from './step-cost.ts';

type LoopOutput = {
  /** The request leaves the queue for the first time. */
  started?(requestId: string): void;
  event(requestId: string, event: EngineEvent): void;
  failed(requestId: string, error: MaskrouteError): void;
};

export type LoopLimits = SchedulerLimits & {
  /** Size of the prefix cache, in tokens; 0 disables it. */
  readonly prefixTokensMax: number;
  /** Whether answers whose client predicts nothing are predicted from their own prompt (`prediction.ts`). Default false. */
  readonly promptLookup?: boolean;
};

/** A freed cache up to this size is kept for the next request; the memory of larger ones is released. */
const KEPT_CACHE_TOKENS_MAX = 1024;
/** A new cache has room for the prompt and this many tokens; it grows for a longer answer. */
const RESERVED_ANSWER_TOKENS = 256;
/**
 * How long a step waits for the grammars of its answers, all together. An answer whose grammar takes longer misses steps, and
 * the others go on.
 */
const GRAMMARS_WAIT_ms = 20;

export class EngineLoop {
  readonly #runner: Runner;
  readonly #limits: SchedulerLimits;
  readonly #promptLookup: boolean;
  readonly #scheduler: Scheduler;
  readonly #prefixes: Prefixes;
  readonly #output: LoopOutput;
  readonly #sequences = new Map<string, Sequence>();
  readonly #freeCaches: SequenceCache[] = [];
  /** Logits `[V]` of the sequences that wait for their grammar: these are in no step until their next token is sampled. */
  readonly #held = new Map<Sequence, Float32Array>();
  #grammarsUntil_ms = 0;
  /** Sequences of the current step. The runtime writes into their caches, so these are not recycled before it ends. */
  #inStep: ReadonlySet<Sequence> = new Set();
  readonly #totals = {
    steps: 0,
    promptTokens: 0,
    generatedTokens: 0,
    preemptions: 0,
    prefixQueries: 0,
    prefixHits: 0,
  };
  #batchSize = 0;
  #wake: (() => void) | undefined;
  #closing = false;

  constructor(
    runner: Runner,
    { prefixTokensMax, promptLookup = false, ...limits }: LoopLimits,
    times: StepTimes,
    output: LoopOutput,
  ) {
    this.#runner = runner;
    this.#limits = limits;
    this.#promptLookup = promptLookup;
    this.#scheduler = new Scheduler(limits, new StepCost(times));
    this.#prefixes = runner.newPrefixes?.(prefixTokensMax) ?? new PrefixCache(prefixTokensMax);
    this.#output = output;
  }

  add(request: GenerateRequest): void {
    try {
      if (this.#closing)
        throw new MaskrouteError('not_ready', 'The server is shutting down.', { retryAfter_s: 5 });
      if (this.#sequences.has(request.requestId))
        throw new Error(`request ${request.requestId} is already running`);
      checkRequest(request, this.#runner);
      const sequence = newSequence(
        request,
        this.#runner.config.contextTokens,
        this.#promptLookup,
        performance.now(),
      );
      const displaced = this.#scheduler.add(sequence.scheduled);
      this.#sequences.set(request.requestId, sequence);
      if (displaced !== undefined) this.#drop(displaced, queueFull(this.#limits.waitingMax));
      this.#wake?.();
    } catch (error) {
      this.#output.failed(request.requestId, asEngineError(error));
    }
  }

  /** Ends a request that the scheduler removed from the queue. */
  #drop({ requestId }: ScheduledRequest, error: MaskrouteError): void {
    this.#sequences.delete(requestId);
    this.#output.failed(requestId, error);
  }

  cancel(requestId: string): void {
    const sequence = this.#sequences.get(requestId);
    if (sequence !== undefined) this.#finish(sequence, 'cancelled');
    // The loop may wait for a grammar, and a request that waited can run now.
    this.#wake?.();
  }

  /** Refuses new requests; `run` returns once all others have finished. */
  close(): void {
    this.#closing = true;
    this.#wake?.();
  }

  stats(): ThreadStats {
    return {
      requestsRunning: this.#scheduler.runningCount,
      requestsWaiting: this.#scheduler.waitingCount,
      kvCacheUsage: this.#scheduler.pagesUsed / this.#scheduler.pagesTotal,
      ...this.#oldest(),
      batchSize: this.#batchSize,
      pagesUsed: this.#scheduler.pagesUsed + this.#prefixes.pageCount,
      pagesTotal: this.#scheduler.pagesTotal + this.#prefixes.pagesMax,
      prefixQueriesTotal: this.#totals.prefixQueries,
      prefixHitsTotal: this.#totals.prefixHits,
      preemptionsTotal: this.#totals.preemptions,
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

  /** Calls `afterStep` after every step and whenever the loop becomes idle. */
  async run(afterStep: () => void): Promise<void> {
    for (;;) {
      this.#expire();
      this.#sampleHeld();
      this.#startAdmitted();
      const step = this.#scheduler.schedule();
      if (step !== undefined) await this.#step(step);
      afterStep();
      if (step === undefined) {
        if (this.#closing && this.#sequences.size === 0) return;
        const { promise, resolve } = Promise.withResolvers<void>();
        this.#wake = resolve;
        await Promise.race([promise, ...[...this.#held.keys()].map(({ grammar }) => grammar!.changed())]);
        this.#wake = undefined;
      }
    }
  }

  /** Gives each admitted request a cache, filled from the prefix cache. A request that fails here lets in the next one. */
  #startAdmitted(): void {
    const next = (): Sequence | undefined =>
      this.#scheduler.running
        .map(({ requestId }) => this.#sequences.get(requestId)!)
        .find(({ cache }) => cache === undefined);
    for (let sequence = next(); sequence !== undefined; sequence = next()) {
      try {
        this.#start(sequence);
      } catch (error) {
        this.#fail(sequence, error);
      }
    }
  }

  async #step(step: Step): Promise<void> {
    const begun_ms = performance.now();
    for (const { requestId } of step.preempted) this.#preempted(this.#sequences.get(requestId)!);
    if (step.parts.length === 0) return;
    const work = step.parts.map((part) => this.#prepare(part, begun_ms));
    this.#batchSize = work.length;
    this.#inStep = new Set(work.map(({ sequence }) => sequence));
    await this.#run(work);
    this.#recycleEnded();
    this.#totals.steps++;
    this.#scheduler.charge(step, performance.now() - begun_ms);
  }

  #prepare(part: StepPart, begun_ms: number): Work {
    const sequence = this.#sequences.get(part.request.requestId)!;
    sequence.stepGap_ms = Math.max(sequence.stepGap_ms, begun_ms - (sequence.steppedAt_ms ?? begun_ms));
    const { computedCount } = part.request;
    return {
      part,
      sequence,
      start: computedCount,
      input: {
        cache: sequence.cache!,
        tokenIds: nextTokenIds(sequence, part.tokens),
        plan: sequence.request.plan,
        logitRows: logitRows(sequence, part.tokens),
      },
    };
  }

  /** When a step fails, each of its requests is run again alone, so that only the request that causes the failure fails. */
  async #run(work: readonly Work[]): Promise<void> {
    try {
      const logits = await this.#runner.runMany(work.map(({ input }) => input));
      this.#grammarsUntil_ms = performance.now() + GRAMMARS_WAIT_ms;
      work.forEach((one, i) => {
        this.#ran(one, logits[i]!);
      });
    } catch (error) {
      if (work.length === 1) {
        this.#fail(work[0]!.sequence, error);
        return;
      }
      for (const one of work) {
        if (!this.#isLive(one.sequence)) continue;
        // The failed step may already have advanced this cache.
        one.input.cache.truncate(one.start);
        await this.#run([one]);
      }
    }
  }

  #isLive(sequence: Sequence): boolean {
    return this.#sequences.get(sequence.scheduled.requestId) === sequence;
  }

  /** Recycles the caches of requests that ended in the step or were cancelled during it. */
  #recycleEnded(): void {
    const ended = [...this.#inStep].filter((sequence) => !this.#isLive(sequence));
    this.#inStep = new Set();
    for (const sequence of ended) this.#recycle(sequence);
  }

  #ran(work: Work, logits: Float32Array): void {
    const { part, sequence, input, start } = work;
    sequence.steppedAt_ms = performance.now();
    // The request may have been cancelled during the step. Predicted tokens behind its own must not be kept with it.
    if (!this.#isLive(sequence)) {
      input.cache.truncate(sequence.tokenIds.length);
      return;
    }
    try {
      if (isDrafted(part)) {
        this.#sampleDrafted(work, logits);
        return;
      }
      this.#scheduler.update(part);
      this.#keepPages(sequence);
      this.#advance(sequence, input.logitRows, start, logits);
    } catch (error) {
      this.#fail(sequence, error);
    }
  }

  #fail(sequence: Sequence, error: unknown): void {
    if (!this.#isLive(sequence)) return;
    this.#remove(sequence);
    this.#output.failed(sequence.scheduled.requestId, asEngineError(error));
  }

  #start(sequence: Sequence): void {
    const { request, scheduled } = sequence;
    if (sequence.startedAt_ms === undefined) {
      sequence.startedAt_ms = performance.now();
      this.#output.started?.(scheduled.requestId);
    }
    sequence.cache = this.#freeCaches.pop() ?? this.#runner.newCache();
    sequence.cache.reserve(Math.min(scheduled.cacheTokens, scheduled.tokenCount + RESERVED_ANSWER_TOKENS));
    // Scoring a prompt needs the logits of all its tokens.
    if (request.promptLogprobs !== undefined) return;
    // After a preemption only the prompt comes from the cache: the answer's tokens are computed one by one, as before, and
    // so to the same bits.
    const known = this.#prefixes.take(request, request.promptTokenIds, sequence.cache);
    this.#totals.prefixQueries += promptTokens(sequence);
    this.#totals.prefixHits += known;
    scheduled.computedCount = known;
    sequence.keptTokens = known;
    if (scheduled.preemptions === 0) sequence.cachedTokens = known;
  }

  /** Recycles the cache; the sequence may find its own pages in the prefix cache later. */
  #preempted(sequence: Sequence): void {
    this.#totals.preemptions++;
    if (sequence.prefilledAt_ms === undefined) sequence.promptLogprobs.splice(1);
    this.#held.delete(sequence);
    this.#recycle(sequence);
  }

  #keepPages(sequence: Sequence): void {
    const { request, scheduled, tokenIds, keptTokens, cache } = sequence;
    this.#prefixes.keep(request, tokenIds, keptTokens, scheduled.computedCount, cache!);
    sequence.keptTokens = scheduled.computedCount;
  }

  /** Reads the logits of a step: scores the prompt, then samples once all tokens are computed. */
  #advance(sequence: Sequence, rows: readonly number[], start: number, logits: Float32Array): void {
    const { request, scheduled } = sequence;
    const width = this.#runner.config.vocabularySize;
    const inPrompt = start < promptTokens(sequence) && sequence.prefilledAt_ms === undefined;
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
    else this.#sampleWhenReady(sequence, logits.subarray((rows.length - 1) * width, rows.length * width));
  }

  /**
   * Samples a token from each row of the answer's last token and its draft, up to the first that differs from the draft or waits
   * for its grammar, and lets the cache forget the rows behind.
   */
  #sampleDrafted({ part, sequence, input, start }: Work, logits: Float32Array): void {
    const width = this.#runner.config.vocabularySize;
    sequence.prediction!.computed(part.tokens - 1);
    let rows = 0;
    try {
      do {
        rows++;
        this.#sampleWhenReady(sequence, logits.subarray((rows - 1) * width, rows * width));
      } while (this.#isSampled(sequence) && sequence.tokenIds.at(-1) === input.tokenIds[rows]);
    } finally {
      input.cache.truncate(start + rows);
    }
    // Also of an answer that ended with them: its cache is recycled after the step.
    this.#scheduler.update({ request: part.request, tokens: rows });
    this.#keepPages(sequence);
  }

  /** Whether the answer goes on, and its next token does not wait for its grammar. */
  #isSampled(sequence: Sequence): boolean {
    return this.#isLive(sequence) && !this.#held.has(sequence);
  }

  #sampleWhenReady(sequence: Sequence, logits: Float32Array): void {
    const wait_ms = Math.max(0, this.#grammarsUntil_ms - performance.now());
    // A copy, since the runner writes the next step's logits to the same place.
    if (sequence.grammar?.isReady(wait_ms) === false) this.#held.set(sequence, logits.slice());
    else this.#sampleOne(sequence, logits);
  }

  #sampleHeld(): void {
    for (const [sequence, logits] of this.#held) {
      if (!sequence.grammar!.isReady(0)) continue;
      this.#held.delete(sequence);
      try {
        this.#sampleOne(sequence, logits);
      } catch (error) {
        this.#fail(sequence, error);
      }
    }
  }

  #promptDone(sequence: Sequence): void {
    sequence.prefilledAt_ms = performance.now();
    this.#totals.promptTokens += promptTokens(sequence);
    if (sequence.request.promptLogprobs !== undefined) {
      this.#output.event(sequence.scheduled.requestId, { type: 'prompt', logprobs: sequence.promptLogprobs });
    }
  }

  #sampleOne(sequence: Sequence, logits: Float32Array): void {
    const { request, grammar } = sequence;
    // Where the answer may end and there are stop tokens, the model samples one to end it. Otherwise the answer ends here
    // if the grammar allows no token but stop tokens.
    const mayStop = request.stopTokenIds.length > 0 && grammar?.mayEnd === true;
    if (!mayStop && grammar?.isOver(request.stopTokenIds)) {
      this.#finish(sequence, 'stop');
      return;
    }
    // Sampling changes the logits; log-probabilities are computed from the unchanged ones.
    const own = request.logprobs === undefined ? undefined : logits.slice();
    const tokenId = sample(logits, request.sampling, samplerState(sequence));
    if (!Number.isFinite(logits[tokenId])) throw new Error("the model's logits are not finite");
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
    this.#held.delete(sequence);
    this.#scheduler.remove(sequence.scheduled.requestId);
    this.#recycle(sequence);
  }

  #recycle(sequence: Sequence): void {
    if (this.#inStep.has(sequence)) return;
    const { cache } = sequence;
    sequence.cache = undefined;
    if (cache !== undefined) this.#prefixes.keepLast?.(sequence.request, sequence.tokenIds, cache);
    // On a GPU this releases the cache's place.
    cache?.truncate(0);
    if (cache === undefined || cache.capacity_tokens > KEPT_CACHE_TOKENS_MAX) return;
    if (this.#freeCaches.length < this.#limits.runningMax) this.#freeCaches.push(cache);
  }

  #expire(): void {
    const message = `The request waited in the queue for over ${this.#limits.queueTimeout_ms / 1000} s.`;
    for (const request of this.#scheduler.expire(performance.now()))
      this.#drop(request, new MaskrouteError('queue_timeout', message, { retryAfter_s: 1 }));
  }
}

/** One sequence's part in a step. */
type Work = {
  readonly part: StepPart;
  readonly sequence: Sequence;
  readonly input: RunInput;
  /** Position of its first token in this step. */
  readonly start: number;
};

function checkRequest(request: GenerateRequest, { config, surrogates }: Runner): void {
  const promptTokens = request.promptTokenIds.length;
  const room = config.contextTokens - promptTokens;
  if (promptTokens === 0)
    throw new MaskrouteError('invalid_request', 'The prompt is empty.', { param: 'prompt' });
  if (room < 0 || (room === 0 && request.maxTokens > 0)) {
    throw new MaskrouteError(
      'context_length_exceeded',
      `This model's maximum context length is ${config.contextTokens} tokens, answer included; the prompt has ${promptTokens}.`,
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

const asEngineError = (error: unknown): MaskrouteError =>
  error instanceof MaskrouteError
    ? error
    : new MaskrouteError('engine_failed', 'The engine failed on this request.', { cause: error });
