/**
 * The mathematics of learning gates, as plain functions on numbers and arrays: hard concrete gates, sparsity as a
 * Lagrangian constraint, and Adam.
 *
 * A hard concrete gate (Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization",
 * arXiv 1712.01312) is a random number in [0, 1] that is exactly 0 or 1 with some probability, and differentiable by its
 * parameter logAlpha in between.
 */
import { sumOf } from '../../measure.ts';

/** Before clamping, a gate lies between `stretchLow` and `stretchHigh`. */
export const HARD_CONCRETE = {
  stretchLow: -0.1,
  stretchHigh: 1.1,
  temperature: 2 / 3,
  /** Uniform noise keeps this distance from 0 and 1, where its logit is infinite. */
  noiseMin: 1e-6,
  logAlphaMin: Math.log(1e-2),
  logAlphaMax: Math.log(1e2),
} as const;

const { stretchLow, stretchHigh, temperature, noiseMin, logAlphaMin, logAlphaMax } = HARD_CONCRETE;
const STRETCH = stretchHigh - stretchLow;
/** P(gate ≠ 0) = σ(logAlpha − OPEN_SHIFT). */
const OPEN_SHIFT = temperature * Math.log(-stretchLow / stretchHigh);

const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
const logit = (p: number): number => Math.log(p) - Math.log1p(-p);

export type GateSample = {
  readonly gate: number;
  /** ∂gate/∂logAlpha for the same noise; 0 where the gate is clamped to 0 or 1. */
  readonly slope: number;
};

/** The gate for uniform noise in [0, 1]: s = σ((logit u + logAlpha) / β), clamp(s·(ζ - γ) + γ, 0, 1). */
export function sampleGate(logAlpha: number, noise: number): GateSample {
  const u = Math.min(1 - noiseMin, Math.max(noiseMin, noise));
  const s = sigmoid((logit(u) + logAlpha) / temperature);
  const stretched = s * STRETCH + stretchLow;
  if (stretched <= 0) return { gate: 0, slope: 0 };
  if (stretched >= 1) return { gate: 1, slope: 0 };
  return { gate: stretched, slope: (STRETCH * s * (1 - s)) / temperature };
}

/** P(gate ≠ 0) = σ(logAlpha - β·log(-γ/ζ)): what the L0 penalty counts. */
export const openProbability = (logAlpha: number): number => sigmoid(logAlpha - OPEN_SHIFT);

/** ∂P(gate ≠ 0)/∂logAlpha. */
export function openProbabilitySlope(logAlpha: number): number {
  const open = openProbability(logAlpha);
  return open * (1 - open);
}

export const clampLogAlpha = (logAlpha: number): number =>
  Math.min(logAlphaMax, Math.max(logAlphaMin, logAlpha));

/*
 * Sparsity as a constraint: penalty λ1·(ŝ - t) + λ2·(ŝ - t)², minimised by the gates and maximised by λ1 and λ2 (Wang,
 * Wohlwend and Lei, "Structured Pruning of Large Language Models", arXiv 1910.04732; CoFi, Sheared-LLaMA). ŝ is the
 * expected share of the blocks' total weight that is skipped; a block weighs 1 for the paper's percentages, or its cost
 * for a latency budget.
 */

/** λ1 and λ2. */
export type Multipliers = readonly [linear: number, quadratic: number];

/** Weights of the blocks, summing to 1. @throws RangeError unless all are at least 0 and one is above. */
export function normalizedWeights(weights: readonly number[]): number[] {
  const total = sumOf(weights);
  if (!(total > 0) || weights.some((weight) => !(weight >= 0)))
    throw new RangeError(`block weights [${weights.join()}] do not weigh anything`);
  return weights.map((weight) => weight / total);
}

/** ŝ = Σ w·(1 - P(gate ≠ 0)), `weights` summing to 1. */
export const expectedSparsity = (logAlphas: readonly number[], weights: readonly number[]): number =>
  logAlphas.reduce((sum, logAlpha, i) => sum + weights[i]! * (1 - openProbability(logAlpha)), 0);

type PenaltyGradients = {
  /** By the gates' parameters; descend. */
  readonly logAlphaGradients: number[];
  /** By the multipliers; ascend. */
  readonly multiplierGradients: Multipliers;
};

/** The gradients of the penalty. */
export function sparsityPenalty(
  logAlphas: readonly number[],
  weights: readonly number[],
  target: number,
  [linear, quadratic]: Multipliers,
): PenaltyGradients {
  const excess = expectedSparsity(logAlphas, weights) - target;
  const slope = linear + 2 * quadratic * excess;
  return {
    logAlphaGradients: logAlphas.map((logAlpha, i) => -slope * weights[i]! * openProbabilitySlope(logAlpha)),
    multiplierGradients: [excess, excess ** 2],
  };
}

/**
 * The number to add to every logAlpha so that the expected sparsity is `target`; found by bisection, since the sparsity
 * falls as the number grows. The order of the gates stays. @throws RangeError on a target outside (0, 1).
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

/* Adam (Kingma and Ba, arXiv 1412.6980) on a plain array. */

const [BETA_1, BETA_2, EPSILON] = [0.9, 0.999, 1e-8];

export type AdamState = {
  readonly step: number;
  /** Running means of the gradients and of their squares. */
  readonly mean: readonly number[];
  readonly square: readonly number[];
};

export const newAdam = (size: number): AdamState => ({
  step: 0,
  mean: Array<number>(size).fill(0),
  square: Array<number>(size).fill(0),
});

/** One step downhill: new values and new state. For ascent, give negated gradients. */
export function adamStep(
  values: readonly number[],
  gradients: readonly number[],
  state: AdamState,
  learningRate: number,
): { values: number[]; state: AdamState } {
  const step = state.step + 1;
  const mean = state.mean.map((value, i) => BETA_1 * value + (1 - BETA_1) * gradients[i]!);
  const square = state.square.map((value, i) => BETA_2 * value + (1 - BETA_2) * gradients[i]! ** 2);
  const [meanScale, squareScale] = [1 - BETA_1 ** step, 1 - BETA_2 ** step];
  const moved = values.map(
    (value, i) =>
      value - (learningRate * (mean[i]! / meanScale)) / (Math.sqrt(square[i]! / squareScale) + EPSILON),
  );
  return { values: moved, state: { step, mean, square } };
}
