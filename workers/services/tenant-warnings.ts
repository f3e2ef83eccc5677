/**
 * What a tenant's terms forbid of the mask set that it is routed by. Terms may be tightened at any time and hold from
 * then on, request by request, so tightening them is never refused; who does it is told what it means.
 */
import { DEFAULT_TENANT, type Tenant, type TenantWarning } from '../../shared/admin.ts';
import type { Database } from '../db/client.ts';
import { findLive } from '../db/publications.ts';
import { d1 } from './d1.ts';
import { log, reasonOf } from './log.ts';
import { percent } from './publish.ts';
import { isOverCeiling, meetsFloor } from './route.ts';
import type { LiveSet, RoutingTable } from './routing-table.ts';

export type WarningParts = { readonly db: Database; readonly table: RoutingTable };

/** Undefined when the live set cannot be read: that is no reason to withhold the tenant. */
export async function tenantWarnings(
  { db, table }: WarningParts,
  tenant: Tenant,
): Promise<TenantWarning[] | undefined> {
  try {
    const live = (await d1(findLive(db, tenant.id))) ?? (await d1(findLive(db, DEFAULT_TENANT)));
    if (live === null) return [];
    return warningsOf(await d1(table.versionOf(live.owner, live.version)), tenant);
  } catch (error) {
    log('warn', 'tenant_warnings_unknown', { tenant: tenant.id, reason: reasonOf(error) });
    return undefined;
  }
}

export function warningsOf(
  { version, model, agreement, clusters }: LiveSet,
  { models, sparsity_max, agreement_min }: Pick<Tenant, 'models' | 'sparsity_max' | 'agreement_min'>,
): TenantWarning[] {
  const warnings: TenantWarning[] = [];
  if (!meetsFloor({ agreement }, agreement_min)) {
    const figure = agreement === null ? 'an unknown share' : percent(agreement);
    const message =
      `The live set ${version} agrees with dense on ${figure} of held-out tokens, less than ` +
      `${percent(agreement_min ?? 0)}: requests run dense (under_floor).`;
    warnings.push({ code: 'quality_below_floor', message });
  }
  const sparser = clusters.filter(({ sparsity }) => isOverCeiling(sparsity, sparsity_max)).length;
  if (sparser > 0) {
    const instead = sparser === clusters.length ? 'dense (over_ceiling)' : 'under the nearest other mask';
    const message =
      `${sparser} of the ${clusters.length} masks of the live set ${version} skip more than ` +
      `${percent(sparsity_max ?? 0)} of the blocks: their requests run ${instead}.`;
    warnings.push({ code: 'sparsity_over_ceiling', message });
  }
  if (models !== null && !models.includes(model.name)) {
    const message = `The live set ${version} is for ${model.name}, which this tenant may not use.`;
    warnings.push({ code: 'model_not_allowed', message });
  }
  return warnings;
}
