import { describe, expect, it } from 'vitest';
import { evaluationCount, searchBlocks, skipCountFor } from '../../../gpu-backend/calibration/rank-blocks.ts';
import type { Mask } from '../../../shared/mask.ts';

const skippedBy = (mask: Mask) => Array.from(mask.runs.keys()).filter((block) => mask.runs[block] === 0);

/** Each block has a price; blocks 1 and 2 are worth nothing alone and much together. */
const PRICES = [5, 1, 1.1, 2, 9, 3];
async function cost(mask: Mask): Promise<number> {
  const skipped = skippedBy(mask);
  const together = skipped.includes(1) && skipped.includes(2) ? 10 : 0;
  return skipped.reduce((sum, block) => sum + PRICES[block]!, together);
}

describe('the block search', () => {
  it('takes the lowest blocks when the ranking alone decides', async () => {
    const options = { blockCount: 6, skipCount: 2, candidateCount: 2 };
    const { mask, alone, skipped } = await searchBlocks(cost, options);
    expect(alone).toEqual(PRICES);
    expect(skipped).toEqual([1, 2]);
    expect(skippedBy(mask)).toEqual([1, 2]);
  });

  it('sees what blocks cost together when more of them compete', async () => {
    const options = { blockCount: 6, skipCount: 3, candidateCount: 4 };
    const { skipped, mask } = await searchBlocks(cost, options);
    expect(skipped).toEqual([1, 3, 5]);
    expect(skippedBy(mask)).toEqual([1, 3, 5]);
  });

  it('takes as many costs as it announces, and stops when it is called off', async () => {
    for (const [skipCount, candidateCount] of [
      [0, 0],
      [1, 4],
      [3, 3],
      [3, 6],
    ] as const) {
      let count = 0;
      const options = { blockCount: 6, skipCount, candidateCount, onEvaluation: () => count++ };
      const { skipped } = await searchBlocks(cost, options);
      expect(count).toBe(evaluationCount(options));
      expect(skipped).toHaveLength(skipCount);
    }
    const signal = AbortSignal.abort();
    await expect(
      searchBlocks(cost, { blockCount: 6, skipCount: 1, candidateCount: 1, signal }),
    ).rejects.toThrow();
  });

  it('rounds a sparsity to blocks', () => {
    expect([0, 0.125, 0.25, 1].map((sparsity) => skipCountFor(60, sparsity))).toEqual([0, 8, 15, 60]);
  });
});
