/** What is going on: for the dashboard, and for whoever watches over routing. */
import { Hono } from 'hono';
import { DEFAULT_TENANT } from '../../../shared/admin.ts';
import { type Stats, statsQuerySchema } from '../../../shared/admin-stats.ts';
import type { AppEnv } from '../../context.ts';
import { parse } from '../../middleware/body.ts';
import { d1 } from '../../services/d1.ts';
import { stats as statsOf } from '../../services/stats.ts';
import { scopedTenant } from './scope.ts';

export const stats = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, ...times } = parse(statsQuerySchema, c.req.query());
  const tenant = await scopedTenant(c, named);
  const request = { ...times, tenant: tenant === DEFAULT_TENANT ? undefined : tenant };
  return c.json((await d1(statsOf(c.var.services.db, request))) satisfies Stats);
});
