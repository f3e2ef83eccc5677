/** Quantiles from buckets, against quantiles of the values themselves. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { bucketOf, type Histogram, quantile_ms, quantilesOf } from '../../shared/histogram.ts';

function histogramOf(times_ms: readonly number[]): Map<number, number> {
  const counts = new Map<number, number>();
  for (const time_ms of times_ms) {
    counts.set(bucketOf(time_ms), (counts.get(bucketOf(time_ms)) ?? 0) + 1);
  }
  return counts;
}
const merge = (a: Histogram, b: Histogram): Histogram =>
  new Map([...a.keys(), ...b.keys()].map((key) => [key, (a.get(key) ?? 0) + (b.get(key) ?? 0)]));

const times = fc.array(fc.double({ min: 0.02, max: 1e7, noNaN: true }), { minLength: 1, maxLength: 200 });
const BUCKET = 2 ** (1 / 8);

describe('a histogram', () => {
  it('gives quantiles within a bucket of the exact ones', () => {
    fc.assert(
      fc.property(times, fc.constantFrom(0.5, 0.95, 0.99, 1), (values, q) => {
        const sorted = values.toSorted((a, b) => a - b);
        const exact = sorted[Math.max(0, Math.ceil(q * sorted.length) - 1)]!;
        const found = quantile_ms(histogramOf(values), q)!;
        expect(found / exact).toBeLessThanOrEqual(BUCKET * 1.000001);
        expect(found / exact).toBeGreaterThanOrEqual(1 / (BUCKET * 1.000001));
      }),
    );
  });

  it('of two groups is the sum of theirs', () => {
    fc.assert(
      fc.property(times, times, (some, others) => {
        expect(new Map(merge(histogramOf(some), histogramOf(others)))).toEqual(
          histogramOf([...some, ...others]),
        );
      }),
    );
  });

  it('rises with the share', () => {
    fc.assert(
      fc.property(times, (values) => {
        const { p50, p95, p99 } = quantilesOf(histogramOf(values))!;
        expect([p50, p95, p99]).toEqual([p50, p95, p99].toSorted((a, b) => a - b));
      }),
    );
  });

  it('takes what is out of bounds for its bounds, and says nothing of nothing', () => {
    expect(quantilesOf(new Map())).toBeNull();
    expect(quantile_ms(new Map([[3, 0]]), 0.5)).toBeNull();
    expect(quantile_ms(histogramOf([0]), 0.5)).toBeCloseTo(0.01, 2);
    expect(quantile_ms(histogramOf([1e12]), 0.5)! / 86_400_000).toBeCloseTo(1, 0);
  });
});
