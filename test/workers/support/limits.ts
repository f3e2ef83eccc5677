/** Tenants with limits, and a clock that no test runs over the edge of. */
import { vi } from 'vitest';
import type { BudgetUse, Tenant, TenantChange } from '../../../shared/admin/admin-wire.ts';
import { admin, created, newKey, newTenant } from './edge.ts';

/** Half past a minute, so that a test's requests are of one minute. Later tests start later. */
let minute = Math.ceil(Date.now() / 60_000) + 1;
export function midMinute(): void {
  vi.useFakeTimers({ toFake: ['Date'], now: ++minute * 60_000 + 20_000 });
}

export async function limitedTenant(limits: TenantChange): Promise<{ tenant: string; key: string }> {
  const { tenant } = await newTenant();
  const id = `${tenant}-limited`;
  await created<Tenant>(admin('POST', '/tenants', { id, name: id, ...limits }));
  const { key } = await newKey({ tenant: id });
  return { tenant: id, key };
}

export async function budgetOf(tenant: string): Promise<Record<string, number>> {
  const response = await admin('GET', `/tenants/${tenant}/budget`);
  const { data } = await response.json<{ data: BudgetUse[] }>();
  return Object.fromEntries(data.map(({ unit, window, used }) => [`${unit}/${window}`, used]));
}
