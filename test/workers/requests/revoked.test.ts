/** A key is revoked while an answer streams under it. */
import { expect, it, vi } from 'vitest';
import type { SeenRequest } from '../../../shared/admin/requests-wire.ts';
import { admin, chat, freshIsolate, newTenant, recorded, soon } from '../support/edge.ts';

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
  vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 5_001 });
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
