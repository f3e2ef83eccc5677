/** What this isolate has learned of one backend: whether it answers, how busy it is, which masks it works with. */
import type { BackendState, Load, LoadReport } from '../../../shared/backends.ts';
import { HOT_MASKS_MAX } from '../../../shared/backends.ts';
import { type Breaker, createBreaker } from './breaker.ts';

export type LiveBackend = {
  readonly id: string;
  readonly url: string;
  readonly regions: readonly string[];
  readonly weight: number;
};

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
