/**
 * Automatic rollback of a version that crosses its publisher's bounds. After each batch of events about a version, its
 * recent requests are judged.
 */
import { AUTO_ROLLBACK, type AutoRollback } from '../../shared/admin/publication-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import type { Database } from '../db/d1.ts';
import { type Judged, judgedOfVersion } from '../db/outcomes.ts';
import { type LiveState, listGuarded } from '../db/publication-rows.ts';
import { JUDGED_ms, JUDGED_ROWS_MAX } from '../limits.ts';
import { percent } from '../routing/decision.ts';
import type { RoutingTable } from '../routing/live-sets.ts';
import { rollback } from './publishing.ts';

type AutoRollbackDependencies = { readonly db: Database; readonly table: RoutingTable };

/** Looks at every guarded publication of these versions. A failure is logged: the next batch tries again. */
export async function takeBackBad(
  dependencies: AutoRollbackDependencies,
  versions: readonly string[],
  hold: Hold,
): Promise<void> {
  if (versions.length === 0) return;
  for (const state of await listGuarded(dependencies.db, versions)) {
    await takeBackIfBad(dependencies, state, hold).catch((error) => {
      log('error', 'auto_rollback_failed', { publication: state.id, reason: reasonOf(error) });
    });
  }
}

async function takeBackIfBad(
  { db, table }: AutoRollbackDependencies,
  state: LiveState,
  hold: Hold,
): Promise<void> {
  if (state.unreadable !== undefined) throw new Error(state.unreadable);
  const reason = await whyBad(db, state);
  if (reason === null) return;
  try {
    const { tenant, version, id: publication } = state;
    await rollback(
      { db, table },
      { tenant, expected: undefined, publication, actor: AUTO_ROLLBACK, reason, hold },
    );
    log('warn', 'auto_rollback', { tenant, version, reason });
  } catch (error) {
    if (!(error instanceof MaskrouteError) || error.code !== 'conflict') throw error;
    // The judged publication is no longer the newest: somebody published, or another delivery rolled it back.
    log('info', 'auto_rollback_not_needed', { version: state.version, reason, because: error.message });
  }
}

/** A message about the bound that was crossed, or null. */
async function whyBad(db: Database, state: LiveState): Promise<string | null> {
  if (state.auto_rollback === null) return null;
  const now_ms = Date.now();
  const starts_ms = new Set(JUDGED_ms.map((ms) => Math.max(state.schedule.activateAt_ms, now_ms - ms)));
  const windows = [...starts_ms].map((since_ms) => windowOf(db, state, since_ms));
  for (const rule of rulesOf(state.auto_rollback)) {
    const reason = await firstWord(rule, windows);
    if (reason !== null) return reason;
  }
  return null;
}

/** Figures of the version, and of the version before it, over one period; read only when needed. */
type Window = { now(): Promise<Judged>; before(): Promise<Judged> | null };

function windowOf(db: Database, { version, base, tenant }: LiveState, since_ms: number): Window {
  const judged = (of: string) => judgedOfVersion(db, of, tenant, since_ms, JUDGED_ROWS_MAX);
  let now: Promise<Judged> | undefined;
  return {
    now: () => (now ??= judged(version)),
    before: () => (base === null ? null : judged(base.version)),
  };
}

/** A message if the bound is crossed; null if it is kept, undefined with too few requests. */
type Rule = (window: Window) => Promise<string | null | undefined>;

/** The result of a rule on the shortest period that has enough requests. */
async function firstWord(rule: Rule, windows: readonly Window[]): Promise<string | null> {
  for (const window of windows) {
    const word = await rule(window);
    if (word !== undefined) return word;
  }
  return null;
}

function rulesOf(bounds: AutoRollback): Rule[] {
  const { error_rate_max, tpot_ms_max, tpot_ratio_max, requests_min } = bounds;
  return [
    ...(error_rate_max === undefined ? [] : [errorRule(error_rate_max, requests_min)]),
    ...(tpot_ms_max === undefined ? [] : [timeRule(tpot_ms_max, requests_min)]),
    ...(tpot_ratio_max === undefined ? [] : [ratioRule(tpot_ratio_max, requests_min)]),
  ];
}

const errorRule =
  (rateMax: number, requestsMin: number): Rule =>
  async ({ now }) => {
    const { requests, errors } = await now();
    if (requests < requestsMin) return undefined;
    if (errors / requests <= rateMax) return null;
    return `${errors} of ${requests} requests failed, more than ${percent(rateMax)}`;
  };

const timeRule =
  (max_ms: number, requestsMin: number): Rule =>
  async ({ now }) => {
    const { tpot_ms } = await now();
    if (tpot_ms.count < requestsMin) return undefined;
    return meanOf(tpot_ms) <= max_ms ? null : `${timeSaid(tpot_ms)}, more than ${max_ms} ms`;
  };

/**
 * Reads the previous version's figures first. Once everyone sees the new version that query is fast, and there is
 * nothing to compare.
 */
const ratioRule =
  (ratioMax: number, requestsMin: number): Rule =>
  async ({ now, before }) => {
    const base = await before();
    if (base === null) return null;
    if (base.tpot_ms.count < requestsMin) return undefined;
    const { tpot_ms } = await now();
    if (tpot_ms.count < requestsMin) return undefined;
    const base_ms = meanOf(base.tpot_ms);
    if (meanOf(tpot_ms) <= ratioMax * base_ms) return null;
    return `${timeSaid(tpot_ms)}, more than ${ratioMax} times the ${base_ms.toFixed(2)} ms of the version before`;
  };

const meanOf = ({ sum, count }: Judged['tpot_ms']): number => sum / count;

const timeSaid = (tpot_ms: Judged['tpot_ms']): string =>
  `${meanOf(tpot_ms).toFixed(2)} ms a token over ${tpot_ms.count} requests`;
