/**
 * Takes a version back that does worse than its publisher said it may. Judged is what was counted since it went
 * live, after each batch of events that is about it: where no requests come in there is nothing to judge.
 */
import { AUTO_ROLLBACK, type AutoRollback } from '../../shared/admin.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import type { Sums } from '../../shared/experiment-results.ts';
import type { Database } from '../db/client.ts';
import { sumsOfVersion } from '../db/outcomes.ts';
import { type LiveState, listGuarded } from '../db/publications.ts';
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
  if (state.auto_rollback === null) return;
  const since_ms = state.schedule.activateAt_ms;
  const [now, before] = await Promise.all([
    sumsOfVersion(db, state.version, state.tenant, since_ms),
    state.base === null ? null : sumsOfVersion(db, state.base.version, state.tenant, since_ms),
  ]);
  const reason = crossedBound(state.auto_rollback, now, before);
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

/** The bound that `now` crosses, in words, or null. `before` is the replaced version in the same time. */
export function crossedBound(bounds: AutoRollback, now: Sums, before: Sums | null): string | null {
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
