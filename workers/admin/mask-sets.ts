/** Mask sets: immutable, named by their content. */
import { Hono } from 'hono';
import { evaluationFiguresSchema } from '../../shared/admin/stats-wire.ts';
import { maskSetSchema } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { d1 } from '../db/d1.ts';
import {
  findEvaluation,
  findMaskSet,
  listMaskSets,
  putEvaluation,
  type StoredMaskSet,
  writeEvaluation,
  writeMaskSet,
} from '../db/mask-set-rows.ts';
import type { AppContext, AppEnv } from '../http/context.ts';
import { readJson } from '../http/request-body.ts';
import { storeMaskSet } from '../releases/publishing.ts';
import { listed, pageQuery, scopedTenant } from './scope.ts';
import { requireRoom } from './terms.ts';

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
    const { content } = await find(c);
    return c.body(content, 200, { 'content-type': 'application/json' });
  })
  .put('/:version/evaluation', async (c) => {
    const set = await find(c);
    if (c.var.admin.tenant !== undefined && c.var.admin.tenant !== set.owner) {
      throw new MaskrouteError(
        'forbidden',
        'Only the owner of the set, or an administrator of the edge, stores what was measured of it.',
      );
    }
    const figures = parse(evaluationFiguresSchema, await readJson(c.req.raw));
    const rows = [...figures.rows, ...figures.equalTime];
    if (!rows.some(({ maskSet }) => maskSet === set.version)) {
      throw new MaskrouteError('invalid_request', `No row is of ${set.version}.`, { param: 'rows' });
    }
    c.set('before', await d1(findEvaluation(c.var.services.db, set)));
    const written = writeEvaluation(rows);
    await requireRoom(c.var.services.db, c.var.admin.tenant, 'maskSets_bytes', written.content_bytes);
    await d1(putEvaluation(c.var.services.db, set, written, Date.now()));
    return c.json({ object: 'list', data: rows });
  })
  .get('/:version/evaluation', async (c) => {
    const set = await find(c);
    return c.json({ object: 'list', data: await d1(findEvaluation(c.var.services.db, set)) });
  });

/** @throws MaskrouteError `not_found` for a set that is neither the tenant's nor the default owner's. */
async function find(c: AppContext): Promise<StoredMaskSet> {
  const tenant = await scopedTenant(c, c.req.query('tenant'));
  const stored = await d1(findMaskSet(c.var.services.db, tenant, c.req.param('version') ?? ''));
  if (stored === null) throw new MaskrouteError('not_found', 'There is no such mask set.');
  return stored;
}
