/**
 * API keys in D1, found by the SHA-256 of the key; the key itself is not stored. The ends of keys' sessions are here,
 * too, so that a key and its sessions end in one batch.
 */
import { and, desc, eq, gt, isNull, lt, or, type SQL, sql } from 'drizzle-orm';
import {
  type ApiKey,
  type ApiKeyKind,
  DEFAULT_TENANT,
  type PageQuery,
} from '../../shared/admin/admin-wire.ts';
import type { RoutingPolicy } from '../../shared/embedding/encoder.ts';
import {
  type Database,
  firstOf,
  holds,
  isIfGiven,
  isoTime,
  isoTimeOrNull,
  type Page,
  pastCursor,
  toPage,
} from './d1.ts';
import { apiKeys, endedSessions, tenants } from './schema.ts';
import { knownPolicy, type TenantPolicy, toPolicy } from './tenant-rows.ts';

/** The fields of a key that a request needs. */
export type KnownKey = {
  readonly id: string;
  readonly kind: ApiKeyKind;
  /** Empty for a key of kind `admin`. */
  readonly tenant: string;
  readonly routingPolicy: RoutingPolicy;
  readonly policy: TenantPolicy;
  readonly expiresAt_ms: number | null;
  readonly revokedAt_ms: number | null;
};

type ApiKeyRow = typeof apiKeys.$inferSelect;
type NewApiKey = Omit<ApiKeyRow, 'tenantId' | 'revokedAt_ms' | 'replacedBy'> & { readonly tenant: string };

export function findApiKey(db: Database, sha256: string): Promise<KnownKey | null> {
  const found = db
    .select({
      id: apiKeys.id,
      kind: apiKeys.kind,
      tenant: apiKeys.tenantId,
      tenantRow: tenants,
      expiresAt_ms: apiKeys.expiresAt_ms,
      revokedAt_ms: apiKeys.revokedAt_ms,
    })
    .from(apiKeys)
    .leftJoin(tenants, eq(tenants.id, apiKeys.tenantId))
    .where(eq(apiKeys.sha256, sha256));
  return firstOf(found, ({ tenantRow, ...key }) => ({
    ...key,
    tenant: key.tenant ?? DEFAULT_TENANT,
    routingPolicy: knownPolicy(tenantRow?.routingPolicy),
    policy: toPolicy(tenantRow),
  }));
}

export async function insertApiKey(db: Database, key: NewApiKey): Promise<ApiKey> {
  const { tenant, ...columns } = key;
  const row: ApiKeyRow = {
    ...columns,
    tenantId: tenant === DEFAULT_TENANT ? null : tenant,
    revokedAt_ms: null,
    replacedBy: null,
  };
  await db.insert(apiKeys).values(row);
  return toApiKey(row);
}

type KeyFilter = {
  /** Undefined: of any. */
  readonly tenant: string | undefined;
  /** Only keys that are neither revoked nor expired at this time; undefined: all. */
  readonly workingAt_ms: number | undefined;
};

/** Newest first. */
export async function listApiKeys(
  db: Database,
  { tenant, workingAt_ms }: KeyFilter,
  { before, limit, q }: PageQuery,
): Promise<Page<ApiKey>> {
  const { id, createdAt_ms, tenantId, name, prefix } = apiKeys;
  const rows = await db
    .select()
    .from(apiKeys)
    .where(
      and(
        isIfGiven(tenantId, tenant),
        workingAt_ms === undefined ? undefined : worksAt(workingAt_ms),
        holds(q, id, name, prefix, tenantId),
        pastCursor(createdAt_ms, id, before),
      ),
    )
    .orderBy(desc(createdAt_ms), id)
    .limit(limit + 1);
  return toPage(rows, limit, (row) => ({ at: row.createdAt_ms, id: row.id }), toApiKey);
}

/** Condition for a key by its id; `tenant`: its owner, undefined for any. */
const ownedKey = (id: string, tenant: string | undefined) =>
  and(eq(apiKeys.id, id), isIfGiven(apiKeys.tenantId, tenant));

const worksAt = (now_ms: number) =>
  and(isNull(apiKeys.revokedAt_ms), or(isNull(apiKeys.expiresAt_ms), gt(apiKeys.expiresAt_ms, now_ms)));

/** Deletes a tenant's expired keys, or those of no tenant; only counted figures refer to them, by id. */
export async function deleteExpiredKeys(db: Database, tenant: string, before_ms: number): Promise<void> {
  const owned = tenant === DEFAULT_TENANT ? isNull(apiKeys.tenantId) : eq(apiKeys.tenantId, tenant);
  await db.delete(apiKeys).where(and(owned, lt(apiKeys.expiresAt_ms, before_ms)));
}

/**
 * Sets the revocation time, once; null when there is no such key (or it is another tenant's). Returns the SHA-256, too,
 * so that the caller can drop the key from its cache.
 */
export async function revokeApiKey(
  db: Database,
  id: string,
  tenant: string | undefined,
  now_ms: number,
): Promise<{ key: ApiKey; sha256: string } | null> {
  const owned = ownedKey(id, tenant);
  const [, rows] = await db.batch([
    db
      .update(apiKeys)
      .set({ revokedAt_ms: now_ms })
      .where(and(owned, isNull(apiKeys.revokedAt_ms))),
    db.select().from(apiKeys).where(owned),
    endSessionsOf(db, owned, now_ms),
  ]);
  const row = rows[0];
  return row === undefined ? null : { key: toApiKey(row), sha256: row.sha256 };
}

type Rotation = {
  readonly id: string;
  /** The tenant that must own the key; undefined: any. */
  readonly tenant: string | undefined;
  /** The old key expires no later than this. */
  readonly oldExpiresAt_ms: number;
  readonly now_ms: number;
  readonly successor: Pick<NewApiKey, 'id' | 'prefix' | 'sha256' | 'expiresAt_ms'>;
};

/**
 * Rotates a key in one batch: sets the old key's end and, only if that succeeds, inserts the new key. Null when the old
 * key does not exist or is revoked, expired or already replaced.
 */
export async function rotateApiKey(
  db: Database,
  { id, tenant, oldExpiresAt_ms, now_ms, successor }: Rotation,
): Promise<{ successor: ApiKey; oldSha256: string } | null> {
  const [replaced, , made] = await db.batch([
    db
      .update(apiKeys)
      .set({
        replacedBy: successor.id,
        expiresAt_ms: sql`min(coalesce(${apiKeys.expiresAt_ms}, ${oldExpiresAt_ms}), ${oldExpiresAt_ms})`,
      })
      .where(and(ownedKey(id, tenant), isNull(apiKeys.replacedBy), worksAt(now_ms)))
      .returning({ sha256: apiKeys.sha256 }),
    // The columns are those of the table, in its order.
    db.insert(apiKeys).select(sql`select ${successor.id}, kind, tenant_id, name, ${successor.prefix},
      ${successor.sha256}, ${now_ms}, ${successor.expiresAt_ms}, null, null
      from ${apiKeys} where id = ${id} and replaced_by = ${successor.id}`),
    db.select().from(apiKeys).where(eq(apiKeys.id, successor.id)),
    endSessionsOf(db, and(eq(apiKeys.id, id), eq(apiKeys.replacedBy, successor.id)), now_ms),
  ]);
  const [old] = replaced;
  return old === undefined ? null : { successor: toApiKey(made[0]!), oldSha256: old.sha256 };
}

export const sessionSubject = (id: string): string => `session:${id}`;
export const keySubject = (keyId: string): string => `key:${keyId}`;

/** Ends all sessions that the keys have opened until now. */
const endSessionsOf = (db: Database, keys: SQL | undefined, now_ms: number) =>
  db
    .insert(endedSessions)
    .select(sql`select 'key:' || id, ${now_ms} from ${apiKeys} where ${keys} and kind <> 'tenant'`)
    .onConflictDoUpdate({ target: endedSessions.subject, set: { endedAt_ms: LATER_END } });
const LATER_END = sql`max(${endedSessions.endedAt_ms}, excluded.ended_at_ms)`;

/** When a session, or all sessions of a key, were ended; 0 if they were not. */
export async function findSessionEnd(db: Database, subject: string): Promise<number> {
  const rows = await db
    .select({ endedAt_ms: endedSessions.endedAt_ms })
    .from(endedSessions)
    .where(eq(endedSessions.subject, subject));
  return rows[0]?.endedAt_ms ?? 0;
}

/** Records an end. Rows from before `over_ms`, whose sessions have expired anyway, are deleted. */
export async function insertSessionEnd(
  db: Database,
  subject: string,
  endedAt_ms: number,
  over_ms: number,
): Promise<void> {
  await db.batch([
    db
      .insert(endedSessions)
      .values({ subject, endedAt_ms })
      .onConflictDoUpdate({ target: endedSessions.subject, set: { endedAt_ms: LATER_END } }),
    db.delete(endedSessions).where(lt(endedSessions.endedAt_ms, over_ms)),
  ]);
}

/** Null when there is no such key, or it is another tenant's. */
export const findApiKeyById = (
  db: Database,
  id: string,
  tenant: string | undefined,
): Promise<ApiKey | null> => firstOf(db.select().from(apiKeys).where(ownedKey(id, tenant)), toApiKey);

const toApiKey = (row: ApiKeyRow): ApiKey => ({
  id: row.id,
  kind: row.kind,
  tenant: row.tenantId ?? DEFAULT_TENANT,
  name: row.name,
  prefix: row.prefix,
  created_at: isoTime(row.createdAt_ms),
  expires_at: isoTimeOrNull(row.expiresAt_ms),
  revoked_at: isoTimeOrNull(row.revokedAt_ms),
  replaced_by: row.replacedBy,
});
