/**
 * What this isolate has learned of one backend: whether it answers, how busy it is, which models it serves. All times are
 * of `steadyNow_ms`.
 */
import type { BackendState, Load, LoadReport } from '../../shared/wire/backend-load.ts';
import { systemTime_ms, UnderWay } from '../base/waiting.ts';
import type { ServedModels } from './choose.ts';

export type LiveBackend = {
  readonly id: string;
  readonly url: string;
  readonly regions: readonly string[];
  readonly weight: number;
};

/** A backend, with what this isolate knows about it. */
export type KnownBackend = LiveBackend & { readonly seen: Observed };

/** Load reports expire after this time; the isolate's own running requests still count. */
const REPORT_ms = 10_000;
const PROBE_EVERY_ms = 2_000;
/**
 * Interval of probes while the breaker is open: the sooner a backend is known to be back, the fewer requests are
 * refused.
 */
const PROBE_EVERY_WHILE_OPEN_ms = 500;

export class Observed {
  readonly breaker = new Breaker();
  /** The models that it lists; undefined while unknown. */
  models: ServedModels | undefined;
  readonly #inFlight = new UnderWay();
  #report: { readonly load: Load; readonly at_ms: number } | undefined;
  /** When it last said that it drains; undefined: it does not. */
  #drainingAt_ms: number | undefined;
  /** When it last left a load probe unanswered; undefined: it has reported its load since. */
  #silentAt_ms: number | undefined;
  #askedAt_ms = Number.NEGATIVE_INFINITY;

  /** Its running and waiting requests. */
  load(now_ms: number): number {
    const load = this.#fresh(now_ms);
    return Math.max(this.#inFlight.count(now_ms), (load?.running ?? 0) + (load?.waiting ?? 0));
  }

  waiting(now_ms: number): number {
    return this.#fresh(now_ms)?.waiting ?? 0;
  }

  /** Whether it reported recently that it drains, and has neither revoked that nor answered a completion since. */
  isDraining(now_ms: number): boolean {
    return this.#drainingAt_ms !== undefined && now_ms - this.#drainingAt_ms < REPORT_ms;
  }

  /** Whether it drains or left a recent load probe unanswered: other backends are asked before it. */
  isAway(now_ms: number): boolean {
    const isSilent = this.#silentAt_ms !== undefined && now_ms - this.#silentAt_ms < REPORT_ms;
    return isSilent || this.isDraining(now_ms);
  }

  /**
   * Counts a request that is sent to it. Call the result when its headers are back or it has failed; it counts for at
   * most `longest_ms`.
   */
  began(longest_ms: number): () => void {
    return this.#inFlight.begin(longest_ms);
  }

  /** Takes the load from the header of an answer. */
  reported(load: Load, now_ms: number): void {
    this.#report = { load, at_ms: now_ms };
    this.#silentAt_ms = undefined;
  }

  /** It left a load probe unanswered. */
  silent(now_ms: number): void {
    this.#silentAt_ms = now_ms;
  }

  /**
   * Sets whether it drains: true when it refused a request because it is stopping, false when it answered one, so that
   * a new process has its address.
   */
  drains(is: boolean, now_ms: number): void {
    this.#drainingAt_ms = is ? now_ms : undefined;
  }

  /** From `GET /v1/load`. */
  probed(report: LoadReport, now_ms: number): void {
    this.reported(report, now_ms);
    this.drains(report.draining, now_ms);
    if (!report.draining) this.breaker.heard();
  }

  /** Whether to ask for its load now, and marks it as asked: one probe at a time, and none while a report is fresh. */
  takeProbe(now_ms: number): boolean {
    const isClosed = this.breaker.state(now_ms) === 'closed';
    if (now_ms - this.#askedAt_ms < (isClosed ? PROBE_EVERY_ms : PROBE_EVERY_WHILE_OPEN_ms)) return false;
    if (isClosed && this.#report !== undefined && now_ms - this.#report.at_ms < PROBE_EVERY_ms) return false;
    this.#askedAt_ms = now_ms;
    return true;
  }

  summary(now_ms: number): BackendState {
    const load = this.#fresh(now_ms);
    return {
      breaker: this.breaker.state(now_ms),
      in_flight: this.#inFlight.count(now_ms),
      running: load?.running ?? null,
      waiting: load?.waiting ?? null,
      reported_at:
        this.#report === undefined ? null : new Date(systemTime_ms(this.#report.at_ms)).toISOString(),
    };
  }

  #fresh(now_ms: number): Load | undefined {
    return this.#report !== undefined && now_ms - this.#report.at_ms < REPORT_ms
      ? this.#report.load
      : undefined;
  }
}

/*
 * A circuit breaker: it opens after some failures in a row; after a while it is half open and admits one trial request
 * at a time; after some successes it closes.
 *
 * Libraries for this (cockatiel, opossum) let requests wait for another request's trial. Here a request can go to other
 * backends, and in workerd a trial may vanish with its request. So a trial is a lease that expires, and nobody waits
 * for it.
 */

/** Failures in a row that open it. */
const FAILURES_MAX = 5;
const OPEN_ms = 30_000;
/** Successes in a row that close it again. */
const SUCCESSES_MIN = 2;
/** A trial without a result expires after this time. */
const TRIAL_ms = 30_000;

export class Breaker {
  #failures = 0;
  #successes = 0;
  /** Undefined while closed. */
  #opened: { readonly until_ms: number; readonly unreachable: boolean } | undefined;
  #trialUntil_ms = 0;

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

  /**
   * Like `admits`, but also takes the single trial of a half-open breaker: call it only for a request that is then
   * sent.
   */
  admit(now_ms: number): boolean {
    if (!this.admits(now_ms)) return false;
    if (this.#opened !== undefined) this.#trialUntil_ms = now_ms + TRIAL_ms;
    return true;
  }

  succeeded(): void {
    this.#failures = 0;
    this.#trialUntil_ms = 0;
    if (this.#opened === undefined || ++this.#successes < SUCCESSES_MIN) return;
    this.#opened = undefined;
    this.#successes = 0;
  }

  /** `unreachable`: the backend gave no answer at all, so a successful probe shows that it is back. */
  failed(now_ms: number, unreachable: boolean): void {
    this.#trialUntil_ms = 0;
    this.#successes = 0;
    this.#failures++;
    if (this.#opened === undefined && this.#failures < FAILURES_MAX) return;
    this.#opened = { until_ms: now_ms + OPEN_ms, unreachable };
  }

  /** Returns the trial of a request that says nothing about the backend (its client hung up). */
  released(): void {
    this.#trialUntil_ms = 0;
  }

  /** The backend answered a load probe: if it was only unreachable, this counts as a success and ends the wait. */
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
