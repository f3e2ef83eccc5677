/**
 * The requests that wait to run: who is next, and whom a full queue drops.
 *
 * A tenant's requests keep their order, and tenants with fewer running requests go first. No tenant starves: while a tenant is
 * below its share of places, at most `runningMax` requests overtake its first one; then it is next, after other tenants that
 * were overtaken as often before.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';

/** Largest share of the running places for one tenant, so that others find a place while its answers are long. */
export const TENANT_SHARE_MAX = 3 / 4;

type Waiting = {
  readonly requestId: string;
  readonly tenant: string;
  readonly arrivedAt_ms: number;
  readonly answerSince_ms: number;
  readonly preemptions: number;
};

/** `runningMax`: how many requests run at a time. */
export class Queue<Request extends Waiting> {
  readonly #runningMax: number;
  /** Preempted ones, then the others in order of arrival. */
  readonly #waiting: Request[] = [];
  /** For each waiting tenant: how many requests of others overtook its own since its last admission. */
  readonly #passedBy = new Map<string, number>();

  constructor(runningMax: number) {
    this.#runningMax = runningMax;
  }

  get size(): number {
    return this.#waiting.length;
  }

  add(request: Request): void {
    this.#waiting.push(request);
  }

  /** A preempted request is the next one. */
  addPreempted(request: Request): void {
    this.#waiting.unshift(request);
  }

  /** Does nothing if it is not here. */
  remove(requestId: string): void {
    const request = this.#waiting.find((one) => one.requestId === requestId);
    if (request !== undefined) this.#leave(request);
  }

  /**
   * Removes and returns the newest request of the tenants with most requests in the queue. Age counts from the start of the
   * whole answer; otherwise new requests could keep a late choice out for ever.
   */
  removeNewest(): Request {
    // Preempted requests are never dropped.
    const newcomers = this.#waiting.filter(({ preemptions }) => preemptions === 0);
    const counts = countsByTenant(newcomers);
    const most = Math.max(...counts.values());
    const found = newcomers
      .filter(({ tenant }) => counts.get(tenant) === most)
      .reduce((newest, one) => (one.answerSince_ms >= newest.answerSince_ms ? one : newest));
    this.#leave(found);
    return found;
  }

  /** Removes and returns the requests that came before `until_ms`, except those that ran already. */
  removeOld(until_ms: number): Request[] {
    const old = this.#waiting.filter(
      ({ arrivedAt_ms, preemptions }) => preemptions === 0 && arrivedAt_ms < until_ms,
    );
    for (const request of old) this.#leave(request);
    return old;
  }

  /**
   * The next request to admit: a preempted one; else the first one of a tenant that was overtaken `runningMax` times; else
   * the longest waiting among the tenants with fewest running requests.
   */
  next(running: readonly Request[]): Request | undefined {
    const preempted = this.#waiting.find(({ preemptions }) => preemptions > 0);
    if (preempted !== undefined) return preempted;
    const eligible = this.#eligible(running);
    for (const [tenant, passed] of this.#passedBy) {
      if (passed < this.#runningMax) continue;
      const first = eligible.find((request) => request.tenant === tenant);
      if (first !== undefined) return first;
    }
    const counts = countsByTenant(running);
    const count = ({ tenant }: Request) => counts.get(tenant) ?? 0;
    const fewest = Math.min(...eligible.map(count));
    return eligible.find((request) => count(request) === fewest);
  }

  /** Removes the next request. It overtakes every other eligible tenant; a tenant at its share waits for its own only. */
  takeNext(next: Request, running: readonly Request[]): void {
    const eligible = this.#eligible(running);
    this.#passedBy.delete(next.tenant);
    for (const tenant of new Set(eligible.map((request) => request.tenant))) {
      if (tenant === next.tenant) continue;
      const passed = (this.#passedBy.get(tenant) ?? 0) + 1;
      // Re-inserted at the end: tenants that reached the limit earlier come first.
      if (passed === this.#runningMax) this.#passedBy.delete(tenant);
      this.#passedBy.set(tenant, passed);
    }
    this.#leave(next);
  }

  /** Waiting requests of tenants that are below their share of places. */
  #eligible(running: readonly Request[]): Request[] {
    const counts = countsByTenant(running);
    const tenantMax = Math.ceil(TENANT_SHARE_MAX * this.#runningMax);
    return this.#waiting.filter(({ tenant }) => (counts.get(tenant) ?? 0) < tenantMax);
  }

  #leave(request: Request): void {
    this.#waiting.splice(this.#waiting.indexOf(request), 1);
    if (!this.#waiting.some(({ tenant }) => tenant === request.tenant)) this.#passedBy.delete(request.tenant);
  }
}

export function countsByTenant(requests: Iterable<{ readonly tenant: string }>): Map<string, number> {
  const counts = new Map<string, number>();
  for (const { tenant } of requests) counts.set(tenant, (counts.get(tenant) ?? 0) + 1);
  return counts;
}

export const queueFull = (waitingMax: number): MaskrouteError =>
  new MaskrouteError('queue_full', `The queue is full: ${waitingMax} requests are waiting.`, {
    retryAfter_s: 1,
  });
