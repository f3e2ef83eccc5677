/** What every resource of the admin API asks first: what its caller may touch, and which page of a list it wants. */
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
import type { AppContext } from '../http/context.ts';

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

/** The same where a request that names no tenant is about all that its caller may see: undefined for everything. */
export async function scopedTenantOrAll(
  c: AppContext,
  named: string | undefined,
): Promise<string | undefined> {
  const tenant = await scopedTenant(c, named);
  return tenant === DEFAULT_TENANT ? undefined : tenant;
}

/** @throws MaskrouteError `forbidden` for a tenant's own administrator. */
export function requireGlobal(c: AppContext): void {
  if (c.get('admin').tenant !== undefined) throw forbidden();
}

const forbidden = () => new MaskrouteError('forbidden', 'This key administrates its own tenant only.');

/** @throws MaskrouteError `invalid_request` for a malformed limit or cursor. */
export const pageQuery = (c: AppContext): PageQuery => parse(pageQuerySchema, c.req.query());

/** A page as lists are on the wire. */
export const listed = <T>({ data, next }: Page<T>) => ({
  object: 'list' as const,
  data,
  has_more: next !== null,
  next: next === null ? null : writeCursor(next),
});
