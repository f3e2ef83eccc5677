/** What an administrator may touch: everything, or one tenant. */
import { DEFAULT_TENANT } from '../../../shared/admin.ts';
import { MaskrouteError } from '../../../shared/errors.ts';
import type { AppContext } from '../../context.ts';
import { tenantExists } from '../../db/tenants.ts';
import { d1 } from '../../services/d1.ts';

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
