/** Scores by the runtime against plain loops in double precision: over a naive model, and over the engine's own logits. */
import { describe, expect, it } from 'vitest';
import type { Runner } from '../../../../gpu-backend/engine/runner-interface.ts';
import type { Sample } from '../../../../gpu-backend/learning/data/samples.ts';
import {
  createScorer,
  heldOutScores,
  openScoreSession,
  type SampleScores,
} from '../../../../gpu-backend/learning/search/score-masks.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../../../shared/mask/mask.ts';
import { openEmitted, randomLlama } from '../../../support/random-llama.ts';
import { naiveScores } from '../evaluation/naive-scores.ts';
import { openTinyScorer, SAMPLES as TINY_SAMPLES, tinyHome } from '../evaluation/tiny.ts';

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
    const session = await openScoreSession(1);
    const scorer = createScorer(runner, session);
    const [dense, masked, again]: SampleScores[][] = [[], [], []];
    for (const sample of SAMPLES) {
      const reference = await scorer.reference(sample);
      dense!.push(reference.scores);
      masked!.push(await scorer.score(reference, MASK));
      again!.push(await scorer.score(reference, denseMask(8)));
    }
    await session.close();
    const scores = heldOutScores(masked!, dense!);
    const unchanged = heldOutScores(again!, dense!);
    expect(scores.positions).toBe(positions);
    expect(scores.kl).toBeCloseTo(kl / positions, 5);
    expect(scores.kl).toBeGreaterThan(0.01);
    expect(scores.agreement).toBe(equal / positions);
    expect(scores.perplexity / Math.exp(nll / positions)).toBeCloseTo(1, 5);
    expect(scores.densePerplexity / Math.exp(denseNll / positions)).toBeCloseTo(1, 5);
    expect(unchanged.kl).toBeLessThan(1e-6);
    expect(unchanged).toMatchObject({ agreement: 1, densePerplexity: scores.densePerplexity });
  });

  it('of prompts that begin alike compute the beginning once a mask, to the same bits', async () => {
    await using runner = await openEmitted(randomLlama(), 'q8');
    let computed = 0;
    const counting: Runner = {
      ...runner,
      run: (input) => {
        computed += input.tokenIds.length;
        return runner.run(input);
      },
    };
    const session = await openScoreSession(1);
    const prompt = (seed: number, length: number): Sample => ({
      tokenIds: Int32Array.from({ length }, (_, i) => (i < 9 ? 11 * i : i * seed) % 320),
      scoreFrom: 9,
    });
    // The last has a single row to score, and the one before it nothing in common.
    const samples = [prompt(7, 30), prompt(13, 41), SAMPLES[1]!, prompt(5, 11)];
    const masks = [MASK, maskFromSkippedLayers(8, { skipAttention: [0], skipFfn: [] })];
    const shared = createScorer(counting, session);
    for (const [index, sample] of samples.entries()) {
      const apart = createScorer(runner, session);
      const [reference, own] = [await shared.reference(sample), await apart.reference(sample)];
      const before = computed;
      expect(reference.scores).toEqual(own.scores);
      for (const mask of masks)
        expect(await shared.score(reference, mask)).toEqual(await apart.score(own, mask));
      const expected = [29, 40 - 9, 24, 10][index]!;
      expect(computed - before).toBe(masks.length * expected);
    }
    await session.close();
  });

  it('of the dense mask are those of no change', async () => {
    await using runner = await openEmitted(randomLlama(), 'q8');
    const session = await openScoreSession(1);
    const scorer = createScorer(runner, session);
    const reference = await scorer.reference(SAMPLES[0]!);
    const { kl, positions, equalTops } = await scorer.score(reference, denseMask(8));
    await session.close();
    expect(kl / positions).toBeLessThan(1e-6);
    expect(equalTops).toBe(positions);
  });

  it('are what plain loops over a naive model give', async () => {
    using tiny = await tinyHome();
    await using open = await openTinyScorer(tiny);
    for (const sample of TINY_SAMPLES) {
      const reference = await open.scorer.reference(sample);
      const found = await open.scorer.score(reference, MASK);
      const expected = await naiveScores(sample, MASK);
      expect(found.positions).toBe(expected.positions);
      expect(found.kl).toBeCloseTo(expected.kl, 3);
      expect(found.klEven).toBeCloseTo(expected.klEven, 3);
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

  it('over a large vocabulary are as exact as over a small one', async () => {
    const V = 49_152;
    const random = createRandom(5);
    // As a language model has them: far from 0, so that sums of p times a logit lose digits.
    const p = Float32Array.from({ length: V }, () => 20 + 3 * random.normal());
    const q = p.map((logit) => logit + 0.1 * random.normal());
    const logs = (logits: Float32Array) => {
      const sum = Math.log(logits.reduce((total, logit) => total + Math.exp(logit), 0));
      return Float64Array.from(logits, (logit) => logit - sum);
    };
    const [logP, logQ] = [logs(p), logs(q)];
    const kl = logP.reduce((sum, value, token) => sum + Math.exp(value) * (value - logQ[token]!), 0);
    // A runner whose logits are given, dense and masked.
    const runner = {
      config: { layerCount: 1 },
      newCache: () => ({}),
      run: async ({ plan }: { plan: { mask: Mask } }) => (plan.mask.runs[0] === 1 ? p : q),
    } as unknown as Runner;
    const session = await openScoreSession(1);
    const scorer = createScorer(runner, session);
    const sample = { tokenIds: Int32Array.of(1, 2), scoreFrom: 0 };
    const found = await scorer.score(await scorer.reference(sample), { runs: Uint8Array.of(0, 1) });
    await session.close();
    expect(kl).toBeGreaterThan(0.001);
    expect(Math.abs(found.kl - kl)).toBeLessThan(2e-5);
  });
});
