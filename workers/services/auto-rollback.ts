/**
 * Takes a version back that does worse than its publisher said it may. Judged are the last requests that its masks
 * answered, after each batch of events that is about it: where no requests come in there is nothing to judge.
 */
import { AUTO_ROLLBACK, type AutoRollback } from '../../shared/admin.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import type { Database } from '../db/client.ts';
import { type Judged, judgedOfVersion } from '../db/outcomes.ts';
import { type LiveState, listGuarded } from '../db/publications.ts';
import { JUDGED_ms } from '../limits.ts';
import type { Hold } from './deadline.ts';
import { log, reasonOf } from './log.ts';
import { rollback } from './publish.ts';
import type { RoutingTable } from './routing-table.ts';

export type AutoRollbackDependencies = { readonly db: Database; readonly table: RoutingTable };

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
  const reason = await whyBad(db, state);
  if (reason === null) return;
  try {
    const { tenant, version: expected } = state;
    await rollback({ db, table }, { tenant, expected, actor: AUTO_ROLLBACK, reason, hold });
    log('warn', 'auto_rollback', { tenant, version: state.version, reason });
  } catch (error) {
    // Somebody published or rolled back meanwhile: there is nothing to take back.
    if (!(error instanceof MaskrouteError) || error.code !== 'conflict') throw error;
    log('warn', 'auto_rollback_impossible', { version: state.version, reason, because: error.message });
  }
}

/** The bound that was crossed lately, in words, or null. Looks further back only where little came in lately. */
async function whyBad(db: Database, state: LiveState): Promise<string | null> {
  const { auto_rollback: bounds, base, tenant, version } = state;
  if (bounds === null) return null;
  for (const judged_ms of JUDGED_ms) {
    const since_ms = Math.max(state.schedule.activateAt_ms, Date.now() - judged_ms);
    const [now, before] = await Promise.all([
      judgedOfVersion(db, version, tenant, since_ms),
      base === null ? null : judgedOfVersion(db, base.version, tenant, since_ms),
    ]);
    const reason = crossedBound(bounds, now, before);
    if (reason !== null || isEnough(bounds, now, before)) return reason;
  }
  return null;
}

const isEnough = (
  { requests_min, tpot_ratio_max }: AutoRollback,
  now: Judged,
  before: Judged | null,
): boolean =>
  now.requests >= requests_min &&
  (tpot_ratio_max === undefined || before === null || before.tpot_ms.count >= requests_min);

/** The bound that `now` crosses, in words, or null. `before` is the replaced version in the same time. */
function crossedBound(bounds: AutoRollback, now: Judged, before: Judged | null): string | null {
  const { error_rate_max, tpot_ms_max, tpot_ratio_max, requests_min } = bounds;
  if (error_rate_max !== undefined && now.requests >= requests_min) {
    const rate = now.errors / now.requests;
    if (rate > error_rate_max) {
      return `${now.errors} of ${now.requests} requests failed, more than ${100 * error_rate_max} %`;
    }
  }
  if (now.tpot_ms.count < requests_min) return null;
  const tpot_ms = now.tpot_ms.sum / now.tpot_ms.count;
  const said = `${tpot_ms.toFixed(2)} ms a token over ${now.tpot_ms.count} requests`;
  if (tpot_ms_max !== undefined && tpot_ms > tpot_ms_max) return `${said}, more than ${tpot_ms_max} ms`;
  if (tpot_ratio_max === undefined || before === null || before.tpot_ms.count < requests_min) return null;
  const base_ms = before.tpot_ms.sum / before.tpot_ms.count;
  if (tpot_ms <= tpot_ratio_max * base_ms) return null;
  return `${said}, more than ${tpot_ratio_max} times the ${base_ms.toFixed(2)} ms of the version before`;
}
