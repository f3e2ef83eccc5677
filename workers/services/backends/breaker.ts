/**
 * A circuit breaker: after some failures in a row a backend is left alone for a while, then one request at a time
 * tries it, and some successes make it whole again.
 *
 * Libraries for this (cockatiel, opossum) make requests wait for the trial of another one. Here a request has
 * other backends to go to, and in workerd a trial may vanish with the request that made it: so a trial is a lease
 * that runs out, and nobody waits.
 */

export type BreakerPolicy = {
  /** Failures in a row that open it. */
  readonly failuresMax: number;
  readonly open_ms: number;
  /** Successes in a row that close it again. */
  readonly successesMin: number;
  /** A trial that has said nothing for so long is gone. */
  readonly trial_ms: number;
};

export const BREAKER: BreakerPolicy = { failuresMax: 5, open_ms: 30_000, successesMin: 2, trial_ms: 30_000 };

export type BreakerName = 'closed' | 'open' | 'half_open';

export interface Breaker {
  state(now_ms: number): BreakerName;
  /** Whether a request may go there now. Takes the one trial of a half-open breaker: ask only to use it. */
  admit(now_ms: number): boolean;
  /** As `admit`, without taking anything. */
  admits(now_ms: number): boolean;
  succeeded(): void;
  /** `unreachable`: it gave no answer at all, so that hearing of it by other ways is news. */
  failed(now_ms: number, unreachable: boolean): void;
  /** A request that says nothing about the backend (its client left) gives its trial back. */
  released(): void;
  /** It answered a question about its load: a success, if it was only unreachable, and no need to wait longer. */
  heard(): void;
  /** When an open breaker will let a request through, in ms from now; 0 when it does already. */
  wait_ms(now_ms: number): number;
}

export function createBreaker(policy: BreakerPolicy = BREAKER): Breaker {
  let failures = 0;
  let successes = 0;
  /** Undefined while closed. */
  let opened: { until_ms: number; unreachable: boolean } | undefined;
  let trialUntil_ms = 0;

  const succeeded = (): void => {
    failures = 0;
    trialUntil_ms = 0;
    if (opened === undefined || ++successes < policy.successesMin) return;
    opened = undefined;
    successes = 0;
  };

  const state = (now_ms: number): BreakerName =>
    opened === undefined ? 'closed' : now_ms < opened.until_ms ? 'open' : 'half_open';
  const admits = (now_ms: number): boolean => {
    switch (state(now_ms)) {
      case 'closed':
        return true;
      case 'open':
        return false;
      case 'half_open':
        return now_ms >= trialUntil_ms;
    }
  };
  return {
    state,
    admits,
    admit(now_ms) {
      if (!admits(now_ms)) return false;
      if (opened !== undefined) trialUntil_ms = now_ms + policy.trial_ms;
      return true;
    },
    succeeded,
    failed(now_ms, unreachable) {
      trialUntil_ms = 0;
      successes = 0;
      failures++;
      if (opened === undefined && failures < policy.failuresMax) return;
      opened = { until_ms: now_ms + policy.open_ms, unreachable };
    },
    released() {
      trialUntil_ms = 0;
    },
    heard() {
      if (opened?.unreachable !== true) return;
      opened.until_ms = 0;
      succeeded();
    },
    wait_ms: (now_ms) => Math.max(0, (opened?.until_ms ?? 0) - now_ms),
  };
}
