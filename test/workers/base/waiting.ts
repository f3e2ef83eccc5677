/** Each piece of a stream is waited for as long as it may take. */
import { afterEach, expect, it, vi } from 'vitest';
import { createWait } from '../../../workers/base/waiting.ts';
import { readBody } from '../../../workers/http/request-body.ts';
import { BODY_ARRIVAL } from '../../../workers/limits.ts';
import { call } from '../support/edge.ts';

/** Long enough that a busy machine does not make a piece late. */
const LIMIT_ms = 200;

const slow = <T>(value: T, after_ms: number): Promise<T> =>
  new Promise((resolve) => setTimeout(resolve, after_ms, value));

afterEach(() => {
  vi.restoreAllMocks();
  vi.useRealTimers();
});

it('leaves no timer behind', async () => {
  vi.useFakeTimers();
  const wait = createWait(LIMIT_ms);
  for (let piece = 0; piece < 100; piece++)
    expect(await wait.within(Promise.resolve(piece), LIMIT_ms)).toBe(piece);
  wait.end();
  expect(vi.getTimerCount()).toBe(0);
});

it('gives a piece all of its time, however long the stream is on', async () => {
  const wait = createWait(LIMIT_ms);
  for (let piece = 0; piece < 6; piece++)
    expect(await wait.within(slow(piece, LIMIT_ms / 2), LIMIT_ms)).toBe(piece);
  const started_ms = Date.now();
  const last = slow('last', 3 * LIMIT_ms);
  const late: string[] = [];
  for (;;) {
    const found = await wait.within(last, LIMIT_ms);
    if (found === 'last') break;
    late.push(found);
  }
  expect(late.length).toBeGreaterThanOrEqual(2);
  expect(late.length).toBeLessThanOrEqual(3);
  expect(Date.now() - started_ms).toBeGreaterThanOrEqual(3 * LIMIT_ms - 5);
  wait.end();
});

it('ends in time though the clock is set back by an hour meanwhile', async () => {
  const wait = createWait(LIMIT_ms);
  const found = wait.within(new Promise(() => {}), 2 * LIMIT_ms);
  const { now } = Date;
  vi.spyOn(Date, 'now').mockImplementation(() => now() - 3_600_000);
  expect(await found).toBe('late');
  wait.end();
});

it('keeps limits of several lengths', async () => {
  const wait = createWait(LIMIT_ms);
  expect(await wait.within(slow('headers', 2 * LIMIT_ms), 10 * LIMIT_ms)).toBe('headers');
  const started_ms = Date.now();
  expect(await wait.within(new Promise(() => {}), LIMIT_ms)).toBe('late');
  expect(Date.now() - started_ms).toBeGreaterThanOrEqual(LIMIT_ms - 5);
});

it('throws what the piece throws', async () => {
  const wait = createWait(LIMIT_ms);
  await expect(wait.within(Promise.reject(new Error('broken off')), LIMIT_ms)).rejects.toThrow('broken off');
  wait.end();
});

it('refuses a request whose body never comes', async () => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'Date'] });
  const { readable } = new TransformStream<Uint8Array, Uint8Array>();
  const refused = call('POST', '/nowhere', { body: readable });
  const status = refused.then((response) => response.status);
  await vi.advanceTimersByTimeAsync(BODY_ARRIVAL.limit_ms - 1_000);
  expect(await Promise.race([status, Promise.resolve('still waits')])).toBe('still waits');
  await vi.advanceTimersByTimeAsync(1_000);
  expect(await status).toBe(404);
});

it('gives a body a time to arrive, unless it is small', async () => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'Date'] });
  const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>();
  const writer = writable.getWriter();
  const headers = { 'content-type': 'application/json' };
  const reading = readBody(new Request('https://edge.test/', { method: 'POST', headers, body: readable }));
  const failed = expect(reading).rejects.toMatchObject({ code: 'request_timeout', status: 408 });
  await writer.write(new TextEncoder().encode('{"a":'));
  await vi.advanceTimersByTimeAsync(BODY_ARRIVAL.limit_ms);
  await failed;
  const quick = new Request('https://edge.test/', { method: 'POST', headers, body: '{"a": "late"}' });
  expect((await readBody(quick)).value).toEqual({ a: 'late' });
  expect(vi.getTimerCount()).toBe(0);
});
