import { expect, it } from 'vitest';
import { candidateMasks, lowest } from '../../../gpu-backend/calibration/choose-masks.ts';
import { maskWithout } from '../../../gpu-backend/calibration/rank-blocks.ts';

const search = (alone: number[], skipped: number[]) => ({ alone, skipped, mask: maskWithout(4, skipped) });

it('the masks that compete are the one for all by the weighted ranking and each other one once', () => {
  const searches = [search([1, 2, 9, 8], [0]), search([9, 3, 1, 8], [2]), search([5, 5, 5, 5], [0])];
  expect(candidateMasks(searches, [1, 1, 0])).toEqual([
    { mask: maskWithout(4, [1]), source: 'all' },
    { mask: maskWithout(4, [0]), source: 0 },
    { mask: maskWithout(4, [2]), source: 1 },
  ]);
  // The first cluster alone decides, and its mask is the one for all.
  expect(candidateMasks(searches, [1, 0, 0]).map(({ source }) => source)).toEqual(['all', 1]);
});

it('the lowest number wins, the first of equals', () => {
  expect(lowest([3, 1, 2, 1])).toBe(1);
});
