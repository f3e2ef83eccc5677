/**
 * Learns one mask: hard concrete gates on frozen weights, descending loss + sparsity penalty while the
 * penalty's multipliers ascend. Gates start from a ranking of the blocks, shifted so that the expected sparsity is
 * the target from the first step: learning only redistributes. (Started from open gates, 80 of 100 steps pass
 * before the penalty closes anything, and then it closes everything at once.)
 *
 * Every step is a function of the state before it and of its number, so a run that is stored and taken up again
 * ends as one that was never interrupted.
 */
import { seededRandom } from '../calibration/random.ts';
import type { AdamState } from './adam.ts';
import { adamStep, newAdam } from './adam.ts';
import type { GateBatch, GateSession } from './gate-session.ts';
import type { GateSample } from './hard-concrete.ts';
import { clampLogAlpha, sampleGate } from './hard-concrete.ts';
import { expectedSparsity, normalizedWeights, shiftToSparsity, sparsityPenalty } from './lagrangian.ts';
import type { TrainingState } from './training-state.ts';

export type TrainingOptions = {
  readonly session: Pick<GateSession, 'step'>;
  /** What a block costs when it alone is missing, `[2L]`: higher stays longer. */
  readonly importance: readonly number[];
  /** What a block's absence counts, `[2L]`: all 1, or its cost. */
  readonly blockWeights: readonly number[];
  /** Share of the weights' sum to be skipped, in (0, 1). */
  readonly targetSparsity: number;
  readonly steps: number;
  readonly seed: number;
  /**
   * The text of a step, in parts; each part meets gates drawn for itself, and the parts' gradients are averaged.
   * More parts of fewer sequences cost the same and vary less. The same number gives the same parts.
   */
  batches(step: number): readonly GateBatch[];
  readonly gateLearningRate?: number;
  readonly multiplierLearningRate?: number;
  /** The state after every step, for progress and for storing. */
  readonly onStep?: (state: TrainingState) => Promise<void> | void;
  readonly signal?: AbortSignal;
};

/** logAlpha of the first-ranked and the last-ranked block before the shift. */
const RANK_SPREAD = 2;
const GATE_LEARNING_RATE = 0.05;
const MULTIPLIER_LEARNING_RATE = 0.05;

/** The gates before the first step. */
export function startState(options: TrainingOptions): TrainingState {
  const { importance, targetSparsity } = options;
  const weights = normalizedWeights(options.blockWeights);
  if (weights.length !== importance.length)
    throw new RangeError(`${weights.length} weights for ${importance.length} blocks`);
  const order = importance.map((_, block) => block).sort((a, b) => importance[a]! - importance[b]! || a - b);
  const ranked = Array<number>(order.length).fill(0);
  order.forEach((block, rank) => {
    ranked[block] = RANK_SPREAD * ((2 * rank) / Math.max(1, order.length - 1) - 1);
  });
  const shift = shiftToSparsity(ranked, weights, targetSparsity);
  return {
    step: 0,
    logAlphas: ranked.map((value) => clampLogAlpha(value + shift)),
    multipliers: [0, 0],
    gateAdam: newAdam(ranked.length),
    multiplierAdam: newAdam(2),
    history: [],
  };
}

/** Goes on from `state` to the last step. Rejects when `signal` aborts; the last `onStep` had the state. */
export async function trainMask(
  options: TrainingOptions,
  state: TrainingState = startState(options),
): Promise<TrainingState> {
  let current = state;
  while (current.step < options.steps) {
    options.signal?.throwIfAborted();
    current = await trainingStep(options, current);
    await options.onStep?.(current);
  }
  return current;
}

async function trainingStep(options: TrainingOptions, state: TrainingState): Promise<TrainingState> {
  const { logAlphas, multipliers, step } = state;
  const weights = normalizedWeights(options.blockWeights);
  const { loss, gradients } = await sampledLoss(options, state);
  const [linear, quadratic] = multipliers;
  const penalty = sparsityPenalty(logAlphas, weights, options.targetSparsity, { linear, quadratic });
  const total = gradients.map((gradient, i) => gradient + penalty.logAlphaGradients[i]!);
  const gates = descend(logAlphas, total, state.gateAdam, options.gateLearningRate ?? GATE_LEARNING_RATE);
  const up = penalty.multiplierGradients;
  const moved = descend(
    multipliers,
    [-up.linear, -up.quadratic],
    state.multiplierAdam,
    options.multiplierLearningRate ?? MULTIPLIER_LEARNING_RATE,
  );
  const next = gates.values.map(clampLogAlpha);
  return {
    step: step + 1,
    logAlphas: next,
    multipliers: [moved.values[0]!, moved.values[1]!],
    gateAdam: gates.state,
    multiplierAdam: moved.state,
    history: [...state.history, { loss, expectedSparsity: expectedSparsity(next, weights) }],
  };
}

const descend = (
  values: readonly number[],
  gradients: readonly number[],
  state: AdamState,
  learningRate: number,
) => adamStep(values, gradients, state, { learningRate });

/** Mean loss over the parts and its gradient by logAlpha: ∂loss/∂gate · ∂gate/∂logAlpha. */
async function sampledLoss(
  { session, batches, seed }: TrainingOptions,
  { logAlphas, step }: TrainingState,
): Promise<{ loss: number; gradients: number[] }> {
  const parts = batches(step);
  const gradients = Array<number>(logAlphas.length).fill(0);
  let loss = 0;
  for (const [index, part] of parts.entries()) {
    const samples = drawGates(logAlphas, seed, step, index);
    const result = await session.step(
      part,
      samples.map(({ gate }) => gate),
    );
    if (!Number.isFinite(result.loss)) throw new RangeError(`the loss of step ${step} is ${result.loss}`);
    loss += result.loss / parts.length;
    samples.forEach(({ slope }, i) => {
      gradients[i]! += (result.gradients[i]! * slope) / parts.length;
    });
  }
  return { loss, gradients };
}

/** Every second part takes the mirrored noise of the one before (antithetic variates): their errors tend to cancel. */
function drawGates(logAlphas: readonly number[], seed: number, step: number, part: number): GateSample[] {
  const random = seededRandom(Math.imul(seed, 0x9e3779b1) ^ Math.imul(step, 0x85ebca6b) ^ (part >> 1));
  return logAlphas.map((logAlpha) => {
    const noise = random.next();
    return sampleGate(logAlpha, part % 2 === 0 ? noise : 1 - noise);
  });
}
