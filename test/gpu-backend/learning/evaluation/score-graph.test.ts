/** Scores by the runtime against plain loops in double precision, and the intervals around them. */
import { describe, expect, it } from 'vitest';
import { bootstrapInterval, weightedRatio } from '../../../../gpu-backend/learning/evaluation/bootstrap.ts';
import { maskFromSkippedLayers } from '../../../../shared/mask.ts';
import { naiveScores } from './naive-scores.ts';
import { openTinyScorer, SAMPLES, tinyHome } from './tiny.ts';

const MASK = maskFromSkippedLayers(8, { skipAttention: [1], skipFfn: [2] });

describe('scores of a mask on a sample', () => {
  it('are what plain loops give', async () => {
    using tiny = await tinyHome();
    await using open = await openTinyScorer(tiny);
    for (const sample of SAMPLES) {
      const reference = await open.scorer.reference(sample);
      const found = await open.scorer.score(reference, MASK);
      const expected = await naiveScores(sample, MASK);
      expect(found.positions).toBe(expected.positions);
      expect(found.kl).toBeCloseTo(expected.kl, 3);
      expect(found.kl).toBeGreaterThan(0.1);
      expect(found.equalTops).toBe(expected.equalTops);
      expect(found.loss).toBeCloseTo(expected.loss, 2);
    }
  });

  it('refuses logits that are no numbers', async () => {
    using tiny = await tinyHome();
    await using open = await openTinyScorer(tiny);
    const logits = new Float32Array(320).fill(Number.NaN);
    await expect(open.session.losses(logits, [3])).rejects.toThrow(/not finite/);
  });
});

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

  it('there is none of one row', () => {
    expect(bootstrapInterval(1, () => 1)).toBeUndefined();
  });
});
