/** The registry of backends: for those who administrate everything. A change holds in other isolates within seconds. */
import { Hono } from 'hono';
import { searchQuerySchema } from '../../shared/admin/admin-wire.ts';
import { createBackendSchema, updateBackendSchema } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { defaultBackend } from '../backends/registry.ts';
import {
  type BackendRow,
  deleteBackend,
  findBackend,
  insertBackend,
  listBackends,
  updateBackend,
} from '../db/backend-rows.ts';
import { d1 } from '../db/d1.ts';
import { type AppContext, type AppEnv, holdOf } from '../http/context.ts';
import { readJson } from '../http/request-body.ts';
import { jobs } from './jobs.ts';
import { requireGlobal } from './scope.ts';

export const backends = new Hono<AppEnv>()
  .use(async (c, next) => {
    requireGlobal(c);
    await next();
  })
  .route('/:id/jobs', jobs)
  .get('/', async (c) => {
    const { q } = parse(searchQuerySchema, c.req.query());
    const { db, backend, config } = c.var.services;
    const rows = await d1(listBackends(db, q));
    const isEmpty = rows.length === 0 && (q === undefined || (await d1(listBackends(db))).length === 0);
    const shown = isEmpty ? [defaultBackend(config.BACKEND_URL)].filter((row) => hasText(row, q)) : rows;
    return c.json({ object: 'list', data: shown.map((row) => backend.describe(row)) });
  })
  .post('/', async (c) => {
    const { id, ...fields } = parse(createBackendSchema, await readJson(c.req.raw));
    return await changed(c, await d1(insertBackend(c.var.services.db, id, fields, Date.now())), 201);
  })
  .get('/:id', async (c) => {
    const { db, backend } = c.var.services;
    return c.json(backend.describe(found(await d1(findBackend(db, c.req.param('id'))))));
  })
  .patch('/:id', async (c) => {
    const change = parse(updateBackendSchema, await readJson(c.req.raw));
    const { db } = c.var.services;
    const id = c.req.param('id');
    c.set('before', await d1(findBackend(db, id)));
    const updated = await d1(updateBackend(db, id, change, Date.now()));
    return await changed(c, found(updated), 200);
  })
  .delete('/:id', async (c) => {
    const { db, backend } = c.var.services;
    const id = c.req.param('id');
    c.set('before', await d1(findBackend(db, id)));
    if (!(await d1(deleteBackend(db, id)))) throw unknown();
    await backend.refresh(holdOf(c));
    return c.json({ id, deleted: true });
  });

const hasText = ({ id, url }: BackendRow, text = ''): boolean =>
  `${id} ${url}`.toLowerCase().includes(text.toLowerCase());

async function changed(c: AppContext, row: BackendRow, status: 200 | 201): Promise<Response> {
  const { backend } = c.var.services;
  await backend.refresh(holdOf(c));
  return c.json(backend.describe(row), status);
}

function found(row: BackendRow | null): BackendRow {
  if (row === null) throw unknown();
  return row;
}

const unknown = () => new MaskrouteError('not_found', 'There is no such backend.');
