/** Where recent requests lay among the centroids of a version. */
import { Hono } from 'hono';
import { DEFAULT_TENANT } from '../../../shared/admin.ts';
import { trafficQuerySchema } from '../../../shared/admin-traffic.ts';
import type { AppEnv } from '../../context.ts';
import { listTrafficSamples } from '../../db/traffic.ts';
import { parse } from '../../middleware/body.ts';
import { d1 } from '../../services/d1.ts';
import { scopedTenant } from './scope.ts';

export const traffic = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, version } = parse(trafficQuerySchema, c.req.query());
  const tenant = await scopedTenant(c, named);
  const only = tenant === DEFAULT_TENANT ? undefined : tenant;
  return c.json({ object: 'list', data: await d1(listTrafficSamples(c.var.services.db, version, only)) });
});
