/** Tenants, what they may do and how much, and their API keys. */
import { Hono } from 'hono';
import {
  type BudgetUse,
  type CreatedKey,
  createKeySchema,
  createTenantSchema,
  type EndedSessions,
  keysQuerySchema,
  OWN_TENANT_FIELDS,
  pageQuerySchema,
  rotateKeySchema,
  type Tenant,
  updateTenantSchema,
} from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { isJsonObject, parse } from '../../shared/wire/parse-body.ts';
import { type Database, d1, existing, isoTime } from '../db/d1.ts';
import {
  deleteExpiredKeys,
  findApiKeyById,
  insertApiKey,
  listApiKeys,
  revokeApiKey,
  rotateApiKey,
} from '../db/key-rows.ts';
import { budgetOf, findTenant, insertTenant, listTenants, updateTenant } from '../db/tenant-rows.ts';
import type { AppContext, AppEnv } from '../http/context.ts';
import { readJson, readQuery } from '../http/request-body.ts';
import { EXPIRED_KEYS_KEPT_ms } from '../limits.ts';
import { generateKey, newKeyId, nextKeyId } from '../tenants/api-keys.ts';
import type { BudgetState } from '../tenants/ledger.ts';
import {
  listed,
  requireGlobal,
  requireRoom,
  scopedTenant,
  scopedTenantOrAll,
  tenantWarnings,
} from './scope.ts';

export const tenants = new Hono<AppEnv>()
  .post('/', async (c) => {
    requireGlobal(c);
    const tenant = parse(createTenantSchema, await readJson(c.req.raw));
    return c.json(await d1(insertTenant(c.var.services.db, tenant, Date.now())), 201);
  })
  .get('/', async (c) => {
    const page = readQuery(c, pageQuerySchema);
    return c.json(listed(await d1(listTenants(c.var.services.db, c.var.admin.tenant, page))));
  })
  .get('/:id', async (c) => c.json(await withWarnings(c, await tenantOf(c))))
  .patch('/:id', async (c) => {
    const change = parse(updateTenantSchema, await readJson(c.req.raw));
    const own = c.var.admin.tenant;
    const foreign = Object.keys(change).filter((name) => !OWN_TENANT_FIELDS.includes(name));
    if (own !== undefined && foreign.length > 0) {
      const message = `A tenant's own administrator changes ${OWN_TENANT_FIELDS.join(', ')}, and not ${foreign.join(', ')}.`;
      throw new MaskrouteError('forbidden', message, { param: foreign[0]! });
    }
    const before = await tenantOf(c);
    c.set('before', before);
    const changed = await existing(updateTenant(c.var.services.db, before.id, change), NO_TENANT);
    return c.json(await withWarnings(c, changed));
  })
  .get('/:id/budget', async (c) => {
    const tenant = await tenantOf(c);
    const states = await c.var.services.budgets.states(tenant.id, budgetOf(tenant));
    const now_ms = Date.now();
    return c.json({ object: 'list', data: states.map((state) => toUse(state, now_ms)) });
  });

/** Adds warnings about the live set to a changed tenant: limits can be changed whatever is live. */
async function withWarnings(c: AppContext, tenant: Tenant): Promise<Tenant> {
  const warnings = await tenantWarnings(c.get('services'), tenant);
  return warnings === undefined ? tenant : { ...tenant, warnings };
}

/**
 * @throws MaskrouteError `not_found`, also for another tenant's administrator, who must not learn which tenants exist.
 */
async function tenantOf(c: AppContext): Promise<Tenant> {
  const id = c.req.param('id')!;
  const own = c.get('admin').tenant;
  if (own !== undefined && own !== id) throw new MaskrouteError('not_found', NO_TENANT);
  return await existing(findTenant(c.get('services').db, id), NO_TENANT);
}

const NO_TENANT = 'There is no such tenant.';
const NO_KEY = 'There is no such key.';

const toUse = ({ unit, window, limit, used, resetsAfter_ms }: BudgetState, now_ms: number): BudgetUse => ({
  unit,
  window,
  limit,
  used,
  resets_at: new Date(now_ms + resetsAfter_ms).toISOString(),
});

/* API keys: made (the key is shown this once), listed, rotated and revoked. */

export const keys = new Hono<AppEnv>()
  .post('/', async (c) => {
    const { db } = c.var.services;
    const own = c.var.admin.tenant;
    const raw = await readJson(c.req.raw);
    // A tenant's administrator need not name the tenant.
    const filled = own !== undefined && isJsonObject(raw) ? { tenant: own, ...raw } : raw;
    const { kind, name, tenant: named, expires_at } = parse(createKeySchema, filled);
    if (own !== undefined && kind === 'admin') {
      throw new MaskrouteError('forbidden', 'This key administrates its own tenant only.');
    }
    const tenant = await scopedTenant(c, named);
    await dropExpired(db, tenant);
    await requireRoom(db, own, 'keys');
    const { key, sha256, prefix } = generateKey(kind);
    const id = newKeyId();
    const expiresAt_ms = expires_at === undefined ? null : Date.parse(expires_at);
    const createdAt_ms = Date.now();
    const row = { id, kind, tenant, name, prefix, sha256, createdAt_ms, expiresAt_ms };
    const created = await d1(insertApiKey(db, row));
    return c.json({ ...created, key } satisfies CreatedKey, 201);
  })
  .get('/', async (c) => {
    const { tenant: named, state, ...page } = readQuery(c, keysQuerySchema);
    const tenant = await scopedTenantOrAll(c, named);
    const filter = {
      tenant,
      workingAt_ms: state === 'working' ? Date.now() : undefined,
    };
    return c.json(listed(await d1(listApiKeys(c.var.services.db, filter, page))));
  })
  .post('/:id/rotate', async (c) => {
    const { db, apiKeys, sessions } = c.var.services;
    const { tenant } = c.var.admin;
    const { overlap_s, expires_at } = parse(rotateKeySchema, await readJson(c.req.raw));
    const old = await existing(findApiKeyById(db, c.req.param('id'), tenant), NO_KEY);
    c.set('before', old);
    await dropExpired(db, old.tenant);
    await requireRoom(db, tenant, 'keys');
    const { key, sha256, prefix } = generateKey(old.kind);
    const now_ms = Date.now();
    const rotated = await d1(
      rotateApiKey(db, {
        id: old.id,
        tenant,
        now_ms,
        oldExpiresAt_ms: now_ms + overlap_s * 1000,
        successor: {
          id: nextKeyId(old.id),
          prefix,
          sha256,
          expiresAt_ms: expires_at === undefined ? null : Date.parse(expires_at),
        },
      }),
    );
    if (rotated === null) {
      throw new MaskrouteError('conflict', 'The key is revoked, expired or replaced already.');
    }
    apiKeys.forget(rotated.oldSha256);
    sessions.noteEndOfAll(old.id, now_ms);
    return c.json({ ...rotated.successor, key } satisfies CreatedKey, 201);
  })
  .delete('/:id', async (c) => {
    const { db, apiKeys, sessions } = c.var.services;
    const now_ms = Date.now();
    c.set('before', await d1(findApiKeyById(db, c.req.param('id'), c.var.admin.tenant)));
    const revoked = await existing(revokeApiKey(db, c.req.param('id'), c.var.admin.tenant, now_ms), NO_KEY);
    apiKeys.forget(revoked.sha256);
    sessions.noteEndOfAll(revoked.key.id, now_ms);
    return c.json(revoked.key);
  })
  .delete('/:id/sessions', async (c) => {
    const { db } = c.var.services;
    const key = await existing(findApiKeyById(db, c.req.param('id'), c.var.admin.tenant), NO_KEY);
    c.set('changedTenant', key.tenant);
    return await endSessions(c, key.id);
  });

/** The dashboard sessions of the calling key, including those of `ADMIN_KEY`, which is not in the database. */
export const ownSessions = new Hono<AppEnv>().delete('/', (c) => endSessions(c, c.var.admin.actor));

async function endSessions(c: AppContext, actor: string): Promise<Response> {
  const ended_ms = await c.get('services').sessions.endAll(actor);
  return c.json({ actor, ended_before: isoTime(ended_ms) } satisfies EndedSessions);
}

/**
 * Deletes keys that expired long ago. The dashboard's playground makes keys for an hour, which would otherwise use up a
 * tenant's room. Called when a key is made.
 */
const dropExpired = (db: Database, tenant: string): Promise<void> =>
  d1(deleteExpiredKeys(db, tenant, Date.now() - EXPIRED_KEYS_KEPT_ms));
