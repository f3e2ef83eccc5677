/**
 * The registry of backends, and their jobs: for administrators of all tenants. Other isolates see a change of the
 * registry within seconds.
 */
import { Hono } from 'hono';
import type { z } from 'zod';
import { deletedSchema, listSchema, searchQuerySchema } from '../../shared/admin/admin-wire.ts';
import {
  createEdgeJobSchema,
  createEdgeScheduleSchema,
  JOB_ID_PATTERN,
  jobSchema,
  SCHEDULE_ID_PATTERN,
  scheduleSchema,
  storeJobSchema,
  uploadedDataSchema,
  uploadQuerySchema,
} from '../../shared/admin/job-wire.ts';
import { maskSetSchema } from '../../shared/mask/mask-set.ts';
import { createBackendSchema, updateBackendSchema } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse, requireUnpacked } from '../../shared/wire/parse-body.ts';
import { EVENT_STREAM_HEADERS } from '../../shared/wire/protocol.ts';
import type { JobQuestion } from '../backends/backend-jobs.ts';
import { DEFAULT_BACKEND, defaultBackend } from '../backends/registry.ts';
import {
  type BackendRow,
  deleteBackend,
  findBackend,
  insertBackend,
  listBackends,
  updateBackend,
} from '../db/backend-rows.ts';
import { d1, existing } from '../db/d1.ts';
import { writeMaskSet } from '../db/mask-set-rows.ts';
import { adminOf } from '../http/authentication.ts';
import { type AppContext, type AppEnv, holdOf } from '../http/context.ts';
import { readJson, readQuery } from '../http/request-body.ts';
import { storeMaskSet } from '../releases/publishing.ts';
import { requireGlobal, scopedTenant } from './scope.ts';

/* Jobs of a backend and their schedules; `shared/admin/job-wire.ts` describes them. */

const jobs = new Hono<AppEnv>()
  .get('/', async (c) => {
    const { q } = readQuery(c, searchQuerySchema);
    const query = q === undefined ? '' : `?q=${encodeURIComponent(q)}`;
    return c.json(await ask(c, listSchema(jobSchema), 'GET', query));
  })
  .post('/', async (c) => {
    const body = JSON.stringify(parse(createEdgeJobSchema, await readJson(c.req.raw)));
    return c.json(await ask(c, jobSchema, 'POST', '', body), 202);
  })
  .get('/data', async (c) => c.json(await ask(c, listSchema(uploadedDataSchema), 'GET', '/data')))
  .post('/data', async (c) => {
    const { name } = readQuery(c, uploadQuerySchema);
    const { body, headers } = c.req.raw;
    requireUnpacked(headers);
    if (body === null) throw new MaskrouteError('invalid_data', 'The data is empty.');
    const upload = await question(c, 'POST', `/data?name=${name}`, body);
    const { status, answer } = await c.get('services').jobs.ask(uploadedDataSchema, upload);
    return c.json(answer, status === 200 ? 200 : 201);
  })
  .get('/schedules', async (c) => c.json(await ask(c, listSchema(scheduleSchema), 'GET', '/schedules')))
  .post('/schedules', async (c) => {
    const { job, ...times } = parse(createEdgeScheduleSchema, await readJson(c.req.raw));
    const publish = job.publish && (await atThisEdge(c, job.publish));
    const body = JSON.stringify({ ...times, job: { ...job, publish } });
    return c.json(await ask(c, scheduleSchema, 'POST', '/schedules', body), 201);
  })
  .get('/schedules/:schedule', async (c) => c.json(await ask(c, scheduleSchema, 'GET', schedulePath(c))))
  .delete('/schedules/:schedule', async (c) => {
    const path = schedulePath(c);
    c.set('before', await ask(c, scheduleSchema, 'GET', path));
    return c.json(await ask(c, deletedSchema, 'DELETE', path));
  })
  .get('/:job', async (c) => c.json(await ask(c, jobSchema, 'GET', jobPath(c))))
  .get('/:job/events', async (c) => {
    const events = await c.var.services.jobs.follow(await question(c, 'GET', `${jobPath(c)}/events`));
    return c.body(events, 200, EVENT_STREAM_HEADERS);
  })
  .post('/:job/cancel', async (c) => c.json(await ask(c, jobSchema, 'POST', `${jobPath(c)}/cancel`)))
  .post('/:job/store', async (c) => {
    const { tenant: named } = parse(storeJobSchema, await readJson(c.req.raw));
    const tenant = await scopedTenant(c, named);
    const set = await ask(c, maskSetSchema, 'GET', `${jobPath(c)}/mask-set`);
    const { created, summary } = await storeMaskSet(c.var.services.db, tenant, writeMaskSet(set));
    return c.json(summary, created ? 201 : 200);
  });

type Publish = NonNullable<z.output<typeof createEdgeScheduleSchema>['job']['publish']>;

/**
 * Completes a schedule's `publish` with this edge's address. A key that may not publish is refused now, as the first
 * job may be days away.
 * @throws MaskrouteError `invalid_request`, `not_found` for an unknown tenant.
 */
async function atThisEdge(c: AppContext, publish: Publish): Promise<Publish & { readonly edge: string }> {
  const { EDGE_URL } = c.get('services').config;
  if (EDGE_URL === undefined)
    throw wrong('job.publish', 'this edge does not know its own address (EDGE_URL).');
  const tenant = await scopedTenant(c, publish.tenant);
  const mayPublish = await adminOf(c, publish.admin_key).then(
    (admin) => admin.role !== 'viewer' && (admin.tenant === undefined || admin.tenant === tenant),
    (error) => {
      // Status 401 or 403 would seem to be about the caller's own key.
      if (error instanceof MaskrouteError && ['invalid_api_key', 'forbidden'].includes(error.code))
        return false;
      throw error;
    },
  );
  if (!mayPublish) throw wrong('job.publish.admin_key', 'this key may not publish for that tenant.');
  return { ...publish, edge: EDGE_URL };
}

const wrong = (param: string, message: string): MaskrouteError =>
  new MaskrouteError('invalid_request', `${param}: ${message}`, { param });

const ask = async <T extends z.ZodType>(
  c: AppContext,
  schema: T,
  method: JobQuestion['method'],
  path: string,
  body?: JobQuestion['body'],
) => (await c.get('services').jobs.ask(schema, await question(c, method, path, body))).answer;

async function question(
  c: AppContext,
  method: JobQuestion['method'],
  path: string,
  body?: JobQuestion['body'],
): Promise<JobQuestion> {
  const { url } = await listedBackend(c);
  const { signal } = c.req.raw;
  return {
    url,
    method,
    path,
    requestId: c.get('requestId'),
    signal,
    ...(body === undefined ? {} : { body }),
  };
}

/**
 * A backend of the list, also a disabled one: a backend without requests has time to learn.
 * @throws MaskrouteError `not_found`.
 */
async function listedBackend(c: AppContext): Promise<BackendRow> {
  const { db, config } = c.get('services');
  const id = c.req.param('id') ?? '';
  const isDefault = id === DEFAULT_BACKEND && (await d1(listBackends(db))).length === 0;
  return isDefault ? defaultBackend(config.BACKEND_URL) : await existing(findBackend(db, id), NOT_FOUND);
}

/**
 * The job's path at the backend. @throws MaskrouteError `not_found` unless the parameter is a valid id, so that no
 * other path can be built.
 */
const jobPath = (c: AppContext): string => `/${idOf(c, 'job', JOB_ID_PATTERN)}`;
const schedulePath = (c: AppContext): string => `/schedules/${idOf(c, 'schedule', SCHEDULE_ID_PATTERN)}`;

function idOf(c: AppContext, kind: 'job' | 'schedule', pattern: RegExp): string {
  const id = c.req.param(kind) ?? '';
  if (pattern.test(id)) return id;
  throw new MaskrouteError('not_found', `There is no such ${kind}.`);
}

/* The registry. */

export const backends = new Hono<AppEnv>()
  .use(async (c, next) => {
    requireGlobal(c);
    await next();
  })
  .route('/:id/jobs', jobs)
  .get('/', async (c) => {
    const { q } = readQuery(c, searchQuerySchema);
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
  .get('/:id', async (c) => c.json(c.var.services.backend.describe(await listedBackend(c))))
  .patch('/:id', async (c) => {
    const change = parse(updateBackendSchema, await readJson(c.req.raw));
    const { db } = c.var.services;
    const id = c.req.param('id');
    c.set('before', await d1(findBackend(db, id)));
    return await changed(c, await existing(updateBackend(db, id, change, Date.now()), NOT_FOUND), 200);
  })
  .delete('/:id', async (c) => {
    const { db } = c.var.services;
    const id = c.req.param('id');
    c.set('before', await d1(findBackend(db, id)));
    if (!(await d1(deleteBackend(db, id)))) throw new MaskrouteError('not_found', NOT_FOUND);
    await hearOfChange(c);
    return c.json({ id, deleted: true });
  });

const hasText = ({ id, url }: BackendRow, text = ''): boolean =>
  `${id} ${url}`.toLowerCase().includes(text.toLowerCase());

async function changed(c: AppContext, row: BackendRow, status: 200 | 201): Promise<Response> {
  await hearOfChange(c);
  return c.json(c.var.services.backend.describe(row), status);
}

/** Refreshes this isolate's registry at once. If that fails, it sees the change a moment later, like all others. */
const hearOfChange = (c: AppContext): Promise<void> =>
  c.var.services.backend.refresh(holdOf(c)).catch(() => {});

const NOT_FOUND = 'There is no such backend.';
