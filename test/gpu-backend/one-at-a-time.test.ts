import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { oneAtATime } from '../../gpu-backend/one-at-a-time.ts';

test('work comes in order, also behind work that fails, and each caller gets its own result', async () => {
  const inTurn = oneAtATime();
  const order: string[] = [];
  const results = await Promise.allSettled([
    inTurn(async () => {
      await sleep(20);
      order.push('slow');
      return 1;
    }),
    inTurn(() => {
      order.push('failing');
      throw new Error('broken');
    }),
    inTurn(() => order.push('last')),
  ]);
  expect(order).toEqual(['slow', 'failing', 'last']);
  expect(
    results.map((result) => (result.status === 'fulfilled' ? result.value : `${result.reason}`)),
  ).toEqual([1, 'Error: broken', 3]);
});
