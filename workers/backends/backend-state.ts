/** What this isolate has learned of one backend: whether it answers, how busy it is, which models it serves. */
import type { BackendState, Load, LoadReport } from '../../shared/wire/backend-load.ts';
import { Breaker } from './breaker.ts';

export type LiveBackend = {
  readonly id: string;
  readonly url: string;
  readonly regions: readonly string[];
  readonly weight: number;
};

/** With what this isolate has learned of it. */
export type KnownBackend = LiveBackend & { readonly seen: Observed };

/** A report older than this says nothing; the requests that this isolate has under way still do. */
const REPORT_ms = 10_000;
const PROBE_EVERY_ms = 2_000;
/** The sooner it is known to be back, the fewer requests are refused. */
const PROBE_EVERY_WHILE_OPEN_ms = 500;

export class Observed {
  readonly breaker = new Breaker();
  /** The models that it lists; undefined while unknown. */
  models: ReadonlySet<string> | undefined;
  #inFlight = 0;
  #report: { readonly load: Load; readonly at_ms: number } | undefined;
  #hotMasks: readonly string[] = [];
  /** When it last said that it drains; undefined: it does not. */
  #drainingAt_ms: number | undefined;
  #askedAt_ms = Number.NEGATIVE_INFINITY;

  /** Requests that it works on or that wait there. */
  load(now_ms: number): number {
    const load = this.#fresh(now_ms);
    return Math.max(this.#inFlight, (load?.running ?? 0) + (load?.waiting ?? 0));
  }

  waiting(now_ms: number): number {
    return this.#fresh(now_ms)?.waiting ?? 0;
  }

  /** It said so not long ago, and has neither said otherwise nor answered a completion since. */
  isDraining(now_ms: number): boolean {
    return this.#drainingAt_ms !== undefined && now_ms - this.#drainingAt_ms < REPORT_ms;
  }

  /** A request goes there: it is under way until its headers are back or it failed. */
  began(): void {
    this.#inFlight++;
  }

  ended(): void {
    this.#inFlight--;
  }

  /** From the header of an answer. */
  reported(load: Load, now_ms: number): void {
    this.#report = { load, at_ms: now_ms };
  }

  /** It refused a request because it stops; or it answered one, so that another process has its address. */
  drains(is: boolean, now_ms: number): void {
    this.#drainingAt_ms = is ? now_ms : undefined;
  }

  /** From `GET /v1/load`. */
  probed(report: LoadReport, now_ms: number): void {
    this.reported(report, now_ms);
    this.#hotMasks = report.hot_masks;
    this.drains(report.draining, now_ms);
    if (!report.draining) this.breaker.heard();
  }

  /** Takes the right to ask for the load now: one question at a time, none while a report is young. */
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
      in_flight: this.#inFlight,
      running: load?.running ?? null,
      waiting: load?.waiting ?? null,
      reported_at: this.#report === undefined ? null : new Date(this.#report.at_ms).toISOString(),
      hot_masks: [...this.#hotMasks],
    };
  }

  #fresh(now_ms: number): Load | undefined {
    return this.#report !== undefined && now_ms - this.#report.at_ms < REPORT_ms
      ? this.#report.load
      : undefined;
  }
}
