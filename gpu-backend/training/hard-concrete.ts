/**
 * Hard concrete gates (Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization",
 * arXiv 1712.01312): random gates in [0, 1] that are exactly 0 or 1 with some probability, and differentiable by
 * their parameter logAlpha in between. All functions work on one gate; arrays are the callers' affair.
 */

/** Before clamping, a gate lies between `stretchLow` and `stretchHigh`. */
export const HARD_CONCRETE = {
  stretchLow: -0.1,
  stretchHigh: 1.1,
  temperature: 2 / 3,
  /** Uniform noise is kept off 0 and 1, where its logit is infinite. */
  noiseMin: 1e-6,
  logAlphaMin: Math.log(1e-2),
  logAlphaMax: Math.log(1e2),
} as const;

const { stretchLow, stretchHigh, temperature, noiseMin, logAlphaMin, logAlphaMax } = HARD_CONCRETE;
const STRETCH = stretchHigh - stretchLow;
/** What logAlpha loses on the way to P(gate ≠ 0). */
const OPEN_SHIFT = temperature * Math.log(-stretchLow / stretchHigh);

export const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
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

/** The logAlpha at which a gate is open with this probability, clamped. */
export const logAlphaFor = (open: number): number => clampLogAlpha(logit(open) + OPEN_SHIFT);

export const clampLogAlpha = (logAlpha: number): number =>
  Math.min(logAlphaMax, Math.max(logAlphaMin, logAlpha));
