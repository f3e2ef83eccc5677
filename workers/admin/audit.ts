/**
 * Logs every administrative change: who, what, from where, before and after. The entry is inserted before the change is
 * made; if that fails, the change is refused. So an entry's outcome may be unknown, but no change is missing.
 */
import { Hono } from 'hono';
import { createMiddleware } from 'hono/factory';
import { type Cursor, DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import { ERROR_CODES } from '../../shared/wire/errors.ts';
import { addressOf } from '../base/place.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { beginAudit, completeAudit, dropAudit, findAudit, listAudit } from '../db/audit-rows.ts';
import { d1, existing } from '../db/d1.ts';
import { SAFE_METHODS } from '../http/authentication.ts';
import type { AppContext, AppEnv } from '../http/context.ts';
import { listed, namedTenant, routeOf, scopedTenantOrAll, tenantPageQuery } from './scope.ts';

const PREFIX = '/admin/v1';

export const audited = createMiddleware<AppEnv>(async (c, next) => {
  if (SAFE_METHODS.includes(c.req.method)) return await next();
  const { db, config } = c.var.services;
  const { actor, tenant } = c.var.admin;
  const sequence = await d1(
    beginAudit(db, {
      createdAt_ms: Date.now(),
      tenant: tenant ?? DEFAULT_TENANT,
      actor,
      address: addressOf(c.req.raw, config.TRUSTED_FRONT) ?? '',
      action: `${c.req.method} ${(routeOf(c) ?? c.req.path).slice(PREFIX.length)}`,
      target: c.req.path.slice(PREFIX.length),
      requestId: c.get('requestId'),
    }),
  );
  await next();
  await ended(c, sequence).catch((error) => {
    log('error', 'audit_not_completed', { request_id: c.get('requestId'), reason: reasonOf(error) });
  });
});

async function ended(c: AppContext, sequence: number): Promise<void> {
  const { db } = c.get('services');
  const { status } = c.res;
  // The change may have been made although the request failed, or its client left.
  if (status >= 500 || status === ERROR_CODES.cancelled[0]) return;
  const after = status < 400 ? await stateIn(c.res) : undefined;
  if (after === undefined || isCheck(after)) return await d1(dropAudit(db, sequence));
  const before = c.get('before') ?? null;
  await d1(completeAudit(db, sequence, { tenant: tenantOf(c, after), before, after }));
}

/** The state in the answer, without a new key, which only the answer shows. */
async function stateIn(response: Response): Promise<Record<string, unknown>> {
  const text = await response.clone().text();
  const { key: _key, ...shown } = text === '' ? {} : JSON.parse(text);
  return shown;
}

/** Whether a publication was only checked, not made. */
const isCheck = (after: Record<string, unknown>): boolean => after.activated === false;

function tenantOf(c: AppContext, after: Record<string, unknown>): string {
  const isTenant = c.req.path.startsWith(`${PREFIX}/tenants`);
  const named = c.get('changedTenant') ?? (isTenant ? after.id : after.tenant);
  return typeof named === 'string' ? named : (c.get('admin').tenant ?? DEFAULT_TENANT);
}

/* Reading it. */

const EXPORT_PAGE_ROWS = 200;

export const audit = new Hono<AppEnv>()
  .get('/', async (c) => {
    const { tenant: named, ...page } = tenantPageQuery(c);
    const tenant = await scopedTenantOrAll(c, named);
    return c.json(listed(await d1(listAudit(c.var.services.db, tenant, page))));
  })
  .get('/export', async (c) => {
    const tenant = await scopedTenantOrAll(c, namedTenant(c));
    const rows = allRows(c, tenant);
    c.header('content-disposition', 'attachment; filename="audit.jsonl"');
    return c.body(rows, 200, { 'content-type': 'application/x-ndjson; charset=utf-8' });
  })
  .get('/:id', async (c) => {
    const tenant = await scopedTenantOrAll(c, namedTenant(c));
    const id = c.req.param('id');
    // `Number` also reads `0x1` and `1e0`.
    const found = /^\d{1,15}$/.test(id) ? findAudit(c.var.services.db, tenant, Number(id)) : null;
    return c.json(await existing(found, 'There is no such change, or it is no longer kept.'));
  });

/** Streams the log page by page, as the client reads it: it may be long. */
function allRows(c: AppContext, tenant: string | undefined): ReadableStream<Uint8Array> {
  const { db } = c.get('services');
  const encoder = new TextEncoder();
  let before: Cursor | undefined;
  return new ReadableStream<Uint8Array>({
    async pull(controller) {
      const { data, next } = await d1(listAudit(db, tenant, { limit: EXPORT_PAGE_ROWS, before }));
      if (data.length > 0) {
        controller.enqueue(encoder.encode(data.map((entry) => `${JSON.stringify(entry)}\n`).join('')));
      }
      if (next === null) controller.close();
      else before = next;
    },
  });
}
