/**
 * Who runs next. It knows requests and token counts and never touches a tensor: `schedule` says what the next
 * step computes, `update` hears what came of it.
 *
 * There is no prefill or decode phase (as in vLLM v1): a request has tokens, some of them computed, and every
 * step brings the computed ones closer to all. Requests take turns, one turn a step, so a long prompt delays
 * the others by one chunk and no more. Chunks start at multiples of the chunk size, whatever else runs: a
 * request's result never depends on its neighbours.
 */
import { MaskrouteError } from '../../shared/errors.ts';

export type SchedulerLimits = {
  /** Requests that hold a cache at a time. */
  readonly runningMax: number;
  readonly waitingMax: number;
  readonly queueTimeout_ms: number;
  /** Tokens of a prompt computed in one step. */
  readonly chunkTokens: number;
  /** Room in all caches together, in tokens. */
  readonly cacheTokensMax: number;
};

/** What the scheduler keeps of a request. */
export type ScheduledRequest = {
  readonly requestId: string;
  /** The most tokens its cache may come to hold: reserved when it starts, so it never has to stop half-way. */
  readonly cacheTokens: number;
  readonly arrivedAt_ms: number;
  /** Prompt and generated tokens so far. */
  tokenCount: number;
  computedCount: number;
};

export type Step = { readonly request: ScheduledRequest; readonly tokens: number };

export class Scheduler {
  readonly #limits: SchedulerLimits;
  readonly #waiting: ScheduledRequest[] = [];
  /** The next to run comes first. */
  readonly #running: ScheduledRequest[] = [];

  constructor(limits: SchedulerLimits) {
    for (const [name, value] of Object.entries(limits)) {
      if (!(value > 0)) throw new RangeError(`${name} must be positive, not ${value}`);
    }
    this.#limits = limits;
  }

  get runningCount(): number {
    return this.#running.length;
  }

  get waitingCount(): number {
    return this.#waiting.length;
  }

  get cacheTokensReserved(): number {
    return this.#running.reduce((sum, request) => sum + request.cacheTokens, 0);
  }

  /** @throws MaskrouteError `queue_full`, or `context_length_exceeded` for one that could never fit. */
  add(request: ScheduledRequest): void {
    const { waitingMax, cacheTokensMax } = this.#limits;
    if (request.cacheTokens > cacheTokensMax) {
      throw new MaskrouteError(
        'context_length_exceeded',
        `The request needs ${request.cacheTokens} tokens of cache; this server has ${cacheTokensMax}.`,
      );
    }
    this.#waiting.push(request);
    this.#admit();
    if (this.#waiting.length > waitingMax) {
      this.#waiting.pop();
      throw new MaskrouteError('queue_full', `${waitingMax} requests are waiting already.`, {
        retryAfter_s: 1,
      });
    }
  }

  /** Takes a request out, wherever it is; room is given on at once. */
  remove(requestId: string): void {
    for (const list of [this.#waiting, this.#running]) {
      const index = list.findIndex((request) => request.requestId === requestId);
      if (index >= 0) list.splice(index, 1);
    }
    this.#admit();
  }

  /** Requests that waited too long, taken out of the line. */
  expire(now_ms: number): ScheduledRequest[] {
    const late = this.#waiting.filter(
      (request) => now_ms - request.arrivedAt_ms > this.#limits.queueTimeout_ms,
    );
    for (const request of late) this.remove(request.requestId);
    return late;
  }

  /** The next step, or undefined when nothing runs. */
  schedule(): Step | undefined {
    const request = this.#running[0];
    if (request === undefined) return undefined;
    const left = request.tokenCount - request.computedCount;
    const untilBoundary = this.#limits.chunkTokens - (request.computedCount % this.#limits.chunkTokens);
    return { request, tokens: Math.min(left, left > 1 ? untilBoundary : 1) };
  }

  /** After a step: its tokens are computed, and the request goes to the end of the line. */
  update(step: Step): void {
    step.request.computedCount += step.tokens;
    const index = this.#running.indexOf(step.request);
    if (index >= 0) this.#running.push(...this.#running.splice(index, 1));
  }

  isRunning(request: ScheduledRequest): boolean {
    return this.#running.includes(request);
  }

  /** In order of arrival: a large request at the head is not overtaken for ever by small ones. */
  #admit(): void {
    for (let next = this.#waiting[0]; next !== undefined; next = this.#waiting[0]) {
      const { runningMax, cacheTokensMax } = this.#limits;
      if (this.#running.length >= runningMax) return;
      if (this.cacheTokensReserved + next.cacheTokens > cacheTokensMax) return;
      this.#waiting.shift();
      // A newcomer runs next: its first chunk is what its client waits for.
      this.#running.unshift(next);
    }
  }
}
