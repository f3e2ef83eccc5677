/**
 * Times by size, for quantiles: buckets whose bounds grow by an eighth of a doubling (9 %), the same everywhere and
 * always, so that histograms of any two groups add up. A quantile read from them is at most one bucket off.
 */

/** Counts by bucket; bucket b holds times of 2^(b/8) ms up to 2^((b+1)/8) ms. Those without any are absent. */
export type Histogram = ReadonlyMap<number, number>;

const BUCKETS_A_DOUBLING = 8;
/** A hundredth of a millisecond, and a day: what is beyond counts as these. */
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
 * The time that a share `q` (0 to 1) of the values does not exceed, in milliseconds; null without values. Inside of a
 * bucket values are taken to lie evenly on the logarithmic scale.
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

export const QUANTILES = { p50: 0.5, p95: 0.95, p99: 0.99 } as const;
export type Quantiles = Record<keyof typeof QUANTILES, number>;

/** Milliseconds; null without values. */
export function quantilesOf(histogram: Histogram): Quantiles | null {
  const [p50, p95, p99] = [
    quantile_ms(histogram, QUANTILES.p50),
    quantile_ms(histogram, QUANTILES.p95),
    quantile_ms(histogram, QUANTILES.p99),
  ];
  return p50 === null || p95 === null || p99 === null ? null : { p50, p95, p99 };
}
