/**
 * The edge at the door of a backend: tokens that it signs in workerd, read by the backend's own code in Node, with
 * clocks that agree and clocks that do not.
 */
import { env } from 'cloudflare:workers';
import { afterEach, expect, it, vi } from 'vitest';
import { BACKEND_HEADERS } from '../../../shared/wire/backend-load.ts';
import { admin, chat, created, errorCode, freshIsolate, newTenant } from '../support/edge.ts';

const registered: string[] = [];
afterEach(async () => {
  vi.useRealTimers();
  vi.restoreAllMocks();
  for (const id of registered.splice(0)) await admin('DELETE', `/backends/${id}`);
});

async function register(id: string): Promise<void> {
  await created(admin('POST', '/backends', { id, url: `${env.BACKEND_URL}/at/${id}` }));
  registered.push(id);
  await fetch(`${env.BACKEND_URL}/mood/${id}`, { method: 'POST', body: 'strict' });
}
const setClock = (ahead_s: number) =>
  vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 1000 * ahead_s });

/** Every reason in the log why a backend's answer could not be used, from now on. */
function reasons(): string[] {
  const found: string[] = [];
  vi.spyOn(console, 'error').mockImplementation((line: unknown) => {
    const { event, reason } = JSON.parse(String(line)) as { event: string; reason: string };
    if (event === 'backend_error') found.push(reason);
  });
  return found;
}

it.each([0, 29, -29])('is let in with a clock that is %i s ahead, as often as it asks', async (ahead_s) => {
  const { key } = await newTenant();
  await register(`clock-${ahead_s}`);
  setClock(ahead_s);
  const isolate = freshIsolate();
  for (let i = 0; i < 3; i++) {
    const response = await chat(key, {}, isolate);
    expect([response.status, response.headers.get(BACKEND_HEADERS.backend)]).toEqual([
      200,
      `clock-${ahead_s}`,
    ]);
  }
});

it.each([
  [600, /expired_token: The service token was issued \d+ s in the future.*clocks/],
  [-600, /expired_token: The service token ended \d+ s ago.*clocks/],
])(
  'with a clock that is %i s ahead tells the log why, and the client only that it failed',
  async (s, why) => {
    const { key } = await newTenant();
    await register(`far-${s}`);
    setClock(s);
    const found = reasons();
    const response = await chat(key, {}, freshIsolate());
    expect(await response.clone().text()).not.toMatch(/clock|token/);
    expect(await errorCode(response)).toBe('502 backend_error');
    expect(found[0]).toMatch(why);
  },
);

it('goes on to a backend that lets it in', async () => {
  const { key } = await newTenant();
  await register('misnamed');
  await register('usual');
  // It is reached by another name than its own, so the edge's tokens are for another backend.
  const url = `${env.BACKEND_URL}/at/misnamed`.replace('127.0.0.1', 'localhost');
  await admin('PATCH', '/backends/misnamed', { url });
  await admin('PATCH', '/backends/usual', { regions: ['AN'] });
  const found = reasons();
  const response = await chat(key, {}, freshIsolate());
  expect([response.status, response.headers.get(BACKEND_HEADERS.backend)]).toEqual([200, 'usual']);
  expect(found.at(-1)).toContain('invalid_api_key: The service token is for another backend.');
});
