/** Quantiles from buckets, against quantiles of the values themselves. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { createRandom, type Random } from '../../../gpu-backend/random.ts';
import {
  bucketOf,
  compareMeans,
  compareShares,
  type Difference,
  type Histogram,
  type Moments,
  quantile_ms,
  quantilesOf,
  SAMPLES_MIN,
  sharesOf,
} from '../../../shared/admin/statistics.ts';

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

/* The sequential test, by simulation: one may look all the time, and it finds what is there. */

type Draw = (random: Random, arm: 0 | 1) => number;
type Compare = (a: Moments, b: Moments, alpha: number) => Difference | null;

const EXPERIMENTS = 600;
const VALUES = 4_000;
const LOOK_EVERY = 25;
const ALPHA = 0.05;

/** The share of experiments in which, at any look, the interval leaves out `truth`. */
function missedShare(draw: Draw, compare: Compare, truth: number, experiments = EXPERIMENTS): number {
  const random = createRandom(7);
  let missed = 0;
  for (let i = 0; i < experiments; i++) {
    const arms = [0, 1].map(() => ({ count: 0, sum: 0, sq: 0 }));
    for (let n = 1; n <= VALUES; n++) {
      const arm = random.below(2) as 0 | 1;
      const value = draw(random, arm);
      arms[arm]!.count++;
      arms[arm]!.sum += value;
      arms[arm]!.sq += value * value;
      if (n % LOOK_EVERY !== 0) continue;
      const found = compare(arms[0]!, arms[1]!, ALPHA);
      if (found === null || (found.low <= truth && truth <= found.high)) continue;
      missed++;
      break;
    }
  }
  return missed / experiments;
}

const normal: Draw = (random) => 10 + 3 * random.normal();
/** Skewed as times are. */
const lognormal: Draw = (random) => 6 * Math.exp(0.8 * random.normal());
const coin =
  (p: number): Draw =>
  (random) =>
    random.next() < p ? 1 : 0;

describe('where there is no difference, looking 160 times claims one in at most 5 % of experiments', () => {
  it('of times, symmetric or skewed', () => {
    expect(missedShare(normal, compareMeans, 0)).toBeLessThanOrEqual(ALPHA);
    expect(missedShare(lognormal, compareMeans, 0)).toBeLessThanOrEqual(ALPHA);
  });

  it('of shares, common or rare', () => {
    for (const p of [0.5, 0.02, 0.002]) {
      expect(missedShare(coin(p), compareShares, 0), `p = ${p}`).toBeLessThanOrEqual(ALPHA);
    }
  });

  it('while an interval for a single look claims one far more often', () => {
    const fixed: Compare = (a, b) => {
      const found = compareMeans(a, b, ALPHA);
      if (found === null) return null;
      const variance = ({ count, sum, sq }: Moments) => (sq - sum ** 2 / count) / (count - 1) / count;
      const halfWidth = 1.96 * Math.sqrt(variance(a) + variance(b));
      return { ...found, low: found.difference - halfWidth, high: found.difference + halfWidth };
    };
    expect(missedShare(normal, fixed, 0)).toBeGreaterThan(2 * ALPHA);
  });
});

it('where there is a difference, its interval keeps holding it, and soon leaves out zero', () => {
  const faster: Draw = (random, arm) => normal(random, arm) - arm;
  expect(missedShare(faster, compareMeans, -1)).toBeLessThanOrEqual(ALPHA);
  expect(missedShare(faster, compareMeans, 0)).toBeGreaterThan(0.99);
});

it('gives the formula of the paper, its p-value is 5 % where the 95 % interval touches zero', () => {
  const moments = (count: number, mean: number, variance: number): Moments => ({
    count,
    sum: count * mean,
    sq: (count - 1) * variance + count * mean ** 2,
  });
  const [a, b] = [moments(400, 5, 4), moments(400, 5, 4)];
  const { low, high, p_value } = compareMeans(a, b, ALPHA)!;
  // t = 200, t* = 1000: tρ² = 0.2 (−2 log 0.05 + log(1 − 2 log 0.05)).
  const r = 0.2 * (5.991464547 + Math.log(1 + 5.991464547));
  const halfWidth = Math.sqrt((2 * (0.02 * (r + 1)) * Math.log(Math.sqrt(r + 1) / 0.05)) / r);
  expect(high).toBeCloseTo(halfWidth, 9);
  expect(low).toBeCloseTo(-halfWidth, 9);
  expect(p_value).toBe(1);
  const touching = compareMeans(a, moments(400, 5 + halfWidth, 4), ALPHA)!;
  expect(touching.low).toBeCloseTo(0, 9);
  expect(touching.p_value).toBeCloseTo(ALPHA, 9);
});

it('says nothing on few values, nor on values that never differ', () => {
  const many: Moments = { count: 1000, sum: 1000, sq: 1000 };
  const few: Moments = { count: SAMPLES_MIN - 1, sum: 0, sq: 0 };
  expect(compareMeans(many, few, ALPHA)).toBeNull();
  expect(compareShares(few, many, ALPHA)).toBeNull();
  expect(compareMeans(many, many, ALPHA)).toBeNull();
  expect(compareShares(sharesOf(1000, 0), sharesOf(1000, 0), ALPHA)).toMatchObject({
    difference: 0,
    p_value: 1,
  });
});
