/** API keys in D1: found by the SHA-256 of the key, which is all that is stored. */
import { and, desc, eq, isNull } from 'drizzle-orm';
import { type ApiKey, type ApiKeyKind, DEFAULT_TENANT, LIST_COUNT_MAX } from '../../shared/admin.ts';
import type { RoutingPolicy } from '../../shared/embedding/route-text.ts';
import { type Database, isoTime, isoTimeOrNull } from './client.ts';
import { apiKeys, tenants } from './schema.ts';

/** What a request needs to know of the key that it came with. */
export type KnownKey = {
  readonly id: string;
  readonly kind: ApiKeyKind;
  /** Empty for a key of kind `admin`. */
  readonly tenant: string;
  readonly routingPolicy: RoutingPolicy;
  readonly expiresAt_ms: number | null;
  readonly revokedAt_ms: number | null;
};

type ApiKeyRow = typeof apiKeys.$inferSelect;
export type NewApiKey = {
  readonly id: string;
  readonly kind: ApiKeyKind;
  readonly tenant: string;
  readonly name: string;
  readonly prefix: string;
  readonly sha256: string;
  readonly createdAt_ms: number;
  readonly expiresAt_ms: number | null;
};

export async function findApiKey(db: Database, sha256: string): Promise<KnownKey | null> {
  const rows = await db
    .select({
      id: apiKeys.id,
      kind: apiKeys.kind,
      tenant: apiKeys.tenantId,
      routingPolicy: tenants.routingPolicy,
      expiresAt_ms: apiKeys.expiresAt_ms,
      revokedAt_ms: apiKeys.revokedAt_ms,
    })
    .from(apiKeys)
    .leftJoin(tenants, eq(tenants.id, apiKeys.tenantId))
    .where(eq(apiKeys.sha256, sha256))
    .limit(1);
  const row = rows[0];
  if (row === undefined) return null;
  return {
    ...row,
    tenant: row.tenant ?? DEFAULT_TENANT,
    routingPolicy: row.routingPolicy ?? 'first_user',
  };
}

export async function insertApiKey(db: Database, key: NewApiKey): Promise<ApiKey> {
  const { tenant, ...columns } = key;
  const row: ApiKeyRow = {
    ...columns,
    tenantId: tenant === DEFAULT_TENANT ? null : tenant,
    revokedAt_ms: null,
  };
  await db.insert(apiKeys).values(row);
  return toApiKey(row);
}

/** The newest {@link LIST_COUNT_MAX}, of one tenant when `tenant` is given. */
export async function listApiKeys(db: Database, tenant: string | undefined): Promise<ApiKey[]> {
  const rows = await db
    .select()
    .from(apiKeys)
    .where(tenant === undefined ? undefined : eq(apiKeys.tenantId, tenant))
    .orderBy(desc(apiKeys.createdAt_ms), apiKeys.id)
    .limit(LIST_COUNT_MAX);
  return rows.map(toApiKey);
}

/**
 * Sets the revocation time once; null when there is no such key (or it is another tenant's).
 * The SHA-256 comes along so that the caller can drop the key from its cache.
 */
export async function revokeApiKey(
  db: Database,
  id: string,
  tenant: string | undefined,
  now_ms: number,
): Promise<{ key: ApiKey; sha256: string } | null> {
  const owned = and(eq(apiKeys.id, id), tenant === undefined ? undefined : eq(apiKeys.tenantId, tenant));
  const [, rows] = await db.batch([
    db
      .update(apiKeys)
      .set({ revokedAt_ms: now_ms })
      .where(and(owned, isNull(apiKeys.revokedAt_ms))),
    db.select().from(apiKeys).where(owned).limit(1),
  ]);
  const row = rows[0];
  return row === undefined ? null : { key: toApiKey(row), sha256: row.sha256 };
}

const toApiKey = (row: ApiKeyRow): ApiKey => ({
  id: row.id,
  kind: row.kind,
  tenant: row.tenantId ?? DEFAULT_TENANT,
  name: row.name,
  prefix: row.prefix,
  created_at: isoTime(row.createdAt_ms),
  expires_at: isoTimeOrNull(row.expiresAt_ms),
  revoked_at: isoTimeOrNull(row.revokedAt_ms),
});
