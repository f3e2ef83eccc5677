/**
 * A backend's jobs through the edge: the worker in workerd in front of the real server with its real line of jobs. What
 * a job runs is scripted, so that it fails, hangs and ends when the test wants.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { type Jobs, openJobs } from '../../../gpu-backend/jobs/job-queue.ts';
import { openSchedules, type Schedules } from '../../../gpu-backend/jobs/schedules.ts';
import { readMaskSet } from '../../../gpu-backend/publication/publish.ts';
import type { AuditEntry, CreatedKey } from '../../../shared/admin/admin-wire.ts';
import {
  isFinished,
  type Job,
  jobSchema,
  type Schedule,
  type UploadedData,
} from '../../../shared/admin/job-wire.ts';
import type { LivePublication, MaskSetSummary, Publication } from '../../../shared/admin/publication-wire.ts';
import type { ModelHash, SurrogatesId } from '../../../shared/mask/mask.ts';
import { answer, BACKEND_KEY, eventually, parseSse, serveModel, type TestServer } from '../api/harness.ts';
import { bytesOf, scriptedEngine, scriptedModel } from '../api/scripted-engine.ts';
import { saidInProcess } from '../cli/in-process.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const entry = fileURLToPath(new URL('../jobs/fixtures/command.ts', import.meta.url));
const NOBODY = 'http://127.0.0.1:9';
const PRESET = 'gpu-backend/presets/smollm2-135m-instruct/mask-set.json';

let home: string;
let jobs: Jobs;
let schedules: Schedules;
let server: TestServer;
let edge: Edge;
beforeAll(async () => {
  home = mkdtempSync(path.join(tmpdir(), 'edge-jobs-'));
  vi.stubEnv('PUBLISH_FOR_REAL', '1');
  const options = { home, model: 'scripted', backendKeys: [BACKEND_KEY] as const, note: () => {} };
  jobs = (await openJobs({ ...options, entry, dataFolder: undefined }))!;
  schedules = await openSchedules(options, jobs);
  // What the jobs learn is the preset's, so its model is served.
  const { model: learned, surrogates } = await readMaskSet(PRESET);
  const served = {
    hash: learned.hash as ModelHash,
    blockCount: learned.blockCount,
    ...(surrogates === undefined ? {} : { surrogates: surrogates as SurrogatesId }),
  };
  const model = scriptedModel(scriptedEngine({ answer: () => bytesOf('abc') }, served));
  server = await serveModel(model, {}, { jobs: { jobs, schedules }, audience: undefined });
  edge = await startEdge({
    projectFolder: path.resolve('.'),
    stateFolder: undefined,
    port: 0,
    bindings: { BACKEND_URL: server.url, BACKEND_KEY, ADMIN_KEY },
  });
}, 60_000);
afterAll(async () => {
  await edge?.close();
  await server?.[Symbol.asyncDispose]();
  await schedules?.close();
  await jobs?.close();
  vi.unstubAllEnvs();
  rmSync(home, { recursive: true, force: true });
});

const call = (method: string, route: string, body?: unknown, key = ADMIN_KEY) =>
  fetch(`${edge.url}/admin/v1${route}`, {
    method,
    headers: {
      authorization: `Bearer ${key}`,
      'content-type': typeof body === 'string' ? 'application/x-ndjson' : 'application/json',
    },
    ...(body === undefined ? {} : { body: typeof body === 'string' ? body : JSON.stringify(body) }),
  });
const JOBS = '/backends/default/jobs';
const job = async (id: string) => jobSchema.parse(await answer(call('GET', `${JOBS}/${id}`), 200));

const learn = { kind: 'learn', clusters: 2, sparsity: 0.1 };
const uploaded = new Set<string>();
/** The name of the data says what its job will do; the edge says whether it is new. */
async function upload(behaviour: string): Promise<string> {
  const status = uploaded.has(behaviour) ? 200 : 201;
  uploaded.add(behaviour);
  const sent = call('POST', `${JOBS}/data?name=${behaviour}`, '{"text": "x"}\n');
  return (await answer<UploadedData>(sent, status)).id;
}
const create = async (behaviour: string, more: Partial<typeof learn> = {}): Promise<Job> =>
  answer(call('POST', JOBS, { ...learn, ...more, data: [{ upload: await upload(behaviour) }] }), 202);

describe('an operator of the edge', () => {
  it('has a backend learn, follows it, and stores what came of it', async () => {
    const { id, request } = await create('ok');
    expect(request.model).toBe('scripted');
    const stream = await call('GET', `${JOBS}/${id}/events`);
    expect(stream.headers.get('content-type')).toMatch(/^text\/event-stream/);
    const { events } = parseSse(await stream.text());
    const seen = events.map(({ data }) => jobSchema.parse(JSON.parse(data)));
    expect(seen.at(-1)).toMatchObject({ id, status: 'succeeded' });
    const list = await answer<{ data: Job[] }>(call('GET', JOBS), 200);
    expect(list.data.map((entry) => entry.id)).toContain(id);

    await answer(call('POST', '/tenants', { id: 'acme', name: 'Acme' }), 201);
    const store = (tenant: string) => call('POST', `${JOBS}/${id}/store`, { tenant });
    const stored = await answer<MaskSetSummary>(store('acme'), 201);
    expect(stored).toMatchObject({ tenant: 'acme', version: seen.at(-1)!.result!.version });
    expect(await answer(store('acme'), 200)).toEqual(stored);
    const sets = await answer<{ data: MaskSetSummary[] }>(call('GET', '/mask-sets?tenant=acme'), 200);
    expect(sets.data.map(({ version }) => version)).toEqual([stored.version]);
    await answer(store('nobody'), 404);
  });

  it('cancels it, and is told why one failed', async () => {
    const { id } = await create('hang');
    await eventually(async () => (await job(id)).progress !== null, 15_000);
    await answer(call('POST', `${JOBS}/${id}/store`, {}), 409);
    expect(await answer(call('POST', `${JOBS}/${id}/cancel`), 200)).toMatchObject({ status: 'cancelled' });
    const { id: failing } = await create('fail');
    await eventually(async () => isFinished(await job(failing)), 15_000);
    expect(await job(failing)).toMatchObject({
      status: 'failed',
      error: expect.stringContaining('The data is of no use.'),
    });
  });

  it('who leaves while following it leaves nothing behind', async () => {
    // An equal job would go on behind where the cancelled one hung, and end.
    const { id } = await create('hang', { sparsity: 0.2 });
    const left = new AbortController();
    const stream = await fetch(`${edge.url}/admin/v1${JOBS}/${id}/events`, {
      headers: { authorization: `Bearer ${ADMIN_KEY}` },
      signal: left.signal,
    });
    await stream.body!.getReader().read();
    left.abort();
    expect(await answer(call('POST', `${JOBS}/${id}/cancel`), 200)).toMatchObject({ status: 'cancelled' });
  });

  it.each([
    [{ ...learn, data: [{ path: 'x.jsonl' }] }, '403 forbidden'],
    [{ ...learn, data: [{ upload: `data_${'0'.repeat(24)}` }] }, '404 not_found'],
    [{ ...learn, data: [] }, '400 invalid_request'],
    [
      { ...learn, data: [{ path: 'x' }], publish: { edge: 'https://e.test', admin_key: 'k' } },
      '400 invalid_request',
    ],
  ])('is refused %j with the reason', async (body, expected) => {
    const response = await call('POST', JOBS, body);
    const { error } = (await response.json()) as { error: { code: string } };
    expect(`${response.status} ${error.code}`).toBe(expected);
  });

  it('finds no other backend, job or path', async () => {
    await answer(call('GET', '/backends/nobody/jobs'), 404);
    for (const id of ['job_0', `job_${'0'.repeat(24)}`, '..%2Fload', '%2e%2e']) {
      await answer(call('GET', `${JOBS}/${id}`), 404);
      await answer(call('POST', `${JOBS}/${id}/cancel`), 404);
    }
    await answer(call('POST', `${JOBS}/data?name=..%2Fx`, '{}'), 400);
    await answer(call('POST', `${JOBS}/data`), 400);
  });
});

/** What it prints; with the admin key, and no other. */
async function maskroute(...args: string[]): Promise<string> {
  const env = { MASKROUTE_HOME: home, MASKROUTE_ADMIN_KEY: ADMIN_KEY, MASKROUTE_BACKEND_KEY: '' };
  const { status, stdout, stderr } = await saidInProcess(env, args);
  expect(status, stderr).toBe(0);
  return stdout;
}

describe('a schedule', () => {
  const SCHEDULES = `${JOBS}/schedules`;
  const rollout = [{ share: 0.1, duration_s: 600 }];
  const bounds = { error_rate_max: 0.02, requests_min: 50 };
  const newTenant = (id: string) => answer(call('POST', '/tenants', { id, name: id }), 201);
  const newKey = (body: object) => answer<CreatedKey>(call('POST', '/keys', { name: 'x', ...body }), 201);
  const again = async (publish?: object) => ({
    every: '24h',
    job: { ...learn, data: [{ upload: await upload('ok') }], publish },
  });

  it('publishes here what it learned, by its own key, as by hand; and is rolled back as by hand', async () => {
    await newTenant('again');
    const { key, id: keyId } = await newKey({ kind: 'tenant_admin', tenant: 'again' });
    const publish = { tenant: 'again', activate: true, admin_key: key, rollout, auto_rollback: bounds };
    const body = { ...(await again(publish)), first_at: new Date().toISOString() };
    const made = await answer<Schedule>(call('POST', SCHEDULES, body), 201);
    expect(made.job.publish).toMatchObject({ edge: edge.url.replace('localhost', '127.0.0.1') });
    const list = await answer<{ data: Schedule[] }>(call('GET', SCHEDULES), 200);
    expect(JSON.stringify(list)).not.toContain(key);
    expect(list.data.map(({ id }) => id)).toEqual([made.id]);

    const done = () => jobs.list().find(({ schedule }) => schedule === made.id);
    await eventually(() => done() !== undefined && isFinished(done()!), 30_000);
    expect(done()).toMatchObject({ status: 'succeeded', error: null });
    const live = await answer<LivePublication>(call('GET', '/publications/live?tenant=again'), 200);
    expect(live).toMatchObject({ version: done()!.result!.version, share: 0.1, actor: keyId });

    // By hand, for another tenant: nothing differs but whose it is, when it was, and who did it.
    await newTenant('by-hand');
    const { id } = done()!;
    const { version } = await answer<MaskSetSummary>(
      call('POST', `${JOBS}/${id}/store`, { tenant: 'by-hand' }),
      201,
    );
    const byHand = { version, tenant: 'by-hand', rollout, auto_rollback: bounds };
    await answer<Publication>(call('POST', '/publications', byHand), 201);
    const other = await answer<LivePublication>(call('GET', '/publications/live?tenant=by-hand'), 200);
    const {
      id: _i,
      tenant: _t,
      actor: _a,
      created_at: _c,
      activate_at: _w,
      next_step_at: _n,
      ...same
    } = other;
    expect(live).toMatchObject(same);
    for (const tenant of ['again', 'by-hand']) {
      const back = await answer<Publication>(call('POST', '/publications/rollback', { tenant }), 201);
      expect(back).toMatchObject({ action: 'rollback', replaced_version: version, version: null });
    }
    const gone = await answer(call('DELETE', `${SCHEDULES}/${made.id}`), 200);
    expect(gone).toEqual({ id: made.id, deleted: true });
    const audit = await answer<{ data: AuditEntry[] }>(call('GET', '/audit?limit=1'), 200);
    expect(audit.data[0]).toMatchObject({
      action: 'DELETE /backends/:id/jobs/schedules/:schedule',
      actor: 'root',
      before: { id: made.id, every: '24h' },
    });
    expect(JSON.stringify(audit)).not.toContain(key);
    await answer(call('GET', `${SCHEDULES}/${made.id}`), 404);
  }, 60_000);

  it('is refused where it could never publish, with the field that is wrong', async () => {
    await newTenant('one');
    await newTenant('two');
    const { key } = await newKey({ kind: 'tenant_admin', tenant: 'one' });
    const { key: reads } = await newKey({ kind: 'viewer' });
    const { key: sends } = await newKey({ tenant: 'one' });
    const refused: [object, string][] = [
      [{ tenant: 'two', admin_key: key }, '400 job.publish.admin_key'],
      [{ tenant: '', admin_key: key }, '400 job.publish.admin_key'],
      [{ tenant: 'one', admin_key: reads }, '400 job.publish.admin_key'],
      [{ tenant: 'one', admin_key: sends }, '400 job.publish.admin_key'],
      [{ tenant: 'one', admin_key: 'a key that is none' }, '400 job.publish.admin_key'],
      [{ tenant: 'nobody', admin_key: key }, '404 tenant'],
      [{ tenant: 'one', admin_key: key, edge: 'https://elsewhere.test' }, '400 job.publish.edge'],
      [{ tenant: 'one', admin_key: key, rollout }, '400 job.publish.activate'],
    ];
    for (const [publish, expected] of refused) {
      const response = await call('POST', SCHEDULES, await again(publish));
      const { error } = (await response.json()) as { error: { param: string; message: string } };
      expect(`${response.status} ${error.param}`, error.message).toBe(expected);
    }
    await answer(call('POST', SCHEDULES, { ...(await again()), every: 'often' }), 400);
    await answer(call('GET', `${SCHEDULES}/..%2Fdata`), 404);
    await answer(call('DELETE', `${SCHEDULES}/schedule_${'0'.repeat(24)}`), 404);
    expect(schedules.list()).toEqual([]);
  });

  it('is added, listed and removed on the command line, without the backend key', async () => {
    const file = path.join(home, 'job.json');
    writeFileSync(file, JSON.stringify((await again()).job));
    const at = ['--edge', edge.url, '--on', 'default', '--json'];
    const made = JSON.parse(await maskroute('schedule', 'add', file, '--every', '7d', ...at));
    expect(made).toMatchObject({ every: '7d', last_job: null });
    expect(JSON.parse(await maskroute('schedule', 'list', ...at))).toEqual([made]);
    expect(await maskroute('status', '--edge', edge.url)).toContain(`again   ${made.id} every 7d`);
    await maskroute('schedule', 'remove', made.id, ...at);
    expect(JSON.parse(await maskroute('schedule', 'list', ...at))).toEqual([]);
  });

  it('is for those who administrate everything; who reads everything sees it', async () => {
    await newTenant('third');
    const { key: own } = await newKey({ kind: 'tenant_admin', tenant: 'third' });
    const { key: reads } = await newKey({ kind: 'viewer' });
    const body = await again();
    await answer(call('GET', SCHEDULES, undefined, own), 403);
    await answer(call('POST', SCHEDULES, body, own), 403);
    await answer(call('GET', SCHEDULES, undefined, reads), 200);
    await answer(call('POST', SCHEDULES, body, reads), 403);
    const made = await answer<Schedule>(call('POST', SCHEDULES, body), 201);
    await answer(call('DELETE', `${SCHEDULES}/${made.id}`, undefined, reads), 403);
    await answer(call('DELETE', `${SCHEDULES}/${made.id}`), 200);
  });
});

it("a tenant's own administrator starts, sees and cancels no jobs", async () => {
  await answer(call('POST', '/tenants', { id: 'other', name: 'Other' }), 201);
  const body = { kind: 'tenant_admin', tenant: 'other', name: 'x' };
  const { key } = await answer<CreatedKey>(call('POST', '/keys', body), 201);
  const { id } = await create('ok');
  await answer(call('GET', JOBS, undefined, key), 403);
  await answer(call('POST', JOBS, { ...learn, data: [{ path: 'x' }] }, key), 403);
  await answer(call('GET', `${JOBS}/${id}/events`, undefined, key), 403);
  await answer(call('POST', `${JOBS}/${id}/cancel`, {}, key), 403);
  await answer(call('POST', `${JOBS}/data?name=x`, '{}', key), 403);
});

it('a backend that leaves its jobs to another of its home has none, and is not called silent', async () => {
  const model = scriptedModel(scriptedEngine({ answer: () => bytesOf('abc') }));
  await using idle = await serveModel(model, {}, { audience: undefined });
  await answer(call('POST', '/backends', { id: 'idle', url: idle.url }), 201);
  const { backends } = JSON.parse(await maskroute('status', '--edge', edge.url, '--json'));
  expect(backends.find(({ id }: { id: string }) => id === 'idle')).toMatchObject({ jobs: [], schedules: [] });
  await answer(call('DELETE', '/backends/idle'), 200);
});

it('a backend that is gone is 503, and gets no key that opens others', async () => {
  await answer(call('POST', '/backends', { id: 'gone', url: NOBODY }), 201);
  const refused = await call('GET', '/backends/gone/jobs');
  expect(refused.headers.get('retry-after')).toBe('1');
  await answer(Promise.resolve(refused), 503);
  // A registered address may be anybody's: what it is sent is a token for that address alone.
  const { createServer } = await import('node:http');
  let sent = '';
  const stranger = createServer((request, response) => {
    sent = String(request.headers.authorization);
    response.writeHead(401, { 'content-type': 'application/json' }).end('{}');
  });
  await new Promise<void>((resolve) => stranger.listen(0, '127.0.0.1', resolve));
  const { port } = stranger.address() as { port: number };
  await answer(call('POST', '/backends', { id: 'stranger', url: `http://127.0.0.1:${port}` }), 201);
  await answer(call('GET', '/backends/stranger/jobs'), 502);
  stranger.close();
  expect(sent).toMatch(/^Bearer eyJ/);
  expect(sent).not.toContain(BACKEND_KEY);
  const claims = JSON.parse(Buffer.from(sent.split('.')[1]!, 'base64url').toString());
  expect(claims).toMatchObject({ scope: 'jobs', audience: `http://127.0.0.1:${port}` });
});
