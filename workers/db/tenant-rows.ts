/** Tenants in D1. */
import { and, desc, eq } from 'drizzle-orm';
import {
  type NewTenant,
  type PageQuery,
  readableLimits,
  type Tenant,
  type TenantChange,
  type TenantLimits,
  tenantLimitsSchema,
} from '../../shared/admin/admin-wire.ts';
import { ROUTING_POLICIES, type RoutingPolicy } from '../../shared/embedding/encoder.ts';
import { check } from '../../shared/wire/parse-body.ts';
import {
  type Database,
  firstOf,
  holds,
  isIfGiven,
  isoTime,
  orConflict,
  type Page,
  pastCursor,
  storedJson,
  toPage,
} from './d1.ts';
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
  /** Why this version of the edge cannot read its limits; null: it can. */
  readonly unreadable: string | null;
};

/** @throws MaskrouteError `conflict` when the id is taken. */
export async function insertTenant(db: Database, tenant: NewTenant, now_ms: number): Promise<Tenant> {
  const row = { id: tenant.id, ...columnsOf(tenant), createdAt_ms: now_ms };
  const inserting = db.insert(tenants).values(row).returning();
  const [inserted] = await orConflict(inserting, `There is a tenant ${tenant.id} already.`);
  return toTenant(inserted!);
}

/** Null when there is no such tenant. */
export const updateTenant = (db: Database, id: string, change: TenantChange): Promise<Tenant | null> =>
  firstOf(db.update(tenants).set(changedColumns(change)).where(eq(tenants.id, id)).returning(), toTenant);

export const findTenant = (db: Database, id: string): Promise<Tenant | null> =>
  firstOf(db.select().from(tenants).where(eq(tenants.id, id)), toTenant);

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
  const rows = await db.select({ id: tenants.id }).from(tenants).where(eq(tenants.id, id));
  return rows.length > 0;
}

/** A key of kind `admin` has no tenant and no limits. */
export function toPolicy(row: TenantRow | null): TenantPolicy {
  const { limits, unreadable } = limitsIn(row);
  return {
    enabled: row?.enabled ?? true,
    models: limits.models,
    sparsityMax: limits.sparsity_max,
    agreementMin: limits.agreement_min,
    textsKept_days: limits.texts_kept_days,
    limits: budgetOf(limits),
    unreadable,
  };
}

export const budgetOf = (limits: TenantLimits): BudgetLimits => ({
  requestsPerMinute: limits.requests_per_minute,
  tokensPerMinute: limits.tokens_per_minute,
  requestsPerDay: limits.requests_per_day,
  tokensPerDay: limits.tokens_per_day,
});

const isKnownPolicy = (stored: string | undefined): stored is RoutingPolicy =>
  ROUTING_POLICIES.some((known) => known === stored);

/** A policy that a later version of the edge stored is unknown here; requests are routed all the same. */
export const knownPolicy = (stored: string | undefined): RoutingPolicy =>
  isKnownPolicy(stored) ? stored : 'first_user';

type StoredLimits = { readonly limits: TenantLimits; readonly unreadable: string | null };

/** SQLite stores whatever another version of the edge, or a hand, writes: a text in a column of numbers would limit nothing. */
function limitsIn(row: TenantRow | null): StoredLimits {
  const stored = {
    models: storedJson(row?.models ?? null),
    sparsity_max: row?.sparsityMax ?? null,
    agreement_min: row?.agreementMin ?? null,
    requests_per_minute: row?.requestsPerMinute ?? null,
    tokens_per_minute: row?.tokensPerMinute ?? null,
    requests_per_day: row?.requestsPerDay ?? null,
    tokens_per_day: row?.tokensPerDay ?? null,
    texts_kept_days: row?.textsKept_days ?? null,
  };
  const checked = check(tenantLimitsSchema, stored, 'the limits');
  return checked.kind === 'good'
    ? { limits: checked.value, unreadable: null }
    : { limits: readableLimits(stored), unreadable: checked.message };
}

const columnsOf = (tenant: Omit<NewTenant, 'id'>) => ({
  name: tenant.name,
  routingPolicy: tenant.routing_policy,
  enabled: tenant.enabled,
  models: tenant.models && JSON.stringify(tenant.models),
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

function toTenant(row: TenantRow): Tenant {
  const { limits, unreadable } = limitsIn(row);
  return {
    id: row.id,
    name: row.name,
    routing_policy: knownPolicy(row.routingPolicy),
    ...(isKnownPolicy(row.routingPolicy) ? {} : { unknown_policy: String(row.routingPolicy) }),
    enabled: row.enabled,
    ...limits,
    created_at: isoTime(row.createdAt_ms),
    ...(unreadable === null ? {} : { unreadable }),
  };
}
