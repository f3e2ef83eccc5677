/**
 * Who runs next. It knows requests and token counts and never touches a tensor: `schedule` says what the next
 * step computes, `update` hears what came of it.
 *
 * There is no prefill or decode phase (as in vLLM v1): a request has tokens, some of them computed, and every
 * step brings the computed ones closer to all. Tenants take turns, one turn a step, and so do a tenant's requests among
 * themselves: a long prompt delays the others by one chunk and no more, and many requests of one tenant cost another
 * no more than one would. A step that takes as long as several, far into a long prompt or with its tokens scored, counts
 * as so many turns: a short answer waits for it once, and not before each of its tokens. Chunks start at multiples of
 * the chunk size, whatever else runs: a request's result never depends on its neighbours.
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
  readonly tenant: string;
  /** The most tokens its cache may come to hold: reserved when it starts, so it never has to stop half-way. */
  readonly cacheTokens: number;
  readonly arrivedAt_ms: number;
  /** Prompt and generated tokens so far. */
  tokenCount: number;
  computedCount: number;
};

/** Of the running places: whoever comes later finds one, though a tenant's answers are long. */
const TENANT_SHARE_MAX = 3 / 4;

/** What a step of a full chunk takes at a prompt's start, on two cores: all that is shorter is one turn as well. */
const TURN_ms = 70;
/** A machine that slept, or stood still, makes nobody wait for ever. */
const STEP_TURNS_MAX = 32;

export type Step = { readonly request: ScheduledRequest; readonly tokens: number };

export class Scheduler {
  readonly #limits: SchedulerLimits;
  readonly #waiting: ScheduledRequest[] = [];
  /** Of the tenants that had the fewest turns, the next to run comes first. */
  readonly #running: ScheduledRequest[] = [];
  /** What tenants have had: those that run, and those that left with more than somebody who runs. */
  readonly #turns = new Map<string, number>();

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

  /**
   * In a full line a request takes the place of the newest one of the tenant that has most there, which is returned.
   * @throws MaskrouteError `queue_full` when that would be itself, or `context_length_exceeded` for one that could never
   * fit.
   */
  add(request: ScheduledRequest): ScheduledRequest | undefined {
    const { waitingMax, cacheTokensMax } = this.#limits;
    if (request.cacheTokens > cacheTokensMax) {
      throw new MaskrouteError(
        'context_length_exceeded',
        `The request needs ${request.cacheTokens} tokens of cache; this server has ${cacheTokensMax}.`,
      );
    }
    this.#waiting.push(request);
    this.#admit();
    if (this.#waiting.length <= waitingMax) return undefined;
    const displaced = this.#newestOfMost(request.tenant);
    this.#waiting.splice(this.#waiting.indexOf(displaced), 1);
    if (displaced === request) throw queueFull(waitingMax);
    return displaced;
  }

  /** Of the tenant with most requests in the line; of several, of `tenant`. */
  #newestOfMost(tenant: string): ScheduledRequest {
    const counts = countsByTenant(this.#waiting);
    const most = Math.max(...counts.values());
    const has = (candidate: string) => counts.get(candidate) === most;
    return this.#waiting.findLast((request) =>
      has(tenant) ? request.tenant === tenant : has(request.tenant),
    )!;
  }

  /** Takes a request out, wherever it is; room is given on at once. */
  remove(requestId: string): void {
    for (const list of [this.#waiting, this.#running]) {
      const index = list.findIndex((request) => request.requestId === requestId);
      if (index >= 0) list.splice(index, 1);
    }
    this.#forget();
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

  /** Whose step is next, or undefined when nothing runs. */
  get next(): ScheduledRequest | undefined {
    const fewest = this.#fewestTurns();
    return this.#running.find(({ tenant }) => this.#turns.get(tenant) === fewest);
  }

  /** The next step, or undefined when nothing runs. */
  schedule(): Step | undefined {
    const request = this.next;
    if (request === undefined) return undefined;
    const left = request.tokenCount - request.computedCount;
    const untilBoundary = this.#limits.chunkTokens - (request.computedCount % this.#limits.chunkTokens);
    return { request, tokens: Math.min(left, left > 1 ? untilBoundary : 1) };
  }

  /** After a step: its tokens are computed, and its tenant goes to the end of the line, the request last of all. */
  update(step: Step): void {
    const { request } = step;
    request.computedCount += step.tokens;
    if (!this.#running.includes(request)) return;
    const others = this.#running.filter(({ tenant }) => tenant !== request.tenant);
    const own = this.#running.filter((one) => one.tenant === request.tenant && one !== request);
    this.#running.splice(0, this.#running.length, ...others, ...own, request);
  }

  /** After a step, also one that failed or was cancelled: what it took of everybody's time. */
  charge(tenant: string, took_ms: number): void {
    const turns = Math.min(Math.max(1, Math.round(took_ms / TURN_ms)), STEP_TURNS_MAX);
    this.#turns.set(tenant, (this.#turns.get(tenant) ?? 0) + turns);
    this.#forget();
  }

  isRunning(request: ScheduledRequest): boolean {
    return this.#running.includes(request);
  }

  /** The next one is waited for when it does not fit: a large request is not overtaken for ever by small ones. */
  #admit(): void {
    for (let next = this.#nextWaiting(); next !== undefined; next = this.#nextWaiting()) {
      const { runningMax, cacheTokensMax } = this.#limits;
      if (this.#running.length >= runningMax) return;
      if (this.cacheTokensReserved + next.cacheTokens > cacheTokensMax) return;
      this.#waiting.splice(this.#waiting.indexOf(next), 1);
      // A newcomer is its tenant's next: its first chunk is what its client waits for. A tenant that runs already has
      // its turn when it has it.
      const { tenant } = next;
      const own = this.#running.findIndex((request) => request.tenant === tenant);
      if (own < 0) this.#turns.set(tenant, Math.max(this.#turns.get(tenant) ?? 0, this.#fewestTurns()));
      this.#running.splice(Math.max(own, 0), 0, next);
    }
  }

  /** Of those that run; 0 when nobody does. */
  #fewestTurns(): number {
    if (this.#running.length === 0) return 0;
    return Math.min(...this.#running.map(({ tenant }) => this.#turns.get(tenant)!));
  }

  /** Who left owes nothing once the others have had as many turns, or are gone. */
  #forget(): void {
    const running = countsByTenant(this.#running);
    const fewest = this.#fewestTurns();
    for (const [tenant, turns] of this.#turns) {
      if (running.has(tenant)) continue;
      if (running.size === 0 || turns <= fewest) this.#turns.delete(tenant);
    }
  }

  /** Of the tenants with fewest requests running, the one that has waited longest; none of who has its share of places. */
  #nextWaiting(): ScheduledRequest | undefined {
    const running = countsByTenant(this.#running);
    const count = ({ tenant }: ScheduledRequest) => running.get(tenant) ?? 0;
    const tenantMax = Math.ceil(TENANT_SHARE_MAX * this.#limits.runningMax);
    const fewest = Math.min(tenantMax - 1, ...this.#waiting.map(count));
    return this.#waiting.find((request) => count(request) <= fewest);
  }
}

function countsByTenant(requests: readonly ScheduledRequest[]): Map<string, number> {
  const counts = new Map<string, number>();
  for (const { tenant } of requests) counts.set(tenant, (counts.get(tenant) ?? 0) + 1);
  return counts;
}

export const queueFull = (waitingMax: number): MaskrouteError =>
  new MaskrouteError('queue_full', `${waitingMax} requests are waiting already.`, { retryAfter_s: 1 });
