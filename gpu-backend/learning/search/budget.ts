/**
 * The budget: how many blocks a mask has to skip. The target is a share of the total weight of all blocks; a block
 * weighs 1 for a share of the blocks, or its measured milliseconds for a share of the time. Blocks of one kind weigh
 * the same, so the budget is a list of allowed pairs of counts (attention, FFN), and searches move between these pairs.
 */

import { denseMask, type Mask } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { lowestFirst, sumOf } from '../../measure.ts';
import type { BlockCost } from './effort.ts';

/** Blocks of each kind that are left out. */
export type BlockCounts = { readonly attention: number; readonly ffn: number };

/** Bounds of how many blocks of a kind may be left out. */
export type CountRange = { readonly min: number; readonly max: number };

/** What a run is asked to leave out. */
export type BudgetRequest = {
  /** Share of the blocks, or of their time, in (0, 1). */
  readonly sparsity: number;
  readonly cost: BlockCost;
  /** Tokens before those that blocks are timed with. */
  readonly context?: number | undefined;
  /** How many blocks of a kind may be left out. */
  readonly attention?: CountRange | undefined;
  readonly ffn?: CountRange | undefined;
};

type BudgetOptions = {
  readonly layerCount: number;
  /** Share of the sum of all weights to leave out, 0 to 1. */
  readonly targetSparsity: number;
  /** What one block of a kind weighs. */
  readonly weights: BlockCounts;
  readonly attention: CountRange;
  readonly ffn: CountRange;
};

export type Budget = {
  readonly targetSparsity: number;
  /** `[2L]`. */
  readonly blockWeights: readonly number[];
  /** For each count of FFN blocks, the fewest attention blocks that meet the target; FFN counts rise. */
  readonly allowed: readonly BlockCounts[];
  readonly attention: CountRange;
  readonly ffn: CountRange;
};

/**
 * Equal weights mean a share of the blocks, at the nearest whole number (half up): 12.5 % of 60 blocks are 8.
 * @throws MaskrouteError `invalid_request` when no pair of counts meets target and bounds.
 */
export function createBudget(options: BudgetOptions): Budget {
  const { layerCount, targetSparsity, weights, attention, ffn } = options;
  const total = layerCount * (weights.attention + weights.ffn);
  const equal = weights.attention === weights.ffn;
  const exact = targetSparsity * total;
  const needed = equal ? weights.ffn * Math.round(exact / weights.ffn) : exact;
  const allowed: BlockCounts[] = [];
  for (let out = ffn.min; out <= Math.min(ffn.max, layerCount); out++) {
    const missing = needed - out * weights.ffn;
    // Sums of measured times are off by a few units in the last place.
    const fewest = Math.max(attention.min, Math.ceil(missing / weights.attention - 1e-9));
    const overshoots = fewest === attention.min && missing + weights.ffn <= 0;
    const isExact = !equal || fewest * weights.attention + out * weights.ffn === needed;
    if (fewest > Math.min(attention.max, layerCount) || overshoots || !isExact) continue;
    if (allowed.at(-1)?.attention !== fewest) allowed.push({ attention: fewest, ffn: out });
  }
  if (allowed.length === 0) {
    throw new MaskrouteError(
      'invalid_request',
      `No mask leaves out ${(100 * targetSparsity).toFixed(1)} % with ${attention.min} to ${attention.max} ` +
        `attention and ${ffn.min} to ${ffn.max} FFN blocks out of ${layerCount} each.`,
    );
  }
  const blockWeights = Array.from({ length: 2 * layerCount }, (_, block) =>
    block % 2 === 0 ? weights.attention : weights.ffn,
  );
  return { targetSparsity, blockWeights, allowed, attention, ffn };
}

/** The budget with another target; undefined when no mask meets it within the bounds. */
export function resizeBudget(budget: Budget, targetSparsity: number): Budget | undefined {
  const { blockWeights, attention, ffn } = budget;
  const weights = { attention: blockWeights[0]!, ffn: blockWeights[1]! };
  try {
    return createBudget({ layerCount: blockWeights.length / 2, targetSparsity, weights, attention, ffn });
  } catch (error) {
    if (error instanceof MaskrouteError) return undefined;
    throw error;
  }
}

export function countsOf({ runs }: Mask): BlockCounts {
  let [attention, ffn] = [0, 0];
  runs.forEach((bit, block) => {
    if (bit !== 0) return;
    if (block % 2 === 0) attention++;
    else ffn++;
  });
  return { attention, ffn };
}

export const meetsBudget = (mask: Mask, { allowed }: Budget): boolean => {
  const counts = countsOf(mask);
  return allowed.some(({ attention, ffn }) => attention === counts.attention && ffn === counts.ffn);
};

/** Share of the blocks' weights that a mask leaves out. */
export function weightSkipped({ runs }: Mask, { blockWeights }: Budget): number {
  const total = sumOf(blockWeights);
  return blockWeights.reduce((sum, weight, block) => sum + (runs[block] === 0 ? weight : 0), 0) / total;
}

/**
 * For each of at most `count` allowed pairs, the mask that skips the blocks with the lowest `scores`, `[2L]`. The first
 * pair is where skipping blocks by rising score meets the target; then come its neighbours.
 */
export function masksByScore(scores: readonly number[], budget: Budget, count: number): Mask[] {
  const order = lowestFirst(scores.keys(), (block) => scores[block]!);
  const ofKind = (kind: 0 | 1) => order.filter((block) => block % 2 === kind);
  const [attention, ffn] = [ofKind(0), ofKind(1)];
  const natural = naturalPair(order, budget);
  const pairs = budget.allowed
    .map((pair, index) => ({ pair, distance: Math.abs(index - natural) }))
    .sort((a, b) => a.distance - b.distance)
    .slice(0, count);
  return pairs.map(({ pair }) =>
    maskWithout(scores.length, [...attention.slice(0, pair.attention), ...ffn.slice(0, pair.ffn)]),
  );
}

/** Index of the allowed pair with as many FFN blocks as are skipped when blocks by rising score meet the target. */
function naturalPair(order: readonly number[], { allowed, blockWeights, targetSparsity }: Budget): number {
  const needed = targetSparsity * sumOf(blockWeights);
  let [weight, ffn] = [0, 0];
  for (const block of order) {
    if (weight >= needed - 1e-9) break;
    weight += blockWeights[block]!;
    ffn += block % 2;
  }
  const distances = allowed.map((pair) => Math.abs(pair.ffn - ffn));
  return distances.indexOf(Math.min(...distances));
}

/** The mask with each of `blocks` flipped: running blocks are skipped, and skipped ones run. */
export function withChanged({ runs }: Mask, blocks: readonly number[]): Mask {
  const changed = runs.slice();
  for (const block of blocks) changed[block] = 1 - changed[block]!;
  return { runs: changed };
}

export const maskWithout = (blockCount: number, skipped: readonly number[]): Mask =>
  withChanged(denseMask(blockCount), skipped);

/** Blocks to skip for a sparsity, at the nearest whole number (half up): 12.5 % of 60 blocks are 8. */
export const skipCountFor = (blockCount: number, sparsity: number): number =>
  Math.min(blockCount, Math.round(blockCount * sparsity));
