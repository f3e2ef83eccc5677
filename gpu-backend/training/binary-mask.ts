/**
 * From learned gates to a mask of bits. The k lowest gates close, all others open fully; then a short local search
 * exchanges one skipped block for one that runs while that lowers the cost, since the best gates on average are
 * not always the best bits.
 */
import type { Mask } from '../../shared/mask.ts';

/** Skips the `skipCount` blocks of lowest logAlpha; ties go to the lower block. */
export function lowestSkipped(logAlphas: readonly number[], skipCount: number): Mask {
  if (!Number.isInteger(skipCount) || skipCount < 0 || skipCount > logAlphas.length)
    throw new RangeError(`${skipCount} of ${logAlphas.length} blocks to skip`);
  const order = logAlphas.map((_, block) => block).sort((a, b) => logAlphas[a]! - logAlphas[b]! || a - b);
  const runs = new Uint8Array(logAlphas.length).fill(1);
  for (const block of order.slice(0, skipCount)) runs[block] = 0;
  return { runs };
}

export type SwapSearch = {
  readonly mask: Mask;
  readonly cost: number;
  /** Cost of the mask that the search began with. */
  readonly startCost: number;
  readonly evaluations: number;
};

export type SwapSearchOptions = {
  /** Lower is better; the same mask gives the same cost. */
  readonly cost: (mask: Mask) => Promise<number>;
  /** Gates nearest to the border between skipped and running are exchanged first. */
  readonly logAlphas: readonly number[];
  readonly evaluationsMax: number;
  readonly signal?: AbortSignal;
};

/**
 * Takes every exchange that lowers the cost, the smallest difference of logAlpha first, and begins anew after
 * each, until none helps or the evaluations are spent. The number of skipped blocks stays.
 */
export async function searchSwaps(start: Mask, options: SwapSearchOptions): Promise<SwapSearch> {
  const { cost, logAlphas, evaluationsMax, signal } = options;
  let mask = start;
  const startCost = await cost(start);
  let best = startCost;
  let evaluations = 1;
  const tried = new Set([keyOf(start)]);
  for (;;) {
    const better = await firstBetter();
    if (better === undefined) return { mask, cost: best, startCost, evaluations };
    mask = better;
  }

  async function firstBetter(): Promise<Mask | undefined> {
    for (const swapped of swapsOf(mask, logAlphas)) {
      if (tried.has(keyOf(swapped))) continue;
      if (evaluations >= evaluationsMax) return undefined;
      signal?.throwIfAborted();
      tried.add(keyOf(swapped));
      const found = await cost(swapped);
      evaluations++;
      if (found < best) {
        best = found;
        return swapped;
      }
    }
    return undefined;
  }
}

const keyOf = (mask: Mask): string => mask.runs.join('');

/** Every mask that differs by one exchange, the one whose two gates are closest first. */
function* swapsOf({ runs }: Mask, logAlphas: readonly number[]): Generator<Mask> {
  const blocks = logAlphas.map((_, block) => block);
  const pairs = blocks
    .filter((block) => runs[block] === 0)
    .flatMap((skipped) =>
      blocks.filter((block) => runs[block] === 1).map((running) => [skipped, running] as const),
    )
    .map(([skipped, running]) => ({ skipped, running, gap: logAlphas[running]! - logAlphas[skipped]! }))
    .sort((a, b) => a.gap - b.gap || a.skipped - b.skipped || a.running - b.running);
  for (const { skipped, running } of pairs) {
    const swapped = runs.slice();
    swapped[skipped] = 1;
    swapped[running] = 0;
    yield { runs: swapped };
  }
}
