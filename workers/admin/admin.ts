/** The admin API; `shared/admin/admin-wire.ts` describes it. */
import { Hono } from 'hono';
import {
  DEFAULT_TENANT,
  type PageQuery,
  pageQuerySchema,
  writeCursor,
} from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { d1, type Page } from '../db/d1.ts';
import { tenantExists } from '../db/tenant-rows.ts';
import { adminOnly, noStore } from '../http/authentication.ts';
import type { AppContext, AppEnv } from '../http/context.ts';
import { backends } from './backends.ts';
import { stats, traffic, usage } from './counted.ts';
import { experiments } from './experiments.ts';
import { keys, ownSessions } from './keys.ts';
import { maskSets } from './mask-sets.ts';
import { publications } from './publications.ts';
import { tenants } from './tenants.ts';

export const admin = new Hono<AppEnv>()
  .use(noStore)
  .use(adminOnly)
  .route('/tenants', tenants)
  .route('/keys', keys)
  .route('/sessions', ownSessions)
  .route('/usage', usage)
  .route('/mask-sets', maskSets)
  .route('/publications', publications)
  .route('/backends', backends)
  .route('/experiments', experiments)
  .route('/stats', stats)
  .route('/traffic', traffic);

/* What an administrator may touch: everything, or one tenant. */

/**
 * The tenant that a request is about: the one it names, or the caller's own.
 * @throws MaskrouteError `forbidden` when that is not the caller's, `not_found` when there is no such tenant.
 */
export async function scopedTenant(c: AppContext, named: string | undefined): Promise<string> {
  const own = c.get('admin').tenant;
  if (own !== undefined) {
    if (named !== undefined && named !== DEFAULT_TENANT && named !== own) throw forbidden();
    return own;
  }
  const tenant = named ?? DEFAULT_TENANT;
  if (tenant !== DEFAULT_TENANT && !(await d1(tenantExists(c.get('services').db, tenant)))) {
    throw new MaskrouteError('not_found', `There is no tenant ${tenant}.`, { param: 'tenant' });
  }
  return tenant;
}

/** @throws MaskrouteError `forbidden` for a tenant's own administrator. */
export function requireGlobal(c: AppContext): void {
  if (c.get('admin').tenant !== undefined) throw forbidden();
}

const forbidden = () => new MaskrouteError('forbidden', 'This key administrates its own tenant only.');

/* Lists on the wire: which page a request asks for, and the answer to it. */

/** @throws MaskrouteError `invalid_request` for a limit or a cursor that is none. */
export const pageQuery = (c: AppContext): PageQuery => parse(pageQuerySchema, c.req.query());

export const listed = <T>({ data, next }: Page<T>) => ({
  object: 'list' as const,
  data,
  has_more: next !== null,
  next: next === null ? null : writeCursor(next),
});
