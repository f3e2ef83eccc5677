/** Intervals around figures that were taken of rows. */
import { describe, expect, it } from 'vitest';
import { bootstrapInterval, weightedRatio } from '../../../../gpu-backend/learning/evaluation/bootstrap.ts';

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
