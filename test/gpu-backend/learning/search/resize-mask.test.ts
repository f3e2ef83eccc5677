/** The mask for everybody in other sizes, on a model where each block has a price. */
import { describe, expect, it } from 'vitest';
import { createBudget, meetsBudget, resizeBudget } from '../../../../gpu-backend/learning/search/budget.ts';
import type { SearchCost } from '../../../../gpu-backend/learning/search/exchange.ts';
import { resizeMask } from '../../../../gpu-backend/learning/search/resize-mask.ts';
import { isDense, type Mask } from '../../../../shared/mask/mask.ts';

const LAYERS = 8;
const PRICES = [9, 1, 2, 3, 8, 4, 7, 5, 1, 6, 2, 7, 3, 8, 4, 9];
const EIGHTH = 0.125;
const any = { min: 0, max: LAYERS };
const budget = createBudget({
  layerCount: LAYERS,
  targetSparsity: EIGHTH,
  attention: any,
  ffn: any,
  weights: { attention: 1, ffn: 1 },
});
const costOf = ({ runs }: Mask) => PRICES.reduce((sum, price, block) => sum + price * (1 - runs[block]!), 0);
const cost: SearchCost = {
  atAGlance: async (mask) => costOf(mask),
  isBetter: async (mask, rival) => costOf(mask) < costOf(rival),
};
/** The two cheapest blocks. */
const start: Mask = { runs: Uint8Array.from(PRICES, (_, block) => ([1, 8].includes(block) ? 0 : 1)) };
const sizes = [1.5, 0.5, 0, 2];

describe('sizes', () => {
  it('lead to the cheapest blocks of each, from dense to heavy', async () => {
    const found = await resizeMask(start, {
      cost,
      budget,
      ranking: PRICES,
      sizes,
      evaluationsMax: 20,
      triesMax: 5,
    });
    expect(found.map(({ size }) => size)).toEqual([0, 0.5, 1.5, 2]);
    expect(isDense(found[0]!.mask)).toBe(true);
    // 1, 3 and 4 blocks: the cheapest cost 1 and 1, then 2 and 2.
    expect(found.map(({ mask }) => costOf(mask))).toEqual([0, 1, 4, 6]);
    for (const { size, mask } of found) {
      expect(meetsBudget(mask, resizeBudget(budget, size * budget.targetSparsity)!)).toBe(true);
    }
  });

  it('are the cheapest of each by what single blocks cost, before any exchange', async () => {
    const few = { cost, budget, ranking: PRICES, sizes, evaluationsMax: 0, triesMax: 0 };
    expect((await resizeMask(start, few)).map(({ mask }) => costOf(mask))).toEqual([0, 1, 4, 6]);
  });

  it('below a sparsity that is high itself are not left out', async () => {
    const half = resizeBudget(budget, 0.5)!;
    const cheapest = [...PRICES.keys()].sort((a, b) => PRICES[a]! - PRICES[b]!).slice(0, LAYERS);
    const heavy: Mask = { runs: Uint8Array.from(PRICES, (_, block) => (cheapest.includes(block) ? 0 : 1)) };
    const found = await resizeMask(heavy, {
      cost,
      budget: half,
      ranking: PRICES,
      sizes: [0.875, 1.125],
      evaluationsMax: 0,
      triesMax: 0,
    });
    expect(found.map(({ size }) => size)).toEqual([0.875]);
  });

  it('at which models fall apart are left out', async () => {
    const tooMuch = [2, 4];
    const found = await resizeMask(start, {
      cost,
      budget,
      ranking: PRICES,
      sizes: tooMuch,
      evaluationsMax: 20,
      triesMax: 5,
    });
    expect(found.map(({ size }) => size)).toEqual([2]);
  });

  it('that the bounds forbid are left out', async () => {
    const exactly = (count: number) => ({ min: count, max: count });
    const fixed = createBudget({
      layerCount: LAYERS,
      targetSparsity: 0.25,
      attention: exactly(3),
      ffn: exactly(1),
      weights: { attention: 1, ffn: 1 },
    });
    expect(
      await resizeMask(start, {
        cost,
        budget: fixed,
        ranking: PRICES,
        sizes,
        evaluationsMax: 9,
        triesMax: 3,
      }),
    ).toEqual([]);
  });
});
