/**
 * Sparsity as a constraint: penalty λ1·(ŝ - t) + λ2·(ŝ - t)², minimised by the gates and maximised by λ1 and λ2
 * (Wang, Wohlwend and Lei, "Structured Pruning of Large Language Models", arXiv 1910.04732; CoFi, Sheared-LLaMA).
 * ŝ is the expected share of what the gates' blocks weigh that is skipped: 1 a block for the paper's percentages,
 * or a block's cost for a latency budget.
 */
import { openProbability, openProbabilitySlope } from './hard-concrete.ts';

export type Multipliers = { readonly linear: number; readonly quadratic: number };

/** Weights of the blocks, summing to 1. @throws RangeError unless all are at least 0 and one is above. */
export function normalizedWeights(weights: readonly number[]): number[] {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  if (!(total > 0) || weights.some((weight) => !(weight >= 0)))
    throw new RangeError(`block weights [${weights.join()}] do not weigh anything`);
  return weights.map((weight) => weight / total);
}

/** ŝ = Σ w·(1 - P(gate ≠ 0)), `weights` summing to 1. */
export const expectedSparsity = (logAlphas: readonly number[], weights: readonly number[]): number =>
  logAlphas.reduce((sum, logAlpha, i) => sum + weights[i]! * (1 - openProbability(logAlpha)), 0);

export type Penalty = {
  readonly value: number;
  /** By the gates' parameters; descend. */
  readonly logAlphaGradients: number[];
  /** By the multipliers; ascend. */
  readonly multiplierGradients: Multipliers;
};

export function sparsityPenalty(
  logAlphas: readonly number[],
  weights: readonly number[],
  target: number,
  { linear, quadratic }: Multipliers,
): Penalty {
  const excess = expectedSparsity(logAlphas, weights) - target;
  const slope = linear + 2 * quadratic * excess;
  return {
    value: linear * excess + quadratic * excess ** 2,
    logAlphaGradients: logAlphas.map((logAlpha, i) => -slope * weights[i]! * openProbabilitySlope(logAlpha)),
    multiplierGradients: { linear: excess, quadratic: excess ** 2 },
  };
}

/**
 * What to add to every logAlpha so that their expected sparsity is `target`: by bisection, since the sparsity
 * falls as the shift grows. Ranked gates keep their order. @throws RangeError on a target outside (0, 1).
 */
export function shiftToSparsity(
  logAlphas: readonly number[],
  weights: readonly number[],
  target: number,
): number {
  if (!(target > 0 && target < 1)) throw new RangeError(`an expected sparsity of ${target}`);
  const sparsityAt = (shift: number) =>
    expectedSparsity(
      logAlphas.map((logAlpha) => logAlpha + shift),
      weights,
    );
  // Beyond ±40 every gate is decided to double precision.
  let low = -40 - Math.max(...logAlphas);
  let high = 40 - Math.min(...logAlphas);
  for (let turn = 0; turn < 100; turn++) {
    const middle = (low + high) / 2;
    if (sparsityAt(middle) > target) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}
