/** Scores on a small real graph against plain loops in double precision. */
import { describe, expect, it } from 'vitest';
import type { Runner } from '../../../../gpu-backend/engine/runner.ts';
import type { Sample } from '../../../../gpu-backend/learning/data/samples.ts';
import {
  createMaskScorer,
  densePerplexity,
  scoreMasks,
} from '../../../../gpu-backend/learning/search/score-mask.ts';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../../../shared/mask.ts';
import { openEmitted, randomLlama } from '../../../support/random-llama.ts';

const SAMPLES: Sample[] = [
  { tokenIds: Int32Array.from({ length: 40 }, (_, i) => (i * 37) % 320), scoreFrom: 0 },
  { tokenIds: Int32Array.from({ length: 25 }, (_, i) => (i * 11 + 5) % 320), scoreFrom: 7 },
];
const MASK = maskFromSkippedLayers(8, { skipAttention: [1], skipFfn: [2] });

/** Log-probabilities of every scored position. */
async function logProbabilities(
  runner: Runner,
  { tokenIds, scoreFrom }: Sample,
  mask: Mask,
): Promise<number[][]> {
  const rows = Array.from({ length: tokenIds.length - 1 - scoreFrom }, (_, i) => scoreFrom + i);
  const logits = await runner.run({
    cache: runner.newCache(),
    tokenIds: tokenIds.slice(0, -1),
    logitRows: rows,
    plan: { mask, kv: 'preserve' },
  });
  return rows.map((_, row) => {
    const values = [...logits.subarray(row * 320, (row + 1) * 320)];
    const sum = Math.log(values.reduce((total, value) => total + Math.exp(value), 0));
    return values.map((value) => value - sum);
  });
}

describe('scores of a mask', () => {
  it('are the KL, agreement and perplexity that plain loops give', async () => {
    await using runner = await openEmitted(randomLlama(), 'f32');
    let [positions, kl, equal, nll, denseNll] = [0, 0, 0, 0, 0];
    for (const sample of SAMPLES) {
      const dense = await logProbabilities(runner, sample, denseMask(8));
      const masked = await logProbabilities(runner, sample, MASK);
      dense.forEach((p, i) => {
        const q = masked[i]!;
        const next = sample.tokenIds[sample.scoreFrom + i + 1]!;
        positions++;
        kl += p.reduce((sum, value, token) => sum + Math.exp(value) * (value - q[token]!), 0);
        equal += p.indexOf(Math.max(...p)) === q.indexOf(Math.max(...q)) ? 1 : 0;
        nll -= q[next]!;
        denseNll -= p[next]!;
      });
    }
    const scorer = createMaskScorer(runner);
    const references = [await scorer.dense(SAMPLES[0]!), await scorer.dense(SAMPLES[1]!)];
    const scores = await scorer.score(references, MASK);
    expect(scores.positions).toBe(positions);
    expect(scores.kl).toBeCloseTo(kl / positions, 5);
    expect(scores.kl).toBeGreaterThan(0.01);
    expect(scores.agreement).toBe(equal / positions);
    expect(scores.perplexity / Math.exp(nll / positions)).toBeCloseTo(1, 5);
    expect(densePerplexity(references) / Math.exp(denseNll / positions)).toBeCloseTo(1, 5);

    const heldOut = await scoreMasks(scorer, SAMPLES, [denseMask(8), MASK]);
    expect(heldOut![1]!.kl).toBeCloseTo(scores.kl, 6);
    expect(heldOut![1]!.perplexity / scores.perplexity).toBeCloseTo(1, 6);
    expect(await scoreMasks(scorer, [], [MASK])).toBeUndefined();
  });

  it('of the dense mask are those of no change', async () => {
    await using runner = await openEmitted(randomLlama(), 'q8');
    const scorer = createMaskScorer(runner);
    const { kl, agreement } = await scorer.score([await scorer.dense(SAMPLES[0]!)], denseMask(8));
    expect(kl).toBeLessThan(1e-6);
    expect(agreement).toBe(1);
  });
});
