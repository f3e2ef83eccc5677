/** One timer waits for all pieces of a stream, and each of them is waited for as long as it may take. */
import { afterEach, expect, it, vi } from 'vitest';
import { createPieceWait } from '../../workers/services/piece-wait.ts';

const LIMIT_ms = 60;

const slow = <T>(value: T, after_ms: number): Promise<T> =>
  new Promise((resolve) => setTimeout(resolve, after_ms, value));

afterEach(() => vi.restoreAllMocks());

it('takes one timer for many pieces', async () => {
  const timers = vi.spyOn(globalThis, 'setTimeout');
  const wait = createPieceWait(LIMIT_ms);
  for (let piece = 0; piece < 100; piece++) expect(await wait.within(Promise.resolve(piece))).toBe(piece);
  wait.end();
  expect(timers).toHaveBeenCalledTimes(1);
});

it('gives a piece all of its time, however long the stream is on', async () => {
  const wait = createPieceWait(LIMIT_ms);
  for (let piece = 0; piece < 6; piece++) expect(await wait.within(slow(piece, LIMIT_ms / 2))).toBe(piece);
  const started_ms = Date.now();
  const last = slow('last', 3 * LIMIT_ms);
  const late: string[] = [];
  for (;;) {
    const found = await wait.within(last);
    if (found === 'last') break;
    late.push(found);
  }
  expect(late.length).toBeGreaterThanOrEqual(2);
  expect(late.length).toBeLessThanOrEqual(3);
  expect(Date.now() - started_ms).toBeGreaterThanOrEqual(3 * LIMIT_ms - 5);
  wait.end();
});

it('throws what the piece throws', async () => {
  const wait = createPieceWait(LIMIT_ms);
  await expect(wait.within(Promise.reject(new Error('broken off')))).rejects.toThrow('broken off');
  wait.end();
});
