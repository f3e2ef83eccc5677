/**
 * Turns of tenants, and of each tenant's requests among themselves: who waits for something that not everybody gets at
 * once, a place in a step for a token or for a piece of a prompt.
 *
 * - After a tenant's step that counted as c turns, each other tenant that waits has at most c steps before its next one, and
 *   at most c + 1 newcomers have one.
 * - After a request's step, each other waiting request of its tenant has at most one before its next one, and at most two newcomers
 *   have one.
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

  /** False when it is not in this lane. */
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

  /** Tenants in their order, one request of each, then the second ones. */
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

  /** After each of its steps, also when it failed, was cancelled or was the request's last. */
  charge(request: Request, turns: number): void {
    this.#tenants.charge(request.tenant, turns);
    // One, however long it took: who sends many short requests would never have to wait for what each of them took.
    this.#own.get(request.tenant)?.charge(request, 1);
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

  /** All of them, who is next first. */
  get inOrder(): Key[] {
    // Sorting is stable: of the same round, who was put in first.
    return [...this.#due].sort(([, a], [, b]) => a - b).map(([key]) => key);
  }

  enter(key: Key): void {
    const isNext = this.#welcomed < this.#round && !this.#owed.has(key);
    if (isNext) this.#welcomed = this.#round;
    // Half a round before all others.
    this.#due.set(key, isNext ? this.#round - 0.5 : Math.max(this.#round + 1, this.#owed.get(key) ?? 0));
    this.#owed.delete(key);
  }

  /** False when it is not there. */
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
