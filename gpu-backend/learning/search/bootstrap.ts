/**
 * The uncertainty of figures: 95 % bootstrap intervals, and standard errors of differences on the same text. Rows are
 * resampled, as positions of one text depend on each other and texts do not. Equal rows give equal intervals.
 */
import { quantileSorted } from 'simple-statistics';
import { createRandom } from '../../random.ts';

const RESAMPLES = 1000;
const SEED = 1;

/**
 * The percentile interval of `statistic` over resampled rows (Efron, 1979). `statistic` gets how often each row was
 * drawn, `[rows]`. `null` for fewer than two rows.
 */
export function bootstrapInterval(
  rowCount: number,
  statistic: (weights: Uint16Array) => number,
): [low: number, high: number] | null {
  if (rowCount < 2) return null;
  const random = createRandom(SEED);
  const found: number[] = [];
  for (let round = 0; round < RESAMPLES; round++) {
    const weights = new Uint16Array(rowCount);
    for (let draw = 0; draw < rowCount; draw++) weights[random.below(rowCount)]!++;
    found.push(statistic(weights));
  }
  found.sort((a, b) => a - b);
  return [quantileSorted(found, 0.025), quantileSorted(found, 0.975)];
}

/** Σ weight · value / Σ weight · divisor. */
export function weightedRatio(
  weights: ArrayLike<number>,
  values: readonly number[],
  divisors: readonly number[],
): number {
  let [above, below] = [0, 0];
  for (let row = 0; row < values.length; row++) {
    above += weights[row]! * values[row]!;
    below += weights[row]! * divisors[row]!;
  }
  return above / below;
}

/** By how much one mask's cost is lower than another's on the same text. */
export type Lead = {
  readonly mean: number;
  /** Standard error of the mean over parts; infinite with a single part. */
  readonly standardError: number;
};

/** The mean difference a position, from sums over parts of a text; parts are weighted by their positions. */
export function pairedLead(parts: readonly { readonly positions: number; readonly sum: number }[]): Lead {
  const count = parts.reduce((all, { positions }) => all + positions, 0);
  const mean = parts.reduce((all, { sum }) => all + sum, 0) / count;
  const squares = parts.reduce((all, { sum, positions }) => all + (sum - mean * positions) ** 2, 0);
  const standardError = Math.sqrt((squares * parts.length) / (parts.length - 1)) / count;
  return { mean, standardError: parts.length === 1 ? Number.POSITIVE_INFINITY : standardError };
}
