/** What masks are said to be worth: by the bytes that they skip, and for more layers than were measured. */
import { expect, test } from 'vitest';
import {
  type BlockCosts,
  skippedShare,
  spreadMask,
  toldTimes,
} from '../../../gpu-backend/bench/masks-bench.ts';
import { denseMask } from '../../../shared/mask/mask.ts';

test('what was measured on a few layers is told for many: all but the head counts so many times', () => {
  const measured = new Map([
    ['dense', 10],
    ['body', 8],
    ['ffn 25 %', 7],
  ]);
  const told = toldTimes(measured, 8);
  expect([told.get('dense'), told.get('ffn 25 %')]).toEqual([66, 42]);
  expect(toldTimes(measured, 1)).toBe(measured);
  // By chance the run without logits may take longer.
  expect(toldTimes(new Map([...measured, ['body', 11]]), 8).get('dense')).toBe(80);
});

test('a mask is worth the share of the bytes that it skips, with few layers as with many like them', () => {
  const costs: BlockCosts = { attention: 3, keysValues: 1, ffn: 8, head: 16 };
  const [few, many] = [spreadMask(8, 0.25, 'ffn'), spreadMask(32, 0.25, 'ffn')];
  expect(skippedShare(costs, many, 1, 1)).toBe((16 * 8) / (32 * 12 + 16));
  expect(skippedShare(costs, few, 1, 4)).toBe(skippedShare(costs, many, 1, 1));
  // A prompt has its head computed once.
  expect(skippedShare(costs, many, 64, 1)).toBe((16 * 8) / (32 * 12 + 0.25));
  expect(skippedShare(costs, denseMask(64), 1, 1)).toBe(0);
});
