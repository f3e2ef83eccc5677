/** Masks composed of what single blocks change, on models where each block has a price for each kind of prompt. */
import { describe, expect, it } from 'vitest';
import { createBudget, maskWithout, meetsBudget } from '../../../../gpu-backend/learning/search/budget.ts';
import {
  bestExchange,
  blocksToChange,
  composeMasks,
  type RowChanges,
} from '../../../../gpu-backend/learning/search/compose-masks.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { type Mask, maskBits } from '../../../../shared/mask/mask.ts';

const LAYERS = 8;
const BLOCKS = 2 * LAYERS;
const any = { min: 0, max: LAYERS };
const budgetOf = (weights = { attention: 1, ffn: 1 }, targetSparsity = 0.25) =>
  createBudget({ layerCount: LAYERS, targetSparsity, weights, attention: any, ffn: any });
const without = (...blocks: number[]): Mask => maskWithout(BLOCKS, blocks);
const skipped = ({ runs }: Mask) => [...runs.keys()].filter((block) => runs[block] === 0);

/** What leaving a block out costs prompts to the left and to the right on a line of clusters. */
const LEFT = [9, 1, 2, 8, 1, 7, 9, 8, 9, 7, 1, 8, 9, 7, 8, 9];
const RIGHT = [9, 1, 2, 8, 8, 7, 1, 8, 9, 7, 8, 8, 1, 7, 8, 9];
const start = without(1, 2, 4, 6);

const CLUSTERS = 8;
const centroids = {
  count: CLUSTERS,
  dimensions: 2,
  values: Float32Array.from({ length: 2 * CLUSTERS }, (_, i) => (i % 2 === 0 ? i / (CLUSTERS - 1) - 1 : 0)),
};
const blocks = Array.from({ length: BLOCKS }, (_, block) => block);
/** A prompt's own prices differ from its side's by some noise. */
function rowOf(cluster: number, noise: () => number): RowChanges {
  const prices = cluster < CLUSTERS / 2 ? LEFT : RIGHT;
  const positions = 50;
  const changes = blocks.map(
    (block) => positions * 0.01 * (prices[block]! + noise()) * (start.runs[block] === 1 ? 1 : -1),
  );
  return { cluster, positions, changes };
}
const options = {
  start,
  blocks,
  centroids,
  budget: budgetOf(),
  maskCount: 2,
  seed: 1,
  prompts: new Array<number>(CLUSTERS).fill(10),
};

describe('composed masks', () => {
  it('leave out for each side of the clusters what costs its prompts least, whatever single prompts say', () => {
    const random = createRandom(3);
    const rows = Array.from({ length: 20 * CLUSTERS }, (_, i) =>
      rowOf(i % CLUSTERS, () => 6 * (random.next() - 0.5)),
    );
    const found = composeMasks(rows, options).map(({ mask }) => skipped(mask));
    expect(found).toContainEqual([1, 2, 4, 10]);
    expect(found).toContainEqual([1, 2, 6, 12]);
  });

  it('suit clusters of which no prompt was measured', () => {
    const measured = [0, 1, 6, 7];
    const rows = measured.flatMap((cluster) => Array.from({ length: 30 }, () => rowOf(cluster, () => 0)));
    const only = (of: readonly number[]) =>
      composeMasks(rows, {
        ...options,
        // No prompt but those of clusters that were not measured.
        prompts: Array.from({ length: CLUSTERS }, (_, cluster) => (of.includes(cluster) ? 10 : 0)),
        maskCount: 1,
      }).map(({ mask }) => maskBits(mask));
    expect(only([2])).toEqual(only([0, 1]));
    expect(only([5])).toEqual(only([6, 7]));
    expect(only([2])).not.toEqual(only([5]));
  });

  it('are none where all prompts agree with the mask for everybody, or nothing tells clusters apart', () => {
    const agreeing = Array.from(
      { length: CLUSTERS },
      (_, cluster): RowChanges => ({
        cluster,
        positions: 50,
        changes: blocks.map((block) => (start.runs[block] === 1 ? 5 : -1)),
      }),
    );
    expect(composeMasks(agreeing, options)).toEqual([]);
    // That all would gain by an exchange is noise: the mask for everybody was chosen on more text.
    const gaining = agreeing.map((row) => ({
      ...row,
      positions: 64,
      changes: row.changes.map((change, block) => (block === 6 ? -3 : block === 10 ? 1 : change)),
    }));
    expect(composeMasks(gaining, options)).toEqual([]);
    expect(composeMasks([], options)).toEqual([]);
    expect(composeMasks([rowOf(0, () => 0)], options)).toEqual([]);
  });
});

describe('the best exchange', () => {
  it('is the best of all masks within the budget, of those near by', () => {
    const random = createRandom(5);
    const budget = budgetOf();
    const masks = allMasks(4);
    for (let round = 0; round < 20; round++) {
      const changes = new Map(
        blocks.map((block) => [block, (start.runs[block] === 1 ? 1 : -1) * random.next()]),
      );
      const changeOf = (mask: Mask) =>
        blocks.reduce((sum, b) => sum + (mask.runs[b] === start.runs[b] ? 0 : changes.get(b)!), 0);
      const found = bestExchange(start, changes, budget);
      expect(meetsBudget(found, budget)).toBe(true);
      expect(changeOf(found)).toBeCloseTo(Math.min(...masks.map(changeOf)), 9);
    }
  });

  it('changes eight blocks at most, however many would help', () => {
    const half = without(0, 1, 2, 3, 4, 5, 6, 7);
    const changes = new Map(blocks.map((block) => [block, -1]));
    const found = bestExchange(half, changes, budgetOf(undefined, 0.5));
    expect(blocks.filter((block) => found.runs[block] !== half.runs[block])).toHaveLength(8);
  });

  it('keeps to the counts of a budget by time, and may trade blocks of one kind for the other', () => {
    // Two attention blocks weigh as much as an FFN block.
    const budget = budgetOf({ attention: 1, ffn: 2 }, 0.25);
    const from = without(1, 3, 0, 2);
    expect(meetsBudget(from, budget)).toBe(true);
    const changes = new Map([
      ...[1, 3].map((block): [number, number] => [block, -5]),
      ...[4, 6, 8, 10].map((block): [number, number] => [block, 1]),
    ]);
    const found = bestExchange(from, changes, budget);
    expect(skipped(found)).toEqual([0, 2, 4, 6, 8, 10]);
    expect(meetsBudget(found, budget)).toBe(true);
  });
});

describe('blocks to change', () => {
  it('are those out whose return takes most off, and those running that cost least', () => {
    const worth = LEFT.map((price, block) => (start.runs[block] === 0 ? price / 10 : price));
    expect(blocksToChange(start, worth, 4)).toEqual([2, 6, 10, 5].sort((a, b) => a - b));
  });

  it('are the lower of those that are worth the same', () => {
    const [out, running] = [skipped(start), blocks.filter((block) => start.runs[block] === 1)];
    const found = blocksToChange(start, Array(blocks.length).fill(1), 4);
    expect(found).toEqual([...out.slice(0, 2), ...running.slice(0, 2)].sort((a, b) => a - b));
  });

  it('are as many as there are', () => {
    expect(blocksToChange(start, LEFT, 99)).toEqual(blocks);
  });
});

/** All masks with so many blocks out. */
function allMasks(count: number): Mask[] {
  const choose = (from: number, left: number): number[][] =>
    left === 0
      ? [[]]
      : blocks
          .slice(from)
          .flatMap((block) => choose(block + 1, left - 1).map((others) => [block, ...others]));
  return choose(0, count).map((out) => without(...out));
}
