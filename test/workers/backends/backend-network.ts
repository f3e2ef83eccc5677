/** Backends without a public name: everything that the edge asks of one goes through the network that is bound to it. */
import { env } from 'cloudflare:workers';
import { afterEach, expect, it, vi } from 'vitest';
import { z } from 'zod';
import { createBackendJobs } from '../../../workers/backends/backend-jobs.ts';
import { JOBS } from '../../../workers/limits.ts';
import { ADMIN_KEY, BACKEND_KEY } from '../../support/edge/constants.ts';
import { CHAT, call, chat, errorCode, freshIsolate, goLive, newTenant, recorded } from '../support/edge.ts';

afterEach(() => void vi.useRealTimers());

/** Nobody listens there; in the network it is the backend. */
const BACKEND_URL = 'http://127.0.0.1:9';
const BACKEND_NETWORK = env.TEST_NETWORK;

it('is what completions, streams, models, readiness and jobs travel through', async () => {
  const { tenant, key } = await newTenant();
  const { version } = await goLive('private', tenant);
  const isolate = freshIsolate({ BACKEND_URL, BACKEND_NETWORK });

  const whole = await chat(key, {}, isolate);
  expect(whole.status, await whole.text()).toBe(200);
  expect(whole.headers.get('x-maskroute-version')).toBe(version);
  const seen = await recorded(whole.headers.get('x-request-id')!);
  expect(seen!.headers.host).toBe('127.0.0.1:9');

  const stream = await chat(key, { stream: true }, isolate);
  expect(stream.headers.get('content-type')).toMatch(/^text\/event-stream/);
  expect(await stream.text()).toMatch(/data: \[DONE\]\s*$/);

  const models = await call('GET', '/v1/models', { key }, isolate);
  expect(await models.json()).toMatchObject({ data: [{ id: CHAT.model }, { id: `${CHAT.model}:dense` }] });
  expect((await call('GET', '/readyz', {}, isolate)).status).toBe(200);

  // This backend has no jobs and says so: the refusal is its own.
  const jobs = call('GET', '/admin/v1/backends/default/jobs', { key: ADMIN_KEY }, isolate);
  expect(await errorCode(jobs)).not.toBe('503 backend_unreachable');
});

it('may lead to who answers with codes that are none', async () => {
  for (const code of ['made_up', 'constructor', 'toString']) {
    const said = { error: { message: 'no', code, param: null } };
    const jobs = createBackendJobs(BACKEND_KEY, async () => Response.json(said, { status: 400 }));
    const question = { url: BACKEND_URL, method: 'GET', path: '', requestId: 'req' } as const;
    const asked = jobs.ask(z.unknown(), { ...question, signal: new AbortController().signal });
    await expect(asked).rejects.toMatchObject({ code: 'backend_error', status: 502 });
  }
});

it.each([201, 500])(
  'may lead to an upload’s answer of %s that stops half-way: it holds nothing for ever',
  async (status) => {
    const asked = Promise.withResolvers<void>();
    const jobs = createBackendJobs(BACKEND_KEY, async () => {
      asked.resolve();
      return new Response(
        new ReadableStream<Uint8Array>({ start: (c) => c.enqueue(new Uint8Array([123])) }),
        { status },
      );
    });
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    const question = { url: BACKEND_URL, method: 'POST', path: '/data', requestId: 'req' } as const;
    const body = new ReadableStream<Uint8Array>();
    const uploaded = jobs.ask(z.unknown(), { ...question, body, signal: new AbortController().signal });
    const refused = expect(uploaded).rejects.toMatchObject({ code: 'backend_error' });
    await asked.promise;
    await vi.advanceTimersByTimeAsync(JOBS.timeout_ms);
    await refused;
  },
);

it('is not to blame when the client hangs up, before an answer or half-way through it', async () => {
  const logged = vi.spyOn(console, 'error').mockImplementation(() => {});
  const question = { url: BACKEND_URL, method: 'GET', path: '', requestId: 'req' } as const;
  const broken = () => new ReadableStream({ start: (c) => c.error(new Error('gone')) });
  for (const answer of [() => Promise.reject(new Error('gone')), async () => new Response(broken())]) {
    const leave = new AbortController();
    const jobs = createBackendJobs(BACKEND_KEY, () => {
      leave.abort();
      return answer();
    });
    const asked = jobs.ask(z.unknown(), { ...question, signal: leave.signal });
    await expect(asked).rejects.toMatchObject({ code: 'cancelled' });
  }
  expect(logged).not.toHaveBeenCalled();
  logged.mockRestore();
});

it('is needed for an address that only it knows', async () => {
  const { key } = await newTenant();
  const isolate = freshIsolate({ BACKEND_URL });
  expect(await errorCode(chat(key, {}, isolate))).toBe('503 backend_unreachable');
  const jobs = call('GET', '/admin/v1/backends/default/jobs', { key: ADMIN_KEY }, isolate);
  expect(await errorCode(jobs)).toBe('503 backend_unreachable');
});
