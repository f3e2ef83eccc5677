/** What this isolate has learned of one backend: whether it answers, how busy it is, which masks it works with. */
import {
  type BackendState,
  HOT_MASKS_MAX,
  type Load,
  type LoadReport,
} from '../../shared/wire/backend-load.ts';

/*
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

type BreakerName = 'closed' | 'open' | 'half_open';

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

export type LiveBackend = {
  readonly id: string;
  readonly url: string;
  readonly regions: readonly string[];
  readonly weight: number;
};

/** With what this isolate has learned of it. */
export type KnownBackend = LiveBackend & { readonly seen: Observed };

export interface Observed {
  readonly breaker: Breaker;
  /** The models that it lists; undefined while unknown. */
  models: ReadonlySet<string> | undefined;
  readonly load: number;
  readonly waiting: number;
  isHot(mask: string): boolean;
  /** It said so not long ago, and has neither said otherwise nor answered a completion since. */
  readonly isDraining: boolean;
  /** A request goes there; call the result when its headers are back or it failed. */
  begin(mask: string): () => void;
  /** From the header of an answer. */
  reported(load: Load, now_ms: number): void;
  /** It refused a request because it stops; or it answered one, so that another process has its address. */
  drains(is: boolean, now_ms: number): void;
  /** From `GET /v1/load`. */
  probed(report: LoadReport, now_ms: number): void;
  /** Takes the right to ask for the load now: one question at a time, none while a report is young. */
  takeProbe(now_ms: number): boolean;
  summary(now_ms: number): BackendState;
}

/** A report older than this says nothing; the requests that this isolate has under way still do. */
const REPORT_ms = 10_000;
const PROBE_EVERY_ms = 2_000;
/** The sooner it is known to be back, the fewer requests are refused. */
const PROBE_EVERY_WHILE_OPEN_ms = 500;

export function observe(): Observed {
  const breaker = createBreaker();
  /** The latest used is last. */
  const hot = new Set<string>();
  let inFlight = 0;
  let report: { load: Load; at_ms: number } | undefined;
  /** When it last said that it drains; undefined: it does not. */
  let drainingAt_ms: number | undefined;
  let askedAt_ms = Number.NEGATIVE_INFINITY;

  const remember = (mask: string): void => {
    hot.delete(mask);
    if (hot.size >= HOT_MASKS_MAX) hot.delete(hot.values().next().value!);
    hot.add(mask);
  };
  const fresh = (now_ms: number): Load | undefined =>
    report !== undefined && now_ms - report.at_ms < REPORT_ms ? report.load : undefined;

  const drains = (is: boolean, now_ms: number): void => {
    drainingAt_ms = is ? now_ms : undefined;
  };

  return {
    breaker,
    models: undefined,
    get load() {
      const load = fresh(Date.now());
      return Math.max(inFlight, (load?.running ?? 0) + (load?.waiting ?? 0));
    },
    get waiting() {
      return fresh(Date.now())?.waiting ?? 0;
    },
    isHot: (mask) => hot.has(mask),
    get isDraining() {
      return drainingAt_ms !== undefined && Date.now() - drainingAt_ms < REPORT_ms;
    },
    drains,
    begin(mask) {
      remember(mask);
      inFlight++;
      let ended = false;
      return () => {
        if (!ended) inFlight--;
        ended = true;
      };
    },
    reported(load, now_ms) {
      report = { load, at_ms: now_ms };
    },
    probed(answer, now_ms) {
      report = { load: answer, at_ms: now_ms };
      drains(answer.draining, now_ms);
      if (!answer.draining) breaker.heard();
      // What it holds no longer (it was started again, say) is hot no longer.
      hot.clear();
      for (const mask of answer.hot_masks.toReversed()) remember(mask);
    },
    takeProbe(now_ms) {
      const isClosed = breaker.state(now_ms) === 'closed';
      if (now_ms - askedAt_ms < (isClosed ? PROBE_EVERY_ms : PROBE_EVERY_WHILE_OPEN_ms)) return false;
      if (isClosed && report !== undefined && now_ms - report.at_ms < PROBE_EVERY_ms) return false;
      askedAt_ms = now_ms;
      return true;
    },
    summary: (now_ms) => ({
      breaker: breaker.state(now_ms),
      in_flight: inFlight,
      running: fresh(now_ms)?.running ?? null,
      waiting: fresh(now_ms)?.waiting ?? null,
      reported_at: report === undefined ? null : new Date(report.at_ms).toISOString(),
      hot_masks: [...hot].reverse(),
    }),
  };
}
