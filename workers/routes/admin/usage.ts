/** What tenants used. */
import { Hono } from 'hono';
import { DEFAULT_TENANT, usageQuerySchema } from '../../../shared/admin.ts';
import type { AppEnv } from '../../context.ts';
import { sumUsage } from '../../db/usage.ts';
import { parse } from '../../middleware/body.ts';
import { d1 } from '../../services/d1.ts';
import { scopedTenant } from './scope.ts';

export const usage = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, ...query } = parse(usageQuerySchema, c.req.query());
  const tenant = await scopedTenant(c, named);
  const question = { ...query, tenant: tenant === DEFAULT_TENANT ? undefined : tenant };
  const { data, next } = await d1(sumUsage(c.var.services.db, question));
  const more = { has_more: next !== null, next: next === null ? null : JSON.stringify(next) };
  return c.json({ object: 'list', data, ...more });
});
