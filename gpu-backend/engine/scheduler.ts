/**
 * Who runs next. It knows requests and token counts and never touches a tensor: `schedule` says what the next
 * step computes, `update` hears what came of it.
 *
 * There is no prefill or decode phase (as in vLLM v1): a request has tokens, some of them computed, and every
 * step brings the computed ones closer to all. Tenants take turns, one turn a step, and so do a tenant's requests among
 * themselves: a long prompt delays the others by one chunk and no more, and a tenant with many requests delays another
 * tenant as little as with one. A step that takes as long as several, far into a long prompt or with its tokens scored,
 * counts as so many turns: a short answer waits for it once, and not before each of its tokens. Chunks start at multiples of
 * the chunk size, whatever else runs: a request's result never depends on its neighbours.
 *
 * Everybody's wait is bounded, whoever else comes and goes:
 * - After a tenant's step that counted as c turns, each other tenant that runs has at most c steps before its next one,
 *   and at most c + 1 newcomers have one.
 * - After a request's step, each other running request of its tenant has at most one before its next one, and at most two
 *   newcomers have one.
 * - In the waiting line, a tenant's requests go in as they came. Tenants with fewer running requests go first. While a
 *   tenant has a place left in its share, at most `runningMax` requests pass its first one, and after them one of each
 *   tenant that was passed by as many before.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';

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
  /** When the whole answer began; the request may be a late choice of it. */
  readonly answerSince_ms: number;
  /** Prompt and generated tokens so far. */
  tokenCount: number;
  computedCount: number;
};

/** A tenant's share of the running places: whoever comes later finds a place, though a tenant's answers are long. */
export const TENANT_SHARE_MAX = 3 / 4;

/** What a step of a full chunk takes at a prompt's start, on two cores: all that is shorter is one turn as well. */
const TURN_ms = 70;
/** A machine that slept, or stood still, makes nobody wait for ever. */
const STEP_TURNS_MAX = 32;

export type Step = { readonly request: ScheduledRequest; readonly tokens: number };

export class Scheduler {
  readonly #limits: SchedulerLimits;
  /** In order of arrival. */
  readonly #waiting: ScheduledRequest[] = [];
  readonly #running: ScheduledRequest[] = [];
  readonly #tenants = new Turns<string>();
  /** The turns of each running tenant's requests among themselves. */
  readonly #own = new Map<string, Turns<ScheduledRequest>>();
  /** How many later requests of others went past each waiting tenant since its own last request went in. */
  readonly #passedBy = new Map<string, number>();

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
   * In a full line a request takes the place of the newest request of the tenants that have most there, which is
   * returned. @throws MaskrouteError `queue_full` when the newest is this request itself, or `context_length_exceeded` when
   * it could never fit.
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
    const displaced = this.#newestOfMost();
    this.#leaveLine(displaced);
    if (displaced === request) throw queueFull(waitingMax);
    return displaced;
  }

  /**
   * Of the tenants with most requests in the line. A choice of an answer that began long ago is no newcomer, though it
   * comes late: else newcomers would keep it out for ever.
   */
  #newestOfMost(): ScheduledRequest {
    const counts = countsByTenant(this.#waiting);
    const most = Math.max(...counts.values());
    return this.#waiting
      .filter(({ tenant }) => counts.get(tenant) === most)
      .reduce((newest, one) => (one.answerSince_ms >= newest.answerSince_ms ? one : newest));
  }

  /** Takes a request out, wherever it is; room is given on at once. */
  remove(requestId: string): void {
    this.#take(requestId);
    this.#admit();
  }

  #take(requestId: string): void {
    const of = (list: readonly ScheduledRequest[]) => list.findIndex((one) => one.requestId === requestId);
    const place = of(this.#waiting);
    if (place >= 0) this.#leaveLine(this.#waiting[place]!);
    const running = of(this.#running);
    if (running < 0) return;
    const [request] = this.#running.splice(running, 1);
    const { tenant } = request!;
    const own = this.#own.get(tenant)!;
    own.leave(request!);
    if (own.size > 0) return;
    this.#own.delete(tenant);
    this.#tenants.leave(tenant);
  }

  #leaveLine(request: ScheduledRequest): void {
    this.#waiting.splice(this.#waiting.indexOf(request), 1);
    if (!this.#waiting.some(({ tenant }) => tenant === request.tenant)) this.#passedBy.delete(request.tenant);
  }

  /** Requests that waited too long, taken out of the line. */
  expire(now_ms: number): ScheduledRequest[] {
    const late = this.#waiting.filter(
      (request) => now_ms - request.arrivedAt_ms > this.#limits.queueTimeout_ms,
    );
    // All of them first: the room that one leaves is for those that stay.
    for (const { requestId } of late) this.#take(requestId);
    if (late.length > 0) this.#admit();
    return late;
  }

  /** Whose step is next, or undefined when nothing runs. */
  get next(): ScheduledRequest | undefined {
    const tenant = this.#tenants.next;
    return tenant === undefined ? undefined : this.#own.get(tenant)!.next;
  }

  /** The next step, or undefined when nothing runs. It is its request's turn from now on. */
  schedule(): Step | undefined {
    const request = this.next;
    if (request === undefined) return undefined;
    this.#tenants.begin(request.tenant);
    this.#own.get(request.tenant)!.begin(request);
    const left = request.tokenCount - request.computedCount;
    const untilBoundary = this.#limits.chunkTokens - (request.computedCount % this.#limits.chunkTokens);
    return { request, tokens: Math.min(left, left > 1 ? untilBoundary : 1) };
  }

  /** After a step: its tokens are computed. */
  update(step: Step): void {
    step.request.computedCount += step.tokens;
  }

  /** After every step, also when it failed, was cancelled or was the request's last: what it took of everybody's time. */
  charge(request: ScheduledRequest, took_ms: number): void {
    const turns = Math.min(Math.max(1, Math.round(took_ms / TURN_ms)), STEP_TURNS_MAX);
    this.#tenants.charge(request.tenant, turns);
    // One, however long it took: who sends many short requests would never have to wait for what each of them took.
    this.#own.get(request.tenant)?.charge(request, 1);
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
      this.#countPassed(next);
      this.#leaveLine(next);
      this.#running.push(next);
      if (!this.#own.has(next.tenant)) {
        this.#own.set(next.tenant, new Turns());
        this.#tenants.enter(next.tenant);
      }
      this.#own.get(next.tenant)!.enter(next);
    }
  }

  /** A tenant that has its share of places waits for its own requests, and is passed by nobody. */
  #countPassed(next: ScheduledRequest): void {
    const eligible = this.#eligible();
    this.#passedBy.delete(next.tenant);
    for (const tenant of new Set(eligible.map((request) => request.tenant))) {
      if (tenant === next.tenant) continue;
      const passed = (this.#passedBy.get(tenant) ?? 0) + 1;
      // Deleted first: who has waited for longer with so many stands before others.
      if (passed === this.#limits.runningMax) this.#passedBy.delete(tenant);
      this.#passedBy.set(tenant, passed);
    }
  }

  /** Of the line: those whose tenant has a place left in its share. */
  #eligible(): ScheduledRequest[] {
    const running = countsByTenant(this.#running);
    const tenantMax = Math.ceil(TENANT_SHARE_MAX * this.#limits.runningMax);
    return this.#waiting.filter(({ tenant }) => (running.get(tenant) ?? 0) < tenantMax);
  }

  /**
   * The first request of a tenant that was passed by as many as there are places; else the request that has waited
   * longest, among those of the tenants with fewest requests running.
   */
  #nextWaiting(): ScheduledRequest | undefined {
    const eligible = this.#eligible();
    for (const [tenant, passed] of this.#passedBy) {
      if (passed < this.#limits.runningMax) continue;
      const first = eligible.find((request) => request.tenant === tenant);
      if (first !== undefined) return first;
    }
    const running = countsByTenant(this.#running);
    const count = ({ tenant }: ScheduledRequest) => running.get(tenant) ?? 0;
    const fewest = Math.min(...eligible.map(count));
    return eligible.find((request) => count(request) === fewest);
  }
}

/**
 * Turns in rounds (start-time fair queueing: Goyal, Vin and Cheng, 1996). Whoever takes a turn that counts as c is due
 * again c rounds later, behind all that are due in that round. Of those who come in a round, the first is next: a client
 * waits for its first token. The others are due in the round after it at the earliest: no number of newcomers holds a
 * round open, so that it gives each place one turn, and one newcomer.
 */
class Turns<Key> {
  /** Of the turn that was taken last. */
  #round = 0;
  /** The last round with a newcomer that was next. */
  #welcomed = -1;
  /** The round in which each is due; of the same round, who was put in first is next. */
  readonly #due = new Map<Key, number>();
  /** Of those that left after a turn that counted as several: who leaves and comes back owes it still. */
  readonly #owed = new Map<Key, number>();

  get size(): number {
    return this.#due.size;
  }

  get next(): Key | undefined {
    const soonest = Math.min(...this.#due.values());
    for (const [key, round] of this.#due) if (round === soonest) return key;
    return undefined;
  }

  enter(key: Key): void {
    const isNext = this.#welcomed < this.#round && !this.#owed.has(key);
    if (isNext) this.#welcomed = this.#round;
    // Half a round before all others.
    this.#due.set(key, isNext ? this.#round - 0.5 : Math.max(this.#round + 1, this.#owed.get(key) ?? 0));
    this.#owed.delete(key);
  }

  leave(key: Key): void {
    this.#owed.set(key, this.#due.get(key)!);
    this.#due.delete(key);
    this.#forget();
  }

  begin(key: Key): void {
    this.#round = Math.max(this.#round, this.#due.get(key)!);
  }

  /** The turn that began last counts as so many; its taker may have left since, and even have come back. */
  charge(key: Key, turns: number): void {
    const place = this.#due.has(key) ? this.#due : this.#owed;
    const due = Math.max(place.get(key) ?? 0, this.#round + turns);
    place.delete(key);
    place.set(key, due);
    this.#forget();
  }

  /** Who left owes nothing once everybody has had as many turns, or is gone. */
  #forget(): void {
    for (const [key, round] of this.#owed) {
      if (this.#due.size === 0 || round <= this.#round + 1) this.#owed.delete(key);
    }
  }
}

function countsByTenant(requests: readonly ScheduledRequest[]): Map<string, number> {
  const counts = new Map<string, number>();
  for (const { tenant } of requests) counts.set(tenant, (counts.get(tenant) ?? 0) + 1);
  return counts;
}

export const queueFull = (waitingMax: number): MaskrouteError =>
  new MaskrouteError('queue_full', `${waitingMax} requests are waiting already.`, { retryAfter_s: 1 });
