/** Keys of the operator are rotated while requests go on, and a tenant's key is revoked while an answer streams under it. */
import { expect, it, vi } from 'vitest';
import type { SeenRequest } from '../../../shared/admin/requests-wire.ts';
import type { Env } from '../../../workers/env.ts';
import { ADMIN_KEY, BACKEND_KEY, BACKEND_KEY_2, EDGE_URL } from '../../support/edge/constants.ts';
import { mood, testBackends } from '../support/backends.ts';
import {
  admin,
  CHAT,
  call,
  chat,
  errorCode,
  freshIsolate,
  goLive,
  later,
  newTenant,
  recorded,
  say,
  soon,
} from '../support/edge.ts';

const NEXT_ADMIN_KEY = 'the-next-admin-key-0000000000';

/** What is deployed, one after the other; `npm start` and Cloudflare both start isolates with what is deployed then. */
const STEPS: Partial<Env>[] = [
  {},
  { BACKEND_KEY_2, ADMIN_KEY_2: NEXT_ADMIN_KEY },
  {
    BACKEND_KEY: BACKEND_KEY_2,
    BACKEND_KEY_2: BACKEND_KEY,
    ADMIN_KEY: NEXT_ADMIN_KEY,
    ADMIN_KEY_2: ADMIN_KEY,
  },
  { BACKEND_KEY: BACKEND_KEY_2, ADMIN_KEY: NEXT_ADMIN_KEY },
];
const AT_ONCE = 8;
const REQUESTS_A_STEP = 60;

it('BACKEND_KEY and ADMIN_KEY are rotated under load without a failed request', async () => {
  const backends = testBackends('rotated');
  // A door that checks each token as a backend of production does.
  const id = await backends.register();
  await mood(id, 'strict');
  await goLive('rotated');
  const { key } = await newTenant();
  let isolate = freshIsolate(STEPS[0]);
  const failed: string[] = [];
  const completions: string[] = [];
  let done = 0;
  const ask = async (until: number) => {
    while (done < until) {
      const number = done++;
      const options = { key, body: { ...CHAT, ...say(`north ${number}`) } };
      const response = await call('POST', '/v1/chat/completions', options, isolate);
      const text = await response.text();
      if (response.status === 200) completions.push(JSON.parse(text).id);
      else failed.push(text);
    }
  };
  for (const [index, step] of STEPS.entries()) {
    // The one before still answers while the next one comes up.
    const load = Array.from({ length: AT_ONCE }, () => ask((index + 1) * REQUESTS_A_STEP));
    isolate = freshIsolate(step);
    await Promise.all(load);
  }
  await backends.removeAll();
  expect(failed).toEqual([]);
  expect(completions.length).toBeGreaterThanOrEqual(STEPS.length * REQUESTS_A_STEP);

  // A completion of the first key is rated while the second step holds, and not known any more after the last.
  const rate = (at: Partial<Env>) => {
    const body = { id: completions[0], rating: 1 };
    return call('POST', '/v1/feedback', { key, body }, freshIsolate(at));
  };
  expect(await errorCode(rate(STEPS[3]!))).toBe('404 not_found');
  expect((await rate(STEPS[2]!)).status).toBe(201);
});

it('a session goes on while ADMIN_KEY is rotated, and both keys open the door until the old one goes', async () => {
  const isolate = freshIsolate;
  const tenants = (step: Partial<Env>, key: string) =>
    call('GET', '/admin/v1/tenants', { key }, isolate(step)).then(({ status }) => status);
  const [first, second, third, last] = STEPS as [Partial<Env>, Partial<Env>, Partial<Env>, Partial<Env>];
  const login = { body: { key: ADMIN_KEY }, headers: { origin: EDGE_URL } };
  const opened = await call('POST', '/dashboard/session', login, isolate(first));
  const cookie = opened.headers.get('set-cookie')!.split(';')[0]!;
  const resumed = (step: Partial<Env>) =>
    call('GET', '/dashboard/session', { headers: { cookie } }, isolate(step)).then(({ status }) => status);
  for (const step of [second, third]) {
    expect(await tenants(step, ADMIN_KEY)).toBe(200);
    expect(await tenants(step, NEXT_ADMIN_KEY)).toBe(200);
    expect(await resumed(step)).toBe(200);
  }
  expect(await tenants(first, NEXT_ADMIN_KEY)).toBe(401);
  expect(await tenants(last, NEXT_ADMIN_KEY)).toBe(200);
  expect(await tenants(last, ADMIN_KEY)).toBe(401);
  expect(await resumed(last)).toBe(401);
});

/** How often a stream asks, and room for a busy machine. */
const WITHIN_ms = 10_000;

it('a stream whose key is revoked elsewhere ends within seconds, says why, and hangs up at the backend', async () => {
  const { key, keyId } = await newTenant();
  // The revocation is made in another isolate than the stream runs in.
  const isolate = freshIsolate();
  const response = await chat(key, { stream: true, user: 'stream-forever' }, isolate);
  expect(response.status).toBe(200);
  const id = response.headers.get('x-request-id')!;
  const reader = response.body!.getReader();
  const text = new TextDecoder();
  const read = async () => {
    const { value, done } = await reader.read();
    return done ? undefined : text.decode(value, { stream: true });
  };
  expect(await read()).toContain('data: ');
  expect((await admin('DELETE', `/keys/${keyId}`)).status).toBe(200);
  // As old as a look-up may be.
  later(5_001);
  const revoked_ms = performance.now();
  let last = '';
  for (let piece = await read(); piece !== undefined; piece = await read()) last = piece;
  expect(performance.now() - revoked_ms).toBeLessThan(WITHIN_ms);
  vi.useRealTimers();
  expect(last).toContain('event: error');
  expect(last).toContain('invalid_api_key');
  await soon(async () => expect((await recorded(id))?.hungUp).toBe(true));
  // It is no fault of the backend's, nor of the mask's.
  await soon(async () => {
    const { data } = await (await admin('GET', `/requests?q=${id}`)).json<{ data: SeenRequest[] }>();
    expect(data).toMatchObject([{ status: 499, error_code: 'cancelled' }]);
  });
}, 60_000);
