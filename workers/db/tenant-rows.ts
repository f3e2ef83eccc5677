/** Tenants in D1. */
import { and, desc, eq } from 'drizzle-orm';
import type { NewTenant, PageQuery, Tenant, TenantChange } from '../../shared/admin/admin-wire.ts';
import { type Database, holds, isIfGiven, isoTime, orConflict, type Page, pastCursor, toPage } from './d1.ts';
import { tenants } from './schema.ts';

type TenantRow = typeof tenants.$inferSelect;

/** Null: no limit. Every limit is a whole number of at least 1. */
export type BudgetLimits = {
  readonly requestsPerMinute: number | null;
  readonly tokensPerMinute: number | null;
  readonly requestsPerDay: number | null;
  readonly tokensPerDay: number | null;
};

/** The permissions and limits of a tenant's requests; read together with the key. */
export type TenantPolicy = {
  readonly enabled: boolean;
  readonly models: readonly string[] | null;
  readonly sparsityMax: number | null;
  readonly agreementMin: number | null;
  readonly limits: BudgetLimits;
  /** For how many days prompts and answers are kept; null: not at all. */
  readonly textsKept_days: number | null;
};

/** @throws MaskrouteError `conflict` when the id is taken. */
export async function insertTenant(db: Database, tenant: NewTenant, now_ms: number): Promise<Tenant> {
  const row = { id: tenant.id, ...columnsOf(tenant), createdAt_ms: now_ms };
  const inserting = db.insert(tenants).values(row).returning();
  const [inserted] = await orConflict(inserting, `There is a tenant ${tenant.id} already.`);
  return toTenant(inserted!);
}

/** Null when there is no such tenant. */
export async function updateTenant(db: Database, id: string, change: TenantChange): Promise<Tenant | null> {
  const rows = await db.update(tenants).set(changedColumns(change)).where(eq(tenants.id, id)).returning();
  return rows[0] === undefined ? null : toTenant(rows[0]);
}

export async function findTenant(db: Database, id: string): Promise<Tenant | null> {
  const rows = await db.select().from(tenants).where(eq(tenants.id, id)).limit(1);
  return rows[0] === undefined ? null : toTenant(rows[0]);
}

/** Newest first; one tenant when `only` is given. */
export async function listTenants(
  db: Database,
  only: string | undefined,
  { before, limit, q }: PageQuery,
): Promise<Page<Tenant>> {
  const { id, createdAt_ms, name } = tenants;
  const rows = await db
    .select()
    .from(tenants)
    .where(and(isIfGiven(id, only), holds(q, id, name), pastCursor(createdAt_ms, id, before)))
    .orderBy(desc(createdAt_ms), id)
    .limit(limit + 1);
  return toPage(rows, limit, (row) => ({ at: row.createdAt_ms, id: row.id }), toTenant);
}

export async function tenantExists(db: Database, id: string): Promise<boolean> {
  const rows = await db.select({ id: tenants.id }).from(tenants).where(eq(tenants.id, id)).limit(1);
  return rows.length > 0;
}

/** A key of kind `admin` has no tenant and no limits. */
export const toPolicy = (row: TenantRow | null): TenantPolicy => ({
  enabled: row?.enabled ?? true,
  models: row?.models ?? null,
  sparsityMax: row?.sparsityMax ?? null,
  agreementMin: row?.agreementMin ?? null,
  textsKept_days: row?.textsKept_days ?? null,
  limits: {
    requestsPerMinute: row?.requestsPerMinute ?? null,
    tokensPerMinute: row?.tokensPerMinute ?? null,
    requestsPerDay: row?.requestsPerDay ?? null,
    tokensPerDay: row?.tokensPerDay ?? null,
  },
});

const columnsOf = (tenant: Omit<NewTenant, 'id'>) => ({
  name: tenant.name,
  routingPolicy: tenant.routing_policy,
  enabled: tenant.enabled,
  models: tenant.models,
  sparsityMax: tenant.sparsity_max,
  agreementMin: tenant.agreement_min,
  requestsPerMinute: tenant.requests_per_minute,
  tokensPerMinute: tenant.tokens_per_minute,
  requestsPerDay: tenant.requests_per_day,
  tokensPerDay: tenant.tokens_per_day,
  textsKept_days: tenant.texts_kept_days,
});

/** The columns to change; columns that the change does not name are left out. */
const changedColumns = (change: TenantChange) =>
  Object.fromEntries(
    Object.entries(columnsOf(change as Omit<NewTenant, 'id'>)).filter(([, value]) => value !== undefined),
  );

const toTenant = (row: TenantRow): Tenant => ({
  id: row.id,
  name: row.name,
  routing_policy: row.routingPolicy,
  enabled: row.enabled,
  models: row.models,
  sparsity_max: row.sparsityMax,
  agreement_min: row.agreementMin,
  requests_per_minute: row.requestsPerMinute,
  tokens_per_minute: row.tokensPerMinute,
  requests_per_day: row.requestsPerDay,
  tokens_per_day: row.tokensPerDay,
  texts_kept_days: row.textsKept_days,
  created_at: isoTime(row.createdAt_ms),
});
