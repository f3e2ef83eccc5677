/**
 * How far a mask moves the model: the masked next-token distributions against the dense ones at the same
 * positions. KL(dense ‖ masked) in nats, share of equal top tokens, and the perplexity of the text itself.
 *
 * Shapes: P scored positions, V tokens.
 */
import { denseMask, type Mask } from '../../../shared/mask.ts';
import type { KvCache } from '../../engine/kv-cache.ts';
import type { Runner } from '../../engine/runner.ts';
import { type Sample, scoredPositions } from '../data/samples.ts';

type MaskScores = {
  readonly positions: number;
  /** Mean over the positions, nats. */
  readonly kl: number;
  /** Share of positions whose most likely token is that of the dense model. */
  readonly agreement: number;
  readonly perplexity: number;
};

/** One sample under the dense model. */
type DenseSample = {
  readonly sample: Sample;
  /** `[P, V]`. */
  readonly probabilities: Float32Array;
  /** Σ p log p, `[P]`. */
  readonly negentropy: Float64Array;
  readonly topTokens: Int32Array;
  /** Log-probability of the text's own next token, summed. */
  readonly logLikelihood: number;
};

type MaskScorer = {
  dense(sample: Sample): Promise<DenseSample>;
  score(references: readonly DenseSample[], mask: Mask): Promise<MaskScores>;
};

/** One sequence at a time, in one cache. */
export function createMaskScorer(runner: Runner): MaskScorer {
  const cache = runner.newCache();
  const { vocabularySize, layerCount } = runner.config;
  const dense = denseMask(2 * layerCount);
  return {
    async dense(sample) {
      return toDenseSample(sample, await logitsOf(runner, cache, sample, dense), vocabularySize);
    },
    async score(references, mask) {
      const sums = { positions: 0, kl: 0, equalTops: 0, logLikelihood: 0 };
      for (const reference of references) {
        const logits = await logitsOf(runner, cache, reference.sample, mask);
        addScores(sums, reference, logits, vocabularySize);
      }
      return {
        positions: sums.positions,
        kl: sums.kl / sums.positions,
        agreement: sums.equalTops / sums.positions,
        perplexity: Math.exp(-sums.logLikelihood / sums.positions),
      };
    },
  };
}

export function densePerplexity(references: readonly DenseSample[]): number {
  const positions = references.reduce((sum, { sample }) => sum + scoredPositions(sample), 0);
  return Math.exp(-references.reduce((sum, { logLikelihood }) => sum + logLikelihood, 0) / positions);
}

/** `[P, V]`. */
function logitsOf(runner: Runner, cache: KvCache, sample: Sample, mask: Mask): Promise<Float32Array> {
  cache.length = 0;
  const logitRows = Array.from({ length: scoredPositions(sample) }, (_, i) => sample.scoreFrom + i);
  const tokenIds = sample.tokenIds.subarray(0, -1);
  return runner.run({ cache, tokenIds, logitRows, plan: { mask, kv: 'preserve' } });
}

function toDenseSample(sample: Sample, logits: Float32Array, vocabularySize: number): DenseSample {
  const positions = scoredPositions(sample);
  const probabilities = new Float32Array(logits.length);
  const negentropy = new Float64Array(positions);
  const topTokens = new Int32Array(positions);
  let logLikelihood = 0;
  for (let position = 0; position < positions; position++) {
    const row = logits.subarray(position * vocabularySize, (position + 1) * vocabularySize);
    const { logSum, top } = summary(row);
    const start = position * vocabularySize;
    let sum = 0;
    for (let token = 0; token < vocabularySize; token++) {
      const logProbability = row[token]! - logSum;
      const probability = Math.exp(logProbability);
      probabilities[start + token] = probability;
      sum += probability * logProbability;
    }
    negentropy[position] = sum;
    topTokens[position] = top;
    logLikelihood += row[nextToken(sample, position)]! - logSum;
  }
  return { sample, probabilities, negentropy, topTokens, logLikelihood };
}

type Sums = { positions: number; kl: number; equalTops: number; logLikelihood: number };

/** KL = Σ p log p − Σ p · logit + log Σ exp logit, so that one pass over the logits is enough. */
function addScores(sums: Sums, reference: DenseSample, logits: Float32Array, vocabularySize: number): void {
  const { sample, probabilities, negentropy, topTokens } = reference;
  for (let position = 0; position < topTokens.length; position++) {
    const start = position * vocabularySize;
    const row = logits.subarray(start, start + vocabularySize);
    const { logSum, top } = summary(row);
    let expected = 0;
    for (let token = 0; token < vocabularySize; token++)
      expected += probabilities[start + token]! * row[token]!;
    sums.positions++;
    sums.kl += Math.max(0, negentropy[position]! - expected + logSum);
    sums.equalTops += top === topTokens[position] ? 1 : 0;
    sums.logLikelihood += row[nextToken(sample, position)]! - logSum;
  }
}

const nextToken = (sample: Sample, position: number): number =>
  sample.tokenIds[sample.scoreFrom + position + 1]!;

/** log Σ exp, and the first most likely token. @throws RangeError on logits that are no numbers. */
function summary(row: Float32Array): { logSum: number; top: number } {
  let top = 0;
  for (let token = 1; token < row.length; token++) if (row[token]! > row[top]!) top = token;
  const most = row[top]!;
  let sum = 0;
  for (const logit of row) sum += Math.exp(logit - most);
  if (!Number.isFinite(sum)) throw new RangeError('the model gave logits that are not finite numbers');
  return { logSum: most + Math.log(sum), top };
}

/* What masks cost on prompts that they were not searched on, in the numbers that a mask set carries. */

export type HeldOutScores = MaskScores & { readonly densePerplexity: number };

/**
 * The scores of each mask over all samples; `undefined` without samples. One sample at a time: the dense
 * distributions of a long set would not fit in memory.
 */
export async function scoreMasks(
  scorer: MaskScorer,
  samples: readonly Sample[],
  masks: readonly Mask[],
  onEvaluation: () => void = () => {},
  signal?: AbortSignal,
): Promise<HeldOutScores[] | undefined> {
  if (samples.length === 0) return undefined;
  const parts = masks.map((): HeldOutScores[] => []);
  for (const sample of samples) {
    const reference = [await scorer.dense(sample)];
    for (const [index, mask] of masks.entries()) {
      signal?.throwIfAborted();
      const scores = await scorer.score(reference, mask);
      parts[index]!.push({ ...scores, densePerplexity: densePerplexity(reference) });
      onEvaluation();
    }
  }
  return parts.map((some) => poolScores(some.map((scores) => ({ scores, weight: scores.positions }))));
}

/** Weighted means; perplexities by their logarithms. Positions add up. */
export function poolScores(
  parts: readonly { readonly scores: HeldOutScores; readonly weight: number }[],
): HeldOutScores {
  const total = parts.reduce((sum, { weight }) => sum + weight, 0);
  const mean = (value: (scores: HeldOutScores) => number) =>
    parts.reduce((sum, { scores, weight }) => sum + (weight / total) * value(scores), 0);
  return {
    positions: parts.reduce((sum, { scores }) => sum + scores.positions, 0),
    kl: mean(({ kl }) => kl),
    agreement: mean(({ agreement }) => agreement),
    perplexity: Math.exp(mean(({ perplexity }) => Math.log(perplexity))),
    densePerplexity: Math.exp(mean((scores) => Math.log(scores.densePerplexity))),
  };
}
