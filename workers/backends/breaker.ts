/**
 * A circuit breaker: after some failures in a row a backend is left alone for a while, then one request at a time
 * tries it, and some successes make it whole again.
 *
 * Libraries for this (cockatiel, opossum) make requests wait for the trial of another one. Here a request has
 * other backends to go to, and in workerd a trial may vanish with the request that made it: so a trial is a lease
 * that runs out, and nobody waits.
 */

type BreakerPolicy = {
  /** Failures in a row that open it. */
  readonly failuresMax: number;
  readonly open_ms: number;
  /** Successes in a row that close it again. */
  readonly successesMin: number;
  /** A trial that has said nothing for so long is gone. */
  readonly trial_ms: number;
};

const BREAKER: BreakerPolicy = { failuresMax: 5, open_ms: 30_000, successesMin: 2, trial_ms: 30_000 };

export class Breaker {
  readonly #policy: BreakerPolicy;
  #failures = 0;
  #successes = 0;
  /** Undefined while closed. */
  #opened: { readonly until_ms: number; readonly unreachable: boolean } | undefined;
  #trialUntil_ms = 0;

  constructor(policy = BREAKER) {
    this.#policy = policy;
  }

  state(now_ms: number): 'closed' | 'open' | 'half_open' {
    if (this.#opened === undefined) return 'closed';
    return now_ms < this.#opened.until_ms ? 'open' : 'half_open';
  }

  /** Whether a request may go there now. */
  admits(now_ms: number): boolean {
    switch (this.state(now_ms)) {
      case 'closed':
        return true;
      case 'open':
        return false;
      case 'half_open':
        return now_ms >= this.#trialUntil_ms;
    }
  }

  /** As `admits`, and takes the one trial of a half-open breaker: ask only to use it. */
  admit(now_ms: number): boolean {
    if (!this.admits(now_ms)) return false;
    if (this.#opened !== undefined) this.#trialUntil_ms = now_ms + this.#policy.trial_ms;
    return true;
  }

  succeeded(): void {
    this.#failures = 0;
    this.#trialUntil_ms = 0;
    if (this.#opened === undefined || ++this.#successes < this.#policy.successesMin) return;
    this.#opened = undefined;
    this.#successes = 0;
  }

  /** `unreachable`: it gave no answer at all, so that hearing of it by other ways is news. */
  failed(now_ms: number, unreachable: boolean): void {
    this.#trialUntil_ms = 0;
    this.#successes = 0;
    this.#failures++;
    if (this.#opened === undefined && this.#failures < this.#policy.failuresMax) return;
    this.#opened = { until_ms: now_ms + this.#policy.open_ms, unreachable };
  }

  /** A request that says nothing about the backend (its client left) gives its trial back. */
  released(): void {
    this.#trialUntil_ms = 0;
  }

  /** It answered a question about its load: a success, if it was only unreachable, and no need to wait longer. */
  heard(): void {
    if (this.#opened?.unreachable !== true) return;
    this.#opened = { until_ms: 0, unreachable: true };
    this.succeeded();
  }

  /** When an open breaker will let a request through, in ms from now; 0 when it does already. */
  wait_ms(now_ms: number): number {
    return Math.max(0, (this.#opened?.until_ms ?? 0) - now_ms);
  }
}
