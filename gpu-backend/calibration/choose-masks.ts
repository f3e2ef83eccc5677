/**
 * A search on few prompts can fit them too well. So the mask of a cluster is chosen on fresh prompts of that
 * cluster among its own, those of the other clusters, and the one that the mean ranking gives for everybody:
 * routing then loses nothing against one mask for all, up to the noise of the choice.
 */
import type { Mask } from '../../shared/mask.ts';
import { maskBits } from '../../shared/mask.ts';
import type { BlockSearch } from './rank-blocks.ts';
import { maskWithout } from './rank-blocks.ts';

export type Candidate = {
  readonly mask: Mask;
  /** The cluster on whose prompts it was found, or `all`. */
  readonly source: number | 'all';
};

/** The clusters' masks and the one for all, each once; the one for all comes first and wins ties. */
export function candidateMasks(searches: readonly BlockSearch[], weights: ArrayLike<number>): Candidate[] {
  const { mask, skipped } = searches[0]!;
  const mean = searches[0]!.alone.map((_, block) =>
    searches.reduce((sum, { alone }, cluster) => sum + alone[block]! * weights[cluster]!, 0),
  );
  const ranked = mean.map((_, block) => block).sort((a, b) => mean[a]! - mean[b]! || a - b);
  const shared = maskWithout(mask.runs.length, ranked.slice(0, skipped.length));
  const all: Candidate[] = [{ mask: shared, source: 'all' }];
  searches.forEach((search, cluster) => {
    all.push({ mask: search.mask, source: cluster });
  });
  const bits = all.map((one) => maskBits(one.mask));
  return all.filter((_, i) => bits.indexOf(bits[i]!) === i);
}

/** Index of the lowest number, the first one of equals. */
export const lowest = (numbers: readonly number[]): number =>
  numbers.reduce((best, value, index) => (value < numbers[best]! ? index : best), 0);
