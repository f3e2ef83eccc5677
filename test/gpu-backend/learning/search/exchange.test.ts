/** Budgets, and searches among masks, on costs that are known in full. */
import { describe, expect, it, test } from 'vitest';
import type { Budget } from '../../../../gpu-backend/learning/search/budget.ts';
import {
  countsOf,
  createBudget,
  masksByScore,
  meetsBudget,
  weightSkipped,
} from '../../../../gpu-backend/learning/search/budget.ts';
import type { SearchCost } from '../../../../gpu-backend/learning/search/exchange.ts';
import {
  exchangeBlocks,
  greedyMask,
  improveMask,
  lighterMasks,
  worthOfBlocks,
} from '../../../../gpu-backend/learning/search/exchange.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import type { Mask } from '../../../../shared/mask/mask.ts';
import { denseMask, maskBits } from '../../../../shared/mask/mask.ts';

const LAYERS = 5;
const any = { min: 0, max: LAYERS };
const budgetOf = (changes: Partial<Parameters<typeof createBudget>[0]> = {}): Budget =>
  createBudget({
    layerCount: LAYERS,
    targetSparsity: 0.3,
    weights: { attention: 1, ffn: 1 },
    attention: any,
    ffn: any,
    ...changes,
  });

describe('a budget', () => {
  it('in blocks: every split of the nearest whole number of blocks', () => {
    expect(budgetOf().allowed.map(({ attention, ffn }) => [attention, ffn])).toEqual([
      [3, 0],
      [2, 1],
      [1, 2],
      [0, 3],
    ]);
    const sixty = createBudget({
      layerCount: 30,
      targetSparsity: 0.125,
      weights: { attention: 1, ffn: 1 },
      attention: { min: 0, max: 4 },
      ffn: { min: 4, max: 30 },
    });
    expect(sixty.allowed.map(({ attention, ffn }) => [attention, ffn])).toEqual([
      [4, 4],
      [3, 5],
      [2, 6],
      [1, 7],
      [0, 8],
    ]);
  });

  it('in time: the fewest attention blocks for each count of FFN blocks', () => {
    // 15 in all, 4.5 to save.
    const { allowed } = budgetOf({ weights: { attention: 1, ffn: 2 } });
    expect(allowed.map(({ attention, ffn }) => [attention, ffn])).toEqual([
      [5, 0],
      [3, 1],
      [1, 2],
      [0, 3],
    ]);
  });

  it('in time: no more FFN blocks than the same attention blocks need', () => {
    // 55 in all, 13.75 to save.
    const { allowed } = budgetOf({ targetSparsity: 0.25, weights: { attention: 10, ffn: 1 } });
    expect(allowed.map(({ attention, ffn }) => [attention, ffn])).toEqual([
      [2, 0],
      [1, 4],
    ]);
    // Sums of times are off in the last place: three tenths are enough.
    const tenths = budgetOf({ targetSparsity: 0.2, weights: { attention: 0.1, ffn: 0.2 } });
    expect(tenths.allowed[0]).toEqual({ attention: 3, ffn: 0 });
  });

  it('says so when floors are above what is asked for', () => {
    const floor = { min: 2, max: LAYERS };
    expect(() => budgetOf({ attention: floor, ffn: floor })).toThrow(/No mask leaves out 30.0 % with 2 to 5/);
    const weights = { attention: 1, ffn: 2 };
    expect(() => budgetOf({ weights, ffn: { min: 4, max: LAYERS } })).toThrow(/and 4 to 5 FFN blocks/);
  });

  it('says so when floors and ceilings leave nothing', () => {
    expect(() => budgetOf({ attention: { min: 0, max: 1 }, ffn: { min: 0, max: 1 } })).toThrow(
      /No mask leaves out 30.0 % with 0 to 1 attention and 0 to 1 FFN blocks out of 5 each/,
    );
  });

  it('closes the lowest scores, the natural counts first', () => {
    const scores = [9, 0, 8, 1, 7, 2, 6, 3, 5, 4];
    const masks = masksByScore(scores, budgetOf(), 2);
    expect(countsOf(masks[0]!)).toEqual({ attention: 0, ffn: 3 });
    expect(maskBits(masks[0]!)).toBe(maskBits(without([1, 3, 5])));
    expect(countsOf(masks[1]!)).toEqual({ attention: 1, ffn: 2 });
    expect(weightSkipped(masks[0]!, budgetOf({ weights: { attention: 1, ffn: 2 } }))).toBeCloseTo(6 / 15, 12);
  });
});

const without = (blocks: readonly number[]): Mask => {
  const { runs } = denseMask(2 * LAYERS);
  for (const block of blocks) runs[block] = 0;
  return { runs };
};

/** What each block costs alone, and pairs that cost more or less together. */
function landscape(seed: number) {
  const random = createRandom(seed);
  const alone = Array.from({ length: 2 * LAYERS }, () => random.next());
  const pairs = Array.from({ length: 2 * LAYERS }, () => alone.map(() => 0.4 * (random.next() - 0.4)));
  let evaluations = 0;
  const cost = async ({ runs }: Mask): Promise<number> => {
    evaluations++;
    const out = [...runs.keys()].filter((block) => runs[block] === 0);
    return out.reduce(
      (sum, a) => sum + alone[a]! + out.reduce((s, b) => (b < a ? s + pairs[a]![b]! : s), 0),
      0,
    );
  };
  return { alone, cost, evaluations: () => evaluations };
}

const inOnePart = (cost: (mask: Mask) => Promise<number>): SearchCost => ({
  atAGlance: cost,
  isBetter: async (mask, rival) => (await cost(mask)) < (await cost(rival)),
});

async function bestOfAll(cost: (mask: Mask) => Promise<number>, budget: Budget): Promise<number> {
  let best = Number.POSITIVE_INFINITY;
  for (let bits = 0; bits < 2 ** (2 * LAYERS); bits++) {
    const mask = { runs: Uint8Array.from({ length: 2 * LAYERS }, (_, i) => (bits >> i) & 1) };
    if (meetsBudget(mask, budget)) best = Math.min(best, await cost(mask));
  }
  return best;
}

const budgets: [string, Budget][] = [
  ['blocks', budgetOf()],
  ['time', budgetOf({ weights: { attention: 1, ffn: 2.2 }, targetSparsity: 0.4 })],
  ['fixed counts', budgetOf({ attention: { min: 1, max: 1 }, ffn: { min: 2, max: 2 } })],
];

describe.each(budgets)('searching with a budget of %s', (_name, budget) => {
  test.each([1, 2, 3, 4, 5, 6])(
    'landscape %i: greedy and exchanges come near the best of all',
    async (seed) => {
      const { alone, cost } = landscape(seed);
      const best = await bestOfAll(cost, budget);
      const greedy = await greedyMask(cost, budget, alone, 1000);
      expect(meetsBudget(greedy.mask, budget)).toBe(true);
      expect(greedy.cost).toBe(await cost(greedy.mask));
      const options = { cost: inOnePart(cost), budget, evaluationsMax: 200, triesMax: 40 };
      const improved = await improveMask(greedy.mask, alone, 5, options);
      expect(meetsBudget(improved, budget)).toBe(true);
      expect(await cost(improved)).toBeLessThanOrEqual(greedy.cost);
      expect(await cost(improved)).toBeLessThan(best + 0.1);
    },
  );
});

it('greedy is FinerCut: every step takes the block whose absence then costs least', async () => {
  const { alone, cost } = landscape(7);
  const out: number[] = [];
  for (let step = 0; step < 3; step++) {
    let best = { cost: Number.POSITIVE_INFINITY, block: -1 };
    for (let block = 0; block < 2 * LAYERS; block++) {
      if (out.includes(block)) continue;
      const value = await cost(without([...out, block]));
      if (value < best.cost) best = { cost: value, block };
    }
    out.push(best.block);
  }
  // With costs that only grow, lazy evaluation changes nothing.
  const growing = async (mask: Mask) => (await cost(mask)) + countsOf(mask).attention + countsOf(mask).ffn;
  const found = await greedyMask(
    growing,
    budgetOf(),
    alone.map((value) => value + 0.5),
    1000,
  );
  expect(found.cost).toBeCloseTo((await cost(without(out))) + 3, 9);
});

it('measures what a block is worth from both sides', async () => {
  const { cost } = landscape(8);
  const mask = without([2, 5]);
  const worth = await worthOfBlocks(cost, mask);
  expect(worth[2]).toBeCloseTo((await cost(mask)) - (await cost(without([5]))), 12);
  expect(worth[3]).toBeCloseTo((await cost(without([2, 3, 5]))) - (await cost(mask)), 12);
});

it('measures only blocks in question when there is a ranking', async () => {
  const { cost } = landscape(8);
  const counted: string[] = [];
  const counting = async (mask: Mask) => {
    counted.push(maskBits(mask));
    return cost(mask);
  };
  const ranking = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0];
  const all = await worthOfBlocks(cost, without([2]));
  const some = await worthOfBlocks(counting, without([2]), ranking);
  // Out: 2; attention from the end of the ranking: 8, 6, 4, 0; FFN: 9, 7, 5, 3.
  expect(counted).toHaveLength(1 + 1 + 4 + 4);
  const known = all.filter((_, block) => block !== 1);
  expect(some[1]).toBe(Math.max(...known));
  expect(some.filter((_, block) => block !== 1)).toEqual(known);
});

it('stops when the evaluations are spent, and out of evaluations greedy goes by estimates', async () => {
  const { alone, cost, evaluations } = landscape(9);
  const start = without([0, 2, 4]);
  const before = evaluations();
  await exchangeBlocks(start, alone, {
    cost: inOnePart(cost),
    budget: budgetOf(),
    evaluationsMax: 5,
    triesMax: 100,
  });
  // Each exchange and its rival.
  expect(evaluations() - before).toBe(2 * 5);
  const greedy = await greedyMask(cost, budgetOf(), alone, 0);
  expect(maskBits(greedy.mask)).toBe(maskBits(masksByScore(alone, budgetOf(), 1)[0]!));
});

it('a mask outside of the budget is not improved', async () => {
  const { cost } = landscape(10);
  const options = { cost: inOnePart(cost), budget: budgetOf(), evaluationsMax: 5, triesMax: 5 };
  await expect(exchangeBlocks(without([1]), [], options)).rejects.toThrow(RangeError);
});

it('a mask with fewer blocks out gets those back first that save most for what they weigh', async () => {
  const budget = budgetOf({ weights: { attention: 1, ffn: 3 }, targetSparsity: 0.4 });
  // Out are attention 0 and 1, and FFN 0 and 2; what each costs while it is out.
  const prices = new Map([
    [0, 1],
    [2, 5],
    [1, 6],
    [5, 30],
  ]);
  const cost = async ({ runs }: Mask) =>
    [...prices].reduce((sum, [block, price]) => sum + (runs[block] === 0 ? price : 0), 0);
  const mask = denseMask(2 * LAYERS);
  for (const block of prices.keys()) mask.runs[block] = 0;
  const found = await lighterMasks(mask, budget, 3, cost);
  const back = found.map(({ runs }) => [...prices.keys()].filter((block) => runs[block] === 1));
  expect(back).toEqual([[5], [2, 5], [2, 1, 5]]);
  expect(await lighterMasks(mask, budget, 9, cost)).toHaveLength(4);
});
