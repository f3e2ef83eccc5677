/**
 * The endpoints for jobs and schedules; `shared/admin/job-wire.ts` describes their bodies. Only holders of the backend key
 * and operators of the edge may use them, since a job occupies this machine for long.
 */
import { Hono } from 'hono';
import { createMiddleware } from 'hono/factory';
import { searchQuerySchema } from '../../shared/admin/admin-wire.ts';
import {
  createJobSchema,
  createScheduleSchema,
  type Job,
  uploadQuerySchema,
} from '../../shared/admin/job-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse, requireUnpacked } from '../../shared/wire/parse-body.ts';
import { EVENT_STREAM_HEADERS } from '../../shared/wire/protocol.ts';
import type { HomeJobs } from '../jobs/home-jobs.ts';
import type { Jobs } from '../jobs/job-queue.ts';
import type { Schedules } from '../jobs/schedules.ts';
import { type ApiEnv, type ApiParts, tenantOf } from './parts.ts';
import { sseBody, sseEvent } from './sse.ts';

/** Whether a search text is in the job's id, status, name or model. */
const hasText = ({ id, status, request }: Job, text: string): boolean =>
  [id, status, request.name ?? '', request.model ?? ''].some((one) =>
    one.toLowerCase().includes(text.toLowerCase()),
  );

const operatorsOnly = createMiddleware<ApiEnv>(async (c, next) => {
  if (!c.get('caller').mayRunJobs) {
    throw new MaskrouteError(
      'forbidden',
      'Jobs are for holders of the backend key and operators of the edge.',
    );
  }
  await next();
});

/** @throws MaskrouteError `not_found` while this backend runs no jobs. */
function heldBy({ jobs }: ApiParts): NonNullable<HomeJobs['held']> {
  const held = jobs();
  if (held !== undefined) return held;
  throw new MaskrouteError(
    'not_found',
    'This backend runs no jobs. Of several backends with the same MASKROUTE_HOME one runs them; another takes over when it ends.',
  );
}

export function jobRoutes(parts: ApiParts): Hono<ApiEnv> {
  const { bodies, limits, lifecycle, log } = parts;
  const jobs = (): Jobs => heldBy(parts).jobs;
  const open = (): Jobs => {
    lifecycle.stopping.throwIfAborted();
    return jobs();
  };
  return new Hono<ApiEnv>()
    .use('/v1/jobs/*', operatorsOnly)
    .use('/v1/jobs', operatorsOnly)
    .get('/v1/jobs/data', async (c) => c.json({ object: 'list', data: await jobs().data.list() }))
    .post('/v1/jobs/data', async (c) => {
      const { name } = parse(uploadQuerySchema, c.req.query());
      requireUnpacked(c.req.raw.headers);
      const body = c.req.raw.body ?? new ReadableStream({ start: (controller) => controller.close() });
      const { created, data } = await open().data.add(name, body, lifecycle.stopping);
      return c.json(data, created ? 201 : 200);
    })
    .delete('/v1/jobs/data/:id', async (c) => {
      const id = c.req.param('id');
      await heldBy(parts).schedules.removeData(id);
      return c.json({ id, deleted: true });
    })
    .route('/v1/jobs/schedules', scheduleRoutes(parts))
    .get('/v1/jobs', (c) => {
      const { q } = parse(searchQuerySchema, c.req.query());
      const data = jobs()
        .list()
        .filter((job) => q === undefined || hasText(job, q));
      return c.json({ object: 'list', data });
    })
    .post('/v1/jobs', async (c) => {
      const request = parse(createJobSchema, await bodies.readJson(c.req.raw, tenantOf(c)));
      const job = await open().create(request);
      log.info({ request_id: c.get('requestId'), job: job.id, kind: job.request.kind }, 'job created');
      return c.json(job, 202);
    })
    .get('/v1/jobs/:id', (c) => c.json(jobs().get(c.req.param('id'))))
    .post('/v1/jobs/:id/cancel', async (c) => c.json(await jobs().cancel(c.req.param('id'))))
    .get('/v1/jobs/:id/mask-set', async (c) =>
      fileAnswer(await jobs().read(c.req.param('id'), 'mask-set.json')),
    )
    .get('/v1/jobs/:id/report', async (c) => fileAnswer(await jobs().read(c.req.param('id'), 'report.json')))
    .get('/v1/jobs/:id/events', (c) => {
      const left = new AbortController();
      const { id } = jobs().get(c.req.param('id'));
      const leave = () => left.abort();
      const onStall = () => {
        leave();
        c.env?.outgoing?.destroy();
      };
      const frames = eventFrames(jobs().follow(id, AbortSignal.any([left.signal, lifecycle.stopping])));
      return c.body(sseBody(frames, { ...limits, onCancel: leave, onStall }), 200, EVENT_STREAM_HEADERS);
    });
}

function scheduleRoutes(parts: ApiParts): Hono<ApiEnv> {
  const { bodies, lifecycle, log } = parts;
  const schedules = (): Schedules => heldBy(parts).schedules;
  return new Hono<ApiEnv>()
    .get('/', (c) => c.json({ object: 'list', data: schedules().list() }))
    .post('/', async (c) => {
      lifecycle.stopping.throwIfAborted();
      const body = await bodies.readJson(c.req.raw, tenantOf(c));
      const request = parse(createScheduleSchema, body);
      const schedule = await schedules().create(request);
      log.info({ request_id: c.get('requestId'), schedule: schedule.id }, 'schedule created');
      return c.json(schedule, 201);
    })
    .get('/:id', (c) => c.json(schedules().get(c.req.param('id'))))
    .delete('/:id', async (c) => {
      const id = c.req.param('id');
      await schedules().remove(id);
      log.info({ request_id: c.get('requestId'), schedule: id }, 'schedule removed');
      return c.json({ id, deleted: true });
    });
}

async function* eventFrames(changes: AsyncGenerator<Job, void>): AsyncGenerator<string, void> {
  for await (const job of changes) yield sseEvent('job', job);
}

const fileAnswer = (json: string): Response =>
  new Response(json, { headers: { 'content-type': 'application/json' } });
