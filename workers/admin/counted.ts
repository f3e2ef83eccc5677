/** Statistics, usage, drift and single requests, for the dashboard and for monitoring. */
import { Hono } from 'hono';
import { DEFAULT_TENANT, usageQuerySchema } from '../../shared/admin/admin-wire.ts';
import {
  type RequestDetail,
  ratingsQuerySchema,
  requestsQuerySchema,
} from '../../shared/admin/requests-wire.ts';
import {
  type Drift,
  driftQuerySchema,
  type Stats,
  statsQuerySchema,
  trafficQuerySchema,
} from '../../shared/admin/stats-wire.ts';
import { splitModelName } from '../../shared/wire/protocol.ts';
import { listByName } from '../backends/registry.ts';
import { driftOf, stats as statsOf } from '../counting/traffic.ts';
import { d1, existing } from '../db/d1.ts';
import { findMaskSet } from '../db/mask-set-rows.ts';
import { findRequest, listRatings, listRequests, listTrafficSamples, sumUsage } from '../db/request-rows.ts';
import { type AppEnv, holdOf } from '../http/context.ts';
import { readQuery } from '../http/request-body.ts';
import { listed, namedTenant, scopedTenant, scopedTenantOrAll } from './scope.ts';

export const stats = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, ...times } = readQuery(c, statsQuerySchema);
  const tenant = await scopedTenantOrAll(c, named);
  return c.json((await d1(statsOf(c.var.services.db, { ...times, tenant }))) satisfies Stats);
});

/* Positions of recent requests among the centroids of a version. */

export const traffic = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, version } = readQuery(c, trafficQuerySchema);
  const tenant = await scopedTenantOrAll(c, named);
  return c.json({ object: 'list', data: await d1(listTrafficSamples(c.var.services.db, version, tenant)) });
});

/* Drift of a version's requests and answers. */

export const drift = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, version, since } = readQuery(c, driftQuerySchema);
  const tenant = await scopedTenant(c, named);
  const { db } = c.var.services;
  const message = `There is no mask set ${version}.`;
  const stored = await existing(findMaskSet(db, tenant, version), message, 'version');
  const only = tenant === DEFAULT_TENANT ? undefined : tenant;
  return c.json((await d1(driftOf(db, stored, only, Date.parse(since)))) satisfies Drift);
});

/* The models that backends serve, to choose from for tenants and experiments. */

export const models = new Hono<AppEnv>().get('/', async (c) => {
  const served = await listByName(c.var.services.models, holdOf(c));
  // Tenants and experiments name models without `:dense`.
  const ids = served.map(({ id }) => id).filter((id) => !splitModelName(id).dense);
  return c.json({ object: 'list', data: ids.map((id) => ({ id })) });
});

/* What tenants used. */

export const usage = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, ...query } = readQuery(c, usageQuerySchema);
  const tenant = await scopedTenantOrAll(c, named);
  const { data, next } = await d1(sumUsage(c.var.services.db, { ...query, tenant }));
  const more = { has_more: next !== null, next: next === null ? null : JSON.stringify(next) };
  return c.json({ object: 'list', data, ...more });
});

/* Single requests, and the ratings of their answers. */

export const requests = new Hono<AppEnv>()
  .get('/', async (c) => {
    const query = readQuery(c, requestsQuerySchema);
    const tenant = await scopedTenantOrAll(c, query.tenant);
    return c.json(listed(await d1(listRequests(c.var.services.db, tenant, query))));
  })
  .get('/:id', async (c) => {
    const tenant = await scopedTenantOrAll(c, namedTenant(c));
    const found = findRequest(c.var.services.db, tenant, c.req.param('id'), Date.now());
    const detail = await existing(found, 'There is no such request, or it is no longer kept.');
    return c.json(detail satisfies RequestDetail);
  });

export const ratings = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, ...query } = readQuery(c, ratingsQuerySchema);
  const tenant = await scopedTenantOrAll(c, named);
  return c.json(listed(await d1(listRatings(c.var.services.db, tenant, query))));
});
