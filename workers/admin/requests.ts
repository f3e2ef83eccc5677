/** Requests one by one, and what was thought of their answers. */
import { Hono } from 'hono';
import {
  type RequestDetail,
  ratingsQuerySchema,
  requestsQuerySchema,
} from '../../shared/admin/requests-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { d1 } from '../db/d1.ts';
import { findRequest, listRatings, listRequests } from '../db/request-rows.ts';
import type { AppEnv } from '../http/context.ts';
import { listed, scopedTenantOrAll } from './scope.ts';

export const requests = new Hono<AppEnv>()
  .get('/', async (c) => {
    const query = parse(requestsQuerySchema, c.req.query());
    const tenant = await scopedTenantOrAll(c, query.tenant);
    return c.json(listed(await d1(listRequests(c.var.services.db, tenant, query))));
  })
  .get('/:id', async (c) => {
    const tenant = await scopedTenantOrAll(c, c.req.query('tenant'));
    const found = await d1(findRequest(c.var.services.db, tenant, c.req.param('id'), Date.now()));
    if (found === null)
      throw new MaskrouteError('not_found', 'There is no such request, or it is forgotten by now.');
    return c.json(found satisfies RequestDetail);
  });

export const ratings = new Hono<AppEnv>().get('/', async (c) => {
  const { tenant: named, ...query } = parse(ratingsQuerySchema, c.req.query());
  const tenant = await scopedTenantOrAll(c, named);
  return c.json(listed(await d1(listRatings(c.var.services.db, tenant, query))));
});
