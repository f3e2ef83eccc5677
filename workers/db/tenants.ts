/** Tenants in D1. */
import { desc, eq } from 'drizzle-orm';
import { LIST_COUNT_MAX, type Tenant } from '../../shared/admin.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import { type Database, isDuplicate, isoTime } from './client.ts';
import { tenants } from './schema.ts';

type TenantRow = typeof tenants.$inferSelect;

/** @throws MaskrouteError `conflict` when the id is taken. */
export async function insertTenant(
  db: Database,
  tenant: Omit<Tenant, 'created_at'>,
  now_ms: number,
): Promise<Tenant> {
  const row: TenantRow = {
    id: tenant.id,
    name: tenant.name,
    routingPolicy: tenant.routing_policy,
    createdAt_ms: now_ms,
  };
  try {
    await db.insert(tenants).values(row);
  } catch (error) {
    if (!isDuplicate(error)) throw error;
    throw new MaskrouteError('conflict', `There is a tenant ${tenant.id} already.`, { param: 'id' });
  }
  return toTenant(row);
}

/** One tenant when `only` is given, else the newest {@link LIST_COUNT_MAX}. */
export async function listTenants(db: Database, only: string | undefined): Promise<Tenant[]> {
  const rows = await db
    .select()
    .from(tenants)
    .where(only === undefined ? undefined : eq(tenants.id, only))
    .orderBy(desc(tenants.createdAt_ms), tenants.id)
    .limit(LIST_COUNT_MAX);
  return rows.map(toTenant);
}

export async function tenantExists(db: Database, id: string): Promise<boolean> {
  const rows = await db.select({ id: tenants.id }).from(tenants).where(eq(tenants.id, id)).limit(1);
  return rows.length > 0;
}

const toTenant = (row: TenantRow): Tenant => ({
  id: row.id,
  name: row.name,
  routing_policy: row.routingPolicy,
  created_at: isoTime(row.createdAt_ms),
});
