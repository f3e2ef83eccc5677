/** Rounds in which everything measured takes its turn, and the figures that are made of them. */
import { expect, test } from 'vitest';
import { inTurns, interleaved, median, quantile } from '../../gpu-backend/measure.ts';

test('all take their turn, in reversed order every second round', async () => {
  const order: string[] = [];
  const subjects = [{ name: 'a' }, { name: 'b' }, { name: 'c' }];
  const found = await inTurns(subjects, 3, async ({ name }) => order.push(name));
  expect(order.join('')).toBe('abccbaabc');
  expect(Object.fromEntries(found)).toEqual({ a: [1, 6, 7], b: [2, 5, 8], c: [3, 4, 9] });
});

test('nothing takes its turn any more once a signal aborts', async () => {
  const order: string[] = [];
  const stop = new AbortController();
  const measured = inTurns(
    [{ name: 'a' }, { name: 'b' }],
    2,
    async ({ name }) => {
      order.push(name);
      stop.abort();
    },
    stop.signal,
  );
  await expect(measured).rejects.toThrow(/aborted/);
  expect(order).toEqual(['a']);
});

test('a median leaves out the first call, which is slow with cold caches', async () => {
  const times = [900, 5, 1, 3];
  const subject = { name: 'a', measure: async () => times.shift()! };
  expect(await interleaved([subject], 3)).toEqual(new Map([['a', 3]]));
});

test('medians and quantiles are by value, and leave the list as it is', () => {
  const times = [100, 9, 20, 1];
  expect(median(times)).toBe(14.5);
  expect(median([3, 1, 2])).toBe(2);
  expect([0, 0.5, 0.99].map((share) => quantile(times, share))).toEqual([1, 20, 100]);
  expect(times).toEqual([100, 9, 20, 1]);
});
