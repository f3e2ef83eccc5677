/** Intervals around figures that were taken of rows. */
import { describe, expect, it } from 'vitest';
import {
  bootstrapInterval,
  pairedLead,
  weightedRatio,
} from '../../../../gpu-backend/learning/search/bootstrap.ts';

describe('bootstrap intervals', () => {
  const values = Array.from({ length: 400 }, (_, i) => i % 2);
  const ones = values.map(() => 1);
  const mean = (weights: Uint16Array) => weightedRatio(weights, values, ones);

  it('are 1.96 standard errors wide for a mean of many', () => {
    const [low, high] = bootstrapInterval(400, mean)!;
    expect((low + high) / 2).toBeCloseTo(0.5, 1);
    expect(high - low).toBeGreaterThan(2 * 1.96 * 0.025 * 0.85);
    expect(high - low).toBeLessThan(2 * 1.96 * 0.025 * 1.15);
    expect(bootstrapInterval(400, mean)).toEqual([low, high]);
  });

  it('need two rows', () => {
    expect(bootstrapInterval(1, () => 1)).toBeNull();
  });
});

describe('a lead', () => {
  it('is a mean by position, with its standard error', () => {
    const { mean, standardError } = pairedLead([
      { positions: 30, sum: 0 },
      { positions: 20, sum: -16 },
    ]);
    expect(mean).toBeCloseTo(-16 / 50, 12);
    expect(standardError).toBeCloseTo(Math.sqrt(2 * ((30 * 0.32) ** 2 + (20 * 0.48) ** 2)) / 50, 12);
  });

  it('of a single part says nothing of chance', () => {
    expect(pairedLead([{ positions: 20, sum: 16 }])).toEqual({
      mean: 0.8,
      standardError: Number.POSITIVE_INFINITY,
    });
  });
});
