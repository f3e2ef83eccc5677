/** Tenants: made, listed, changed; what their keys may do and how much. */
import { Hono } from 'hono';
import {
  type BudgetUse,
  createTenantSchema,
  OWN_TENANT_FIELDS,
  type Tenant,
  updateTenantSchema,
} from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { d1 } from '../db/d1.ts';
import type { BudgetLimits } from '../db/tenant-rows.ts';
import { findTenant, insertTenant, listTenants, updateTenant } from '../db/tenant-rows.ts';
import type { AppContext, AppEnv } from '../http/context.ts';
import { readJson } from '../http/request-body.ts';
import type { BudgetState } from '../tenants/ledger.ts';
import { listed, pageQuery, requireGlobal } from './scope.ts';
import { tenantWarnings } from './terms.ts';

export const tenants = new Hono<AppEnv>()
  .post('/', async (c) => {
    requireGlobal(c);
    const tenant = parse(createTenantSchema, await readJson(c.req.raw));
    return c.json(await d1(insertTenant(c.var.services.db, tenant, Date.now())), 201);
  })
  .get('/', async (c) =>
    c.json(listed(await d1(listTenants(c.var.services.db, c.var.admin.tenant, pageQuery(c))))),
  )
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
    const changed = await d1(updateTenant(c.var.services.db, before.id, change));
    if (changed === null) throw notFound();
    return c.json(await withWarnings(c, changed));
  })
  .get('/:id/budget', async (c) => {
    const tenant = await tenantOf(c);
    const states = await c.var.services.budgets.states(tenant.id, limitsOf(tenant));
    const now_ms = Date.now();
    return c.json({ object: 'list', data: states.map((state) => toUse(state, now_ms)) });
  });

/** A change of terms is made whatever is live: they hold from now on, and the answer says what that means. */
async function withWarnings(c: AppContext, tenant: Tenant): Promise<Tenant> {
  const warnings = await tenantWarnings(c.get('services'), tenant);
  return warnings === undefined ? tenant : { ...tenant, warnings };
}

/** @throws MaskrouteError `not_found`, for another tenant's administrator too: it learns nothing of others. */
async function tenantOf(c: AppContext): Promise<Tenant> {
  const id = c.req.param('id')!;
  const own = c.get('admin').tenant;
  const tenant = own !== undefined && own !== id ? null : await d1(findTenant(c.get('services').db, id));
  if (tenant === null) throw notFound();
  return tenant;
}

const notFound = () => new MaskrouteError('not_found', 'There is no such tenant.');

const limitsOf = (tenant: Tenant): BudgetLimits => ({
  requestsPerMinute: tenant.requests_per_minute,
  tokensPerMinute: tenant.tokens_per_minute,
  requestsPerDay: tenant.requests_per_day,
  tokensPerDay: tenant.tokens_per_day,
});

const toUse = ({ unit, window, limit, used, resetsAfter_ms }: BudgetState, now_ms: number): BudgetUse => ({
  unit,
  window,
  limit,
  used,
  resets_at: new Date(now_ms + resetsAfter_ms).toISOString(),
});
