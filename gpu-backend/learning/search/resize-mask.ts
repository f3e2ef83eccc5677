/**
 * The mask for everybody in other sizes. The cost of a mask differs by a factor of two between prompts, so tolerant
 * prompts can skip more blocks and fragile ones fewer, at the same mean time.
 */
import { denseMask, type Mask } from '../../../shared/mask/mask.ts';
import { highestFirst, lowestFirst } from '../../measure.ts';
import { type Budget, countsOf, resizeBudget, withChanged } from './budget.ts';
import { blocksOf, exchangeBlocks, type SearchCost, worthOfBlocks } from './exchange.ts';

type ResizeOptions = {
  readonly cost: SearchCost;
  readonly budget: Budget;
  /** Ranking of the blocks on everybody's prompts: decides which blocks are candidates. */
  readonly ranking: readonly number[];
  /** Multiples of the budget's target sparsity. */
  readonly sizes: readonly number[];
  readonly evaluationsMax: number;
  readonly triesMax: number;
};

/** Largest share to skip; models fail beyond it. */
const SKIPPED_MAX = 0.4;

/** `size`: a multiple of the original mask's sparsity. */
type SizedMask = { readonly size: number; readonly mask: Mask };

/** Resizes step by step from the mask, downwards and upwards. Sizes that the budget's bounds forbid are left out. */
export async function resizeMask(mask: Mask, options: ResizeOptions): Promise<SizedMask[]> {
  const { budget, sizes } = options;
  const found: SizedMask[] = [];
  const rising = sizes.toSorted((a, b) => a - b);
  for (const side of [rising.filter((size) => size < 1).reverse(), rising.filter((size) => size > 1)]) {
    let current = mask;
    for (const size of side) {
      if (size * budget.targetSparsity > Math.max(SKIPPED_MAX, budget.targetSparsity)) continue;
      const resized = resizeBudget(budget, size * budget.targetSparsity);
      if (resized === undefined) continue;
      current = size === 0 ? denseMask(mask.runs.length) : await nextSize(current, resized, options);
      found.push({ size, mask: current });
    }
  }
  return found.sort((a, b) => a.size - b.size);
}

async function nextSize(
  from: Mask,
  budget: Budget,
  { cost, ranking, evaluationsMax, triesMax }: ResizeOptions,
): Promise<Mask> {
  const worth = await worthOfBlocks(cost.atAGlance, from, ranking);
  return exchangeBlocks(cheapestChange(from, worth, budget), worth, {
    cost,
    budget,
    evaluationsMax,
    triesMax,
  });
}

/** Changes the mask to the allowed counts at the least cost, by each block's worth alone. */
function cheapestChange(from: Mask, worth: readonly number[], { allowed }: Budget): Mask {
  const here = countsOf(from);
  const changes = allowed.map((pair) => {
    const changed: number[] = [];
    let change = 0;
    for (const [kind, more] of [pair.attention - here.attention, pair.ffn - here.ffn].entries()) {
      const inOrder = more > 0 ? lowestFirst : highestFirst;
      const blocks = blocksOf(from, kind as 0 | 1, more > 0 ? 1 : 0);
      const cheapest = inOrder(blocks, (block) => worth[block]!).slice(0, Math.abs(more));
      changed.push(...cheapest);
      for (const block of cheapest) change += Math.sign(more) * worth[block]!;
    }
    return { mask: withChanged(from, changed), change };
  });
  return changes.reduce((best, one) => (one.change < best.change ? one : best)).mask;
}
