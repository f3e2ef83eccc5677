/** What masks cost on prompts that they were not searched on, in the numbers that a mask set carries. */
import type { Mask } from '../../shared/mask.ts';
import type { Sample } from './samples.ts';
import type { MaskScorer, MaskScores } from './score-mask.ts';
import { densePerplexity } from './score-mask.ts';

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
