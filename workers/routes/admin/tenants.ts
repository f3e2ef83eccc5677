/** Tenants: made and listed. */
import { Hono } from 'hono';
import { createTenantSchema } from '../../../shared/admin.ts';
import type { AppEnv } from '../../context.ts';
import { insertTenant, listTenants } from '../../db/tenants.ts';
import { parse, readJson } from '../../middleware/body.ts';
import { d1 } from '../../services/d1.ts';
import { requireGlobal } from './scope.ts';

export const tenants = new Hono<AppEnv>()
  .post('/', async (c) => {
    requireGlobal(c);
    const tenant = parse(createTenantSchema, await readJson(c.req.raw));
    return c.json(await d1(insertTenant(c.var.services.db, tenant, Date.now())), 201);
  })
  .get('/', async (c) =>
    c.json({ object: 'list', data: await d1(listTenants(c.var.services.db, c.var.admin.tenant)) }),
  );
