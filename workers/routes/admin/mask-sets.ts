/** Mask sets: immutable, named by their content. */
import { Hono } from 'hono';
import { MaskrouteError } from '../../../shared/errors.ts';
import { maskSetSchema } from '../../../shared/mask-set.ts';
import type { AppEnv } from '../../context.ts';
import { findMaskSet, listMaskSets, writeMaskSet } from '../../db/mask-sets.ts';
import { parse, readJson } from '../../middleware/body.ts';
import { d1 } from '../../services/d1.ts';
import { storeMaskSet } from '../../services/store-mask-set.ts';
import { requireRoom } from '../../services/tenant-room.ts';
import { listed, pageQuery } from './pages.ts';
import { scopedTenant } from './scope.ts';

export const maskSets = new Hono<AppEnv>()
  .post('/', async (c) => {
    const tenant = await scopedTenant(c, c.req.query('tenant'));
    const set = parse(maskSetSchema, await readJson(c.req.raw), 'invalid_mask_set');
    const written = writeMaskSet(set);
    await requireRoom(c.var.services.db, c.var.admin.tenant, 'maskSets_bytes', written.content_bytes);
    const { created, summary } = await storeMaskSet(c.var.services.db, tenant, written);
    return c.json(summary, created ? 201 : 200);
  })
  .get('/', async (c) => {
    const tenant = await scopedTenant(c, c.req.query('tenant'));
    return c.json(listed(await d1(listMaskSets(c.var.services.db, tenant, pageQuery(c)))));
  })
  .get('/:version', async (c) => {
    const tenant = await scopedTenant(c, c.req.query('tenant'));
    const stored = await d1(findMaskSet(c.var.services.db, tenant, c.req.param('version')));
    if (stored === null) throw new MaskrouteError('not_found', 'There is no such mask set.');
    return c.body(stored.content, 200, { 'content-type': 'application/json' });
  });
