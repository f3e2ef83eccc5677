/**
 * A backend's jobs through the edge: the worker in workerd in front of the real server with its real line of jobs. What
 * a job runs is scripted, so that it fails, hangs and ends when the test wants.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { type Jobs, openJobs } from '../../../gpu-backend/jobs/job-queue.ts';
import type { CreatedKey } from '../../../shared/admin/admin-wire.ts';
import { isFinished, type Job, jobSchema, type UploadedData } from '../../../shared/admin/job-wire.ts';
import type { MaskSetSummary } from '../../../shared/admin/publication-wire.ts';
import { BACKEND_KEY, eventually, parseSse, serveModel, type TestServer } from '../api/harness.ts';
import { bytesOf, scriptedEngine, scriptedModel } from '../api/scripted-engine.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const entry = fileURLToPath(new URL('../jobs/fixtures/command.ts', import.meta.url));
const NOBODY = 'http://127.0.0.1:9';

let home: string;
let jobs: Jobs;
let server: TestServer;
let edge: Edge;
beforeAll(async () => {
  home = mkdtempSync(path.join(tmpdir(), 'edge-jobs-'));
  jobs = await openJobs({
    ...{ home, model: 'scripted', backendKey: BACKEND_KEY, entry },
    ...{ dataFolder: undefined, note: () => {} },
  });
  const model = scriptedModel(scriptedEngine({ answer: () => bytesOf('abc') }));
  server = await serveModel(model, {}, { jobs, audience: undefined });
  edge = await startEdge({
    ...{ projectFolder: path.resolve('.'), stateFolder: undefined, port: 0 },
    bindings: { BACKEND_URL: server.url, BACKEND_KEY, ADMIN_KEY },
  });
}, 60_000);
afterAll(async () => {
  await edge?.close();
  await server?.[Symbol.asyncDispose]();
  await jobs?.close();
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
async function answer<T>(response: Promise<Response>, status: number): Promise<T> {
  const got = await response;
  const text = await got.text();
  expect(got.status, text).toBe(status);
  return JSON.parse(text);
}
const JOBS = '/backends/default/jobs';
const job = async (id: string) => jobSchema.parse(await answer(call('GET', `${JOBS}/${id}`), 200));

const learn = { kind: 'learn', clusters: 2, sparsity: 0.1 };
/** The name of the data says what its job will do. */
async function create(behaviour: string): Promise<Job> {
  const upload = call('POST', `${JOBS}/data?name=${behaviour}`, '{"text": "x"}\n');
  const { id } = await answer<UploadedData>(upload, 201);
  return await answer(call('POST', JOBS, { ...learn, data: [{ upload: id }] }), 202);
}

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
    const { id } = await create('hang');
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
