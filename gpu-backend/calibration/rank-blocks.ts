/**
 * First masks, without training: blocks ranked by how far the output distribution moves when one of them is
 * missing, as FinerCut does (Zhang et al., 2024), then the lowest taken out one after the other.
 */
import { denseMask, type Mask } from '../../shared/mask.ts';

/** Change of the output distribution under a mask; lower is better. */
export type MaskCost = (mask: Mask) => Promise<number>;

export type BlockSearchOptions = {
  readonly blockCount: number;
  /** Blocks to take out. */
  readonly skipCount: number;
  /**
   * How many of the lowest-ranked blocks compete at every greedy step, at least `skipCount`. Equal to
   * `skipCount`: the ranking alone decides, and no joint cost is taken.
   */
  readonly candidateCount: number;
  readonly onEvaluation?: () => void;
  readonly signal?: AbortSignal;
};

export type BlockSearch = {
  readonly mask: Mask;
  /** Cost of each block alone, `[blockCount]`. */
  readonly alone: readonly number[];
  /** Blocks in the order in which they were taken out. */
  readonly skipped: readonly number[];
};

/** Costs that {@link searchBlocks} takes at most: what a progress bar counts to. */
export function evaluationCount({ blockCount, skipCount, candidateCount }: BlockSearchOptions): number {
  let count = blockCount;
  if (candidateCount > skipCount) for (let step = 1; step < skipCount; step++) count += candidateCount - step;
  return count;
}

/**
 * Blocks are scored alone; then, among the `candidateCount` lowest, the one that costs least together with
 * those taken out before goes next (SLEB's greedy step on blocks). Ties go to the lower block.
 */
export async function searchBlocks(cost: MaskCost, options: BlockSearchOptions): Promise<BlockSearch> {
  const { blockCount, skipCount, candidateCount } = options;
  if (skipCount > candidateCount || candidateCount > blockCount) {
    throw new RangeError(`${skipCount} of ${candidateCount} candidates of ${blockCount} blocks`);
  }
  const evaluate = async (skipped: readonly number[]): Promise<number> => {
    options.signal?.throwIfAborted();
    const value = await cost(maskWithout(blockCount, skipped));
    options.onEvaluation?.();
    return value;
  };
  const alone: number[] = [];
  for (let block = 0; block < blockCount; block++) alone.push(await evaluate([block]));
  const ranked = alone.map((_, block) => block).sort((a, b) => alone[a]! - alone[b]! || a - b);
  const candidates = ranked.slice(0, candidateCount);
  if (candidateCount === skipCount) {
    return { mask: maskWithout(blockCount, candidates), alone, skipped: candidates };
  }
  const skipped = candidates.splice(0, Math.min(1, skipCount));
  while (skipped.length < skipCount) {
    let best = { cost: Number.POSITIVE_INFINITY, at: 0 };
    for (let at = 0; at < candidates.length; at++) {
      const value = await evaluate([...skipped, candidates[at]!]);
      if (value < best.cost) best = { cost: value, at };
    }
    skipped.push(...candidates.splice(best.at, 1));
  }
  return { mask: maskWithout(blockCount, skipped), alone, skipped };
}

export function maskWithout(blockCount: number, skipped: readonly number[]): Mask {
  const mask = denseMask(blockCount);
  for (const block of skipped) mask.runs[block] = 0;
  return mask;
}

/** Blocks to skip for a sparsity, at the nearest whole number (half up): 12.5 % of 60 blocks are 8. */
export const skipCountFor = (blockCount: number, sparsity: number): number =>
  Math.min(blockCount, Math.round(blockCount * sparsity));
