/**
 * Fair queueing for places in a step: tenants take turns, and so do the requests of each tenant. There is a lane for tokens
 * and a lane for pieces of prompts.
 *
 * Bounds:
 * - After a tenant's step that counted as c turns, its next step waits for at most c steps of each other waiting tenant and
 *   for at most c + 1 newcomers.
 * - After a request's step, its next one waits for at most one step of each other waiting request of its tenant and for at
 *   most two newcomers.
 */

type Member = { readonly tenant: string };

export class Lane<Request extends Member> {
  readonly #tenants = new Turns<string>();
  readonly #own = new Map<string, Turns<Request>>();

  enter(request: Request): void {
    const { tenant } = request;
    if (!this.#own.has(tenant)) {
      this.#own.set(tenant, new Turns());
      this.#tenants.enter(tenant);
    }
    this.#own.get(tenant)!.enter(request);
  }

  /** @returns false when the request is not in this lane. */
  leave(request: Request): boolean {
    const { tenant } = request;
    const own = this.#own.get(tenant);
    if (own?.leave(request) !== true) return false;
    if (own.size === 0) {
      this.#own.delete(tenant);
      this.#tenants.leave(tenant);
    }
    return true;
  }

  /** The first request of each tenant, in the order of the tenants, then the second request of each, and so on. */
  get inOrder(): Request[] {
    const queues = this.#tenants.inOrder.map((tenant) => this.#own.get(tenant)!.inOrder);
    const order: Request[] = [];
    for (let place = 0; queues.some((queue) => place < queue.length); place++) {
      for (const queue of queues) if (place < queue.length) order.push(queue[place]!);
    }
    return order;
  }

  begin(request: Request): void {
    this.#tenants.begin(request.tenant);
    this.#own.get(request.tenant)!.begin(request);
  }

  /** Call it after each step of a request, also when the step failed, was cancelled or was the last. */
  charge(request: Request, turns: number): void {
    this.#tenants.charge(request.tenant, turns);
    // Always one turn: a charge of several would end with a short request and hit only long ones.
    this.#own.get(request.tenant)?.charge(request, 1);
  }
}

/**
 * Start-time fair queueing (Goyal, Vin and Cheng, 1996). After a turn that counts as c a key is due again c rounds later,
 * behind all others of that round. The first newcomer of a round is next, since a client waits for its first token; other
 * newcomers are due in the following round at the earliest. So newcomers cannot prolong a round: it has one turn for each
 * key, and one newcomer.
 */
class Turns<Key> {
  /** The round of the latest turn. */
  #round = 0;
  /** The last round in which a newcomer was put first. */
  #welcomed = -1;
  /** The round in which each key is due; within a round, in order of insertion. */
  readonly #due = new Map<Key, number>();
  /** The due round of keys that left, so that leaving and coming back does not skip the wait after a long turn. */
  readonly #owed = new Map<Key, number>();

  get size(): number {
    return this.#due.size;
  }

  /** All keys, the next one first. */
  get inOrder(): Key[] {
    // The sort is stable: keys of one round keep their order of insertion.
    return [...this.#due].sort(([, a], [, b]) => a - b).map(([key]) => key);
  }

  enter(key: Key): void {
    const isNext = this.#welcomed < this.#round && !this.#owed.has(key);
    if (isNext) this.#welcomed = this.#round;
    // Half a round earlier than all others of this round.
    this.#due.set(key, isNext ? this.#round - 0.5 : Math.max(this.#round + 1, this.#owed.get(key) ?? 0));
    this.#owed.delete(key);
  }

  /** @returns false when the key is not there. */
  leave(key: Key): boolean {
    const due = this.#due.get(key);
    if (due === undefined) return false;
    this.#owed.set(key, due);
    this.#due.delete(key);
    this.#forget();
    return true;
  }

  begin(key: Key): void {
    this.#round = Math.max(this.#round, this.#due.get(key)!);
  }

  /** The key's latest turn counts as `turns`; the key may have left since, and may have come back. */
  charge(key: Key, turns: number): void {
    const place = this.#due.has(key) ? this.#due : this.#owed;
    const due = Math.max(place.get(key) ?? 0, this.#round + turns);
    place.delete(key);
    place.set(key, due);
    this.#forget();
  }

  /** Forgets the debts of keys that left, once the others have had as many turns or are gone. */
  #forget(): void {
    for (const [key, round] of this.#owed) {
      if (this.#due.size === 0 || round <= this.#round + 1) this.#owed.delete(key);
    }
  }
}
