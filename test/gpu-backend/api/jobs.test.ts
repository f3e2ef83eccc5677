/** Learning as a job over HTTP: a real backend over a tiny model, the real command line beside it, killed half-way. */
import { existsSync, readFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Job, jobSchema, scheduleSchema, type UploadedData } from '../../../shared/admin/job-wire.ts';
import { maskSetSchema } from '../../../shared/mask/mask-set.ts';
import { EVENT_STREAM_HEADERS } from '../../../shared/wire/protocol.ts';
import { importTokenKey, signToken } from '../../../shared/wire/service-token.ts';
import { type Served, serve } from '../../support/serve.ts';
import { installTinyModel } from '../../support/tiny-model.ts';
import { saidInProcess } from '../cli/in-process.ts';
import { startJobsEdge } from '../jobs/fixtures/edge.ts';
import { writeSmallData } from '../learning/small-run.ts';
import { answer, BACKEND_KEY, eventually, parseSse } from './harness.ts';

const LEARN_TIMEOUT_ms = 420_000;
let home = '';
let files: string[] = [];
let edge: Awaited<ReturnType<typeof startJobsEdge>>;
let backend: { readonly url: string; readonly kill: Served['kill'] };

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), 'maskroute-job-api-'));
  const { manifest } = await installTinyModel(join(home, 'models', 'tiny'), 'q8', { contextTokens: 128 });
  await writeFile(join(home, 'models', 'tiny', 'model.json'), JSON.stringify(manifest));
  files = await writeSmallData(join(home, 'data'));
  edge = await startJobsEdge();
  backend = await startBackend();
}, 60_000);
afterAll(async () => {
  await backend?.kill();
  await edge?.close();
  await rm(home, { recursive: true, force: true });
});

async function startBackend(): Promise<typeof backend> {
  const { url, kill } = serve('tiny', { MASKROUTE_HOME: home, MASKROUTE_BACKEND_KEY: BACKEND_KEY });
  return { url: await url, kill };
}

const call = (method: string, path: string, body?: unknown, key = BACKEND_KEY) =>
  fetch(backend.url + path, {
    method,
    headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
    ...(body === undefined ? {} : { body: typeof body === 'string' ? body : JSON.stringify(body) }),
  });
const job = async (id: string) => jobSchema.parse(await answer(call('GET', `/v1/jobs/${id}`), 200));

async function createJob(): Promise<Job> {
  const data = await Promise.all(
    files.map(async (file) => {
      const name = file.endsWith('sums.jsonl') ? 'sums' : 'trips';
      const upload = call('POST', `/v1/jobs/data?name=${name}`, readFileSync(file, 'utf8'));
      const { id } = JSON.parse(await (await upload).text()) as UploadedData;
      return { upload: id };
    }),
  );
  const request = { kind: 'learn', data, clusters: 1, sparsity: 0.25, rows: 10, name: 'small' };
  return await answer(call('POST', '/v1/jobs', request), 202);
}

describe('a learning job', () => {
  it(
    'learns while the backend serves, goes on after the backend was killed, and gives its mask set',
    async () => {
      const { id } = await createJob();
      await eventually(async () => (await job(id)).progress !== null, LEARN_TIMEOUT_ms);
      const chat = { model: 'tiny', messages: [{ role: 'user', content: 'hi' }], max_tokens: 4 };
      expect((await call('POST', '/v1/chat/completions', chat)).status).toBe(200);

      await backend.kill();
      expect(existsSync(join(home, 'jobs', id, 'out', 'mask-set.json'))).toBe(false);
      backend = await startBackend();

      const stream = await call('GET', `/v1/jobs/${id}/events`);
      expect(Object.fromEntries(stream.headers)).toMatchObject(EVENT_STREAM_HEADERS);
      const { events } = parseSse(await stream.text());
      expect(events.every(({ event }) => event === 'job')).toBe(true);
      const last = jobSchema.parse(JSON.parse(events.at(-1)!.data));
      expect(last).toMatchObject({ status: 'succeeded', starts: 2, error: null });

      const set = maskSetSchema.parse(await answer(call('GET', `/v1/jobs/${id}/mask-set`), 200));
      expect(set).toMatchObject({ name: 'small', targetSparsity: 0.25 });
      expect(set.clusters).toHaveLength(1);
      expect(await answer(call('GET', `/v1/jobs/${id}/report`), 200)).toHaveProperty('clusters');
      const found = async (q: string) =>
        (await answer<{ data: Job[] }>(call('GET', `/v1/jobs${q}`), 200)).data.map((job) => job.id);
      expect(await found('')).toEqual([id]);
      for (const q of [id.slice(0, 8), 'SMALL', 'succeeded']) expect(await found(`?q=${q}`)).toEqual([id]);
      expect(await found('?q=other')).toEqual([]);
    },
    LEARN_TIMEOUT_ms,
  );

  it(
    'is cancelled within seconds',
    async () => {
      const { id } = await createJob();
      await eventually(async () => (await job(id)).progress !== null, LEARN_TIMEOUT_ms);
      expect(await answer(call('POST', `/v1/jobs/${id}/cancel`), 200)).toMatchObject({ status: 'cancelled' });
      await answer(call('GET', `/v1/jobs/${id}/mask-set`), 409);
    },
    LEARN_TIMEOUT_ms,
  );
});

it('two backends that share a home do not run its jobs twice; when one is killed, the other runs them', async () => {
  const [first, second] = [backend, await startBackend()];
  const jobs = (url: string) =>
    fetch(`${url}/v1/jobs`, { headers: { authorization: `Bearer ${BACKEND_KEY}` } });
  const { error } = await answer<{ error: { message: string } }>(jobs(second.url), 404);
  expect(error.message).toMatch(/same MASKROUTE_HOME/);
  await answer(jobs(first.url), 200);
  backend = second;
  await first.kill();
  await eventually(async () => (await jobs(second.url)).status === 200, 60_000);
}, 120_000);

describe('the endpoints', () => {
  it('are for holders of the backend key', async () => {
    const now_s = Math.floor(Date.now() / 1000);
    const claims = { tenant: 'acme', issuedAt_s: now_s, expiresAt_s: now_s + 60, edge: '' };
    for (const [method, path] of [
      ['GET', '/v1/jobs'],
      ['POST', '/v1/jobs'],
      ['POST', '/v1/jobs/data'],
      ['GET', '/v1/jobs/data'],
      ['GET', '/v1/jobs/schedules'],
    ] as const) {
      const nonce = `nonce-${method}-${path}`;
      const token = await signToken(await importTokenKey(BACKEND_KEY), { ...claims, nonce });
      expect((await call(method, path, method === 'POST' ? {} : undefined, token)).status).toBe(403);
      expect((await call(method, path, method === 'POST' ? {} : undefined, 'wrong')).status).toBe(401);
    }
  });

  it.each([
    [{}, 400],
    [{ kind: 'learn', data: [], clusters: 2, sparsity: 0.1 }, 400],
    [{ kind: 'learn', data: [{ upload: 'x' }], clusters: 2, sparsity: 0.1 }, 400],
    [{ kind: 'learn', data: [{ path: '/etc/passwd' }], clusters: 2, sparsity: 0.1 }, 403],
    [{ kind: 'learn', data: [{ upload: `data_${'0'.repeat(24)}` }], clusters: 2, sparsity: 0.1 }, 404],
    [{ kind: 'learn', data: [{ upload: `data_${'0'.repeat(24)}` }], clusters: 2, sparsity: 1 }, 400],
    [{ kind: 'learn', data: [{ upload: `data_${'0'.repeat(24)}` }], clusters: 2, sparsity: 0 }, 400],
    ['{', 400],
  ])('refuse %j with %i', async (body, status) => {
    expect((await call('POST', '/v1/jobs', body)).status).toBe(status);
  });

  it('know no other job, name or data', async () => {
    for (const path of ['', '/events', '/mask-set', '/report']) {
      await answer(call('GET', `/v1/jobs/job_0${path}`), 404);
    }
    await answer(call('POST', '/v1/jobs/data?name=../x', '{}'), 400);
    await answer(call('POST', '/v1/jobs/data', ''), 400);
    const headers = { authorization: `Bearer ${BACKEND_KEY}`, 'content-encoding': 'gzip' };
    await answer(fetch(`${backend.url}/v1/jobs/data`, { method: 'POST', headers, body: '{}' }), 415);
    await answer(call('DELETE', '/v1/jobs/data/data_0'), 404);
    await answer(call('GET', '/v1/jobs/schedules/schedule_0'), 404);
    await answer(call('DELETE', '/v1/jobs/schedules/schedule_0'), 404);
  });
});

describe('a schedule', () => {
  /** As a person types it. */
  const maskroute = async (...args: string[]) => {
    const env = { MASKROUTE_HOME: home, MASKROUTE_BACKEND_KEY: BACKEND_KEY, MASKROUTE_ADMIN_KEY: 'k' };
    return (await saidInProcess(env, ['schedule', ...args])).stdout;
  };

  it('is made, listed and removed over HTTP and on the command line', async () => {
    const upload = call('POST', '/v1/jobs/data?name=sums', readFileSync(files[0]!, 'utf8'));
    const { id: data } = JSON.parse(await (await upload).text()) as UploadedData;
    const publish = {
      edge: edge.url,
      activate: true,
      rollout: [{ share: 0.1, duration_s: 60 }],
    };
    const asked = { kind: 'learn', data: [{ upload: data }], clusters: 1, sparsity: 0.25, publish };
    await writeFile(join(home, 'job.json'), JSON.stringify(asked));
    const flags = ['--backend', backend.url, '--json'];
    const made = scheduleSchema.parse(
      JSON.parse(await maskroute('add', join(home, 'job.json'), '--every', '24h', ...flags)),
    );
    expect(made).toMatchObject({ every: '24h', last_job: null, job: { model: 'tiny', publish } });
    expect(JSON.stringify(made)).not.toContain('admin_key');
    expect(await answer(call('GET', '/v1/jobs/schedules'), 200)).toEqual({ object: 'list', data: [made] });
    expect(await answer(call('GET', `/v1/jobs/schedules/${made.id}`), 200)).toEqual(made);
    expect(await maskroute('list', '--backend', backend.url)).toContain(`${made.id}  every 24h, next `);
    await answer(call('DELETE', `/v1/jobs/data/${data}`), 409);

    await backend.kill();
    backend = await startBackend();
    expect(await answer(call('GET', '/v1/jobs/schedules'), 200)).toMatchObject({ data: [made] });
    const removed = await maskroute('remove', made.id, '--backend', backend.url, '--json');
    expect(JSON.parse(removed)).toEqual({ id: made.id, deleted: true });
    await answer(call('DELETE', `/v1/jobs/data/${data}`), 200);
    await answer(call('POST', '/v1/jobs/schedules', { every: '1s', job: asked }), 400);
  }, 60_000);
});
