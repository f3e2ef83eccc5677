/**
 * Statistics of counted figures: quantiles of times, and comparisons of two means that stay valid however often they
 * are looked at.
 */

/*
 * Histograms of times. Bucket bounds grow by a factor of 2^(1/8) (9 %) and are the same everywhere, so that histograms
 * of any groups can be added. A quantile read from them is at most one bucket off.
 */

/** Counts by bucket; bucket b holds times of 2^(b/8) ms up to 2^((b+1)/8) ms. Empty buckets are absent. */
export type Histogram = ReadonlyMap<number, number>;

const BUCKETS_A_DOUBLING = 8;
/** The lowest and highest bucket: 0.01 ms and one day. Times beyond count as these. */
const BUCKET_MIN = bucketUnbounded(0.01);
const BUCKET_MAX = bucketUnbounded(86_400_000);

function bucketUnbounded(time_ms: number): number {
  return Math.floor(BUCKETS_A_DOUBLING * Math.log2(time_ms));
}

/** `time_ms` is at least 0. */
export const bucketOf = (time_ms: number): number =>
  Math.min(BUCKET_MAX, Math.max(BUCKET_MIN, bucketUnbounded(time_ms)));

/** How many values there are. */
export const countOf = (histogram: Histogram): number =>
  [...histogram.values()].reduce((sum, count) => sum + count, 0);

/**
 * The `q` quantile (0 to 1) in ms; null without values. Within a bucket, values are assumed to be uniform on the
 * logarithmic scale.
 */
export function quantile_ms(histogram: Histogram, q: number): number | null {
  const total = countOf(histogram);
  if (total === 0) return null;
  const wanted = q * total;
  const buckets = [...histogram].filter(([, count]) => count > 0).sort(([a], [b]) => a - b);
  let before = 0;
  for (const [bucket, count] of buckets) {
    if (before + count >= wanted) return 2 ** ((bucket + (wanted - before) / count) / BUCKETS_A_DOUBLING);
    before += count;
  }
  return 2 ** ((buckets.at(-1)![0] + 1) / BUCKETS_A_DOUBLING);
}

/** Quantiles in ms; null without values. */
export function quantilesOf(histogram: Histogram): { p50: number; p95: number; p99: number } | null {
  const [p50, p95, p99] = [0.5, 0.95, 0.99].map((q) => quantile_ms(histogram, q)) as [number, number, number];
  return p50 === null ? null : { p50, p95, p99 };
}

/*
 * Anytime-valid comparison of two means: people may look at any time and as often as they like. The interval is the
 * asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (Annals of Statistics 2024, arXiv
 * 2103.06476, theorem 2.2): with t observations of variance s² and a tuning constant ρ,
 *
 *     mean ± s · sqrt( 2(tρ² + 1) / (t²ρ²) · log( sqrt(tρ² + 1) / α ) )
 *
 * covers the true mean at all t at once with probability 1 − α. It is the inverse of the mixture sequential
 * probability ratio test of Johari, Koomen, Pekelis and Walsh (arXiv 1512.04922) with a normal mixture, whose
 * p-value is given too. For a difference of means s²/t is the variance of the difference, and t is
 * n₁n₂ / (n₁ + n₂). Variances are estimated, so it holds for large samples: see {@link SAMPLES_MIN}.
 */

/** Moments of a measure: the number of values, their sum and their sum of squares. */
export type Moments = { readonly count: number; readonly sum: number; readonly sq: number };

export type Difference = {
  readonly difference: number;
  readonly low: number;
  readonly high: number;
  /** An anytime-valid p-value. */
  readonly p_value: number;
};

/** Fewest values on each side: with fewer, the estimated variance is unreliable. */
export const SAMPLES_MIN = 100;

/** The interval is tuned to be narrowest at about this many values on each side. */
const TUNED_FOR = 2_000;

export const meanOf = ({ count, sum }: Moments): number | null => (count === 0 ? null : sum / count);

/** Moments of a share: `ones` of `count` trials are 1. */
export const sharesOf = (count: number, ones: number): Moments => ({ count, sum: ones, sq: ones });

/**
 * The mean of `b` minus the mean of `a`; null when there are too few values, or all are equal. `alpha`: the probability
 * that the interval ever misses the true difference.
 */
export function compareMeans(a: Moments, b: Moments, alpha: number): Difference | null {
  if (a.count < SAMPLES_MIN || b.count < SAMPLES_MIN) return null;
  const variance = meanVariance(a) + meanVariance(b);
  if (!(variance > 0)) return null;
  const difference = b.sum / b.count - a.sum / a.count;
  const t = (a.count * b.count) / (a.count + b.count);
  const r = tRhoSquared(t, TUNED_FOR / 2, alpha);
  const halfWidth = halfWidthOf(variance, r, alpha);
  const logRatio = ((r / (r + 1)) * difference ** 2) / (2 * variance) - 0.5 * Math.log(r + 1);
  return {
    difference,
    low: difference - halfWidth,
    high: difference + halfWidth,
    p_value: Math.min(1, Math.exp(-logRatio)),
  };
}

/** Fewest pairs: differences of pairs vary less than answers, so fewer are enough to estimate their variance. */
export const PAIRS_MIN = 30;

/**
 * The mean of paired differences with its interval, by the same confidence sequence; null for fewer than {@link
 * PAIRS_MIN}.
 */
export function meanInterval(
  pairs: Moments,
  alpha: number,
): { readonly mean: number; readonly low: number; readonly high: number } | null {
  const { count, sum } = pairs;
  if (count < PAIRS_MIN) return null;
  const mean = sum / count;
  // Here t is the number of pairs.
  const halfWidth = halfWidthOf(meanVariance(pairs), tRhoSquared(count, TUNED_FOR, alpha), alpha);
  return { mean, low: mean - halfWidth, high: mean + halfWidth };
}

/** ρ² = (−2 log α + log(1 − 2 log α)) / t* makes the interval narrowest at t = t*, `narrowestAt` (their appendix B.2). */
const tRhoSquared = (t: number, narrowestAt: number, alpha: number): number =>
  (t / narrowestAt) * (-2 * Math.log(alpha) + Math.log(1 - 2 * Math.log(alpha)));

/** Half of the interval's width. `variance`: of the mean, or of the difference of means. `r`: tρ². */
const halfWidthOf = (variance: number, r: number, alpha: number): number =>
  Math.sqrt(((2 * variance * (r + 1)) / r) * (0.5 * Math.log(r + 1) - Math.log(alpha)));

/** The variance of the mean; 0 when all values are equal. */
function meanVariance({ count, sum, sq }: Moments): number {
  return Math.max(0, (sq - sum ** 2 / count) / (count - 1)) / count;
}

/** Like {@link compareMeans}, for shares: one success and one failure are added, so that no variance is 0. */
export function compareShares(a: Moments, b: Moments, alpha: number): Difference | null {
  if (a.count < SAMPLES_MIN || b.count < SAMPLES_MIN) return null;
  const smooth = ({ count, sum }: Moments) => sharesOf(count + 2, sum + 1);
  return compareMeans(smooth(a), smooth(b), alpha);
}
