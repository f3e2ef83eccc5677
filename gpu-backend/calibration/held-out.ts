/** What a cluster's mask costs on prompts that calibrated nothing, in the numbers that a mask set carries. */
import type { Mask } from '../../shared/mask.ts';
import type { Sample } from './samples.ts';
import type { MaskScorer, MaskScores } from './score-mask.ts';
import { densePerplexity } from './score-mask.ts';

export type HeldOutScores = MaskScores & { readonly densePerplexity: number };

/** One sample at a time: the dense distributions of a long set would not fit in memory. `undefined` without samples. */
export async function scoreHeldOut(
  scorer: MaskScorer,
  samples: readonly Sample[],
  mask: Mask,
  signal?: AbortSignal,
): Promise<HeldOutScores | undefined> {
  const parts: HeldOutScores[] = [];
  for (const sample of samples) {
    signal?.throwIfAborted();
    const reference = [await scorer.dense(sample)];
    parts.push({ ...(await scorer.score(reference, mask)), densePerplexity: densePerplexity(reference) });
  }
  return parts.length === 0
    ? undefined
    : poolScores(parts.map((scores) => ({ scores, weight: scores.positions })));
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
