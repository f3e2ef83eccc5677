/**
 * Learns one mask: hard concrete gates on frozen weights, descending loss + sparsity penalty while the penalty's
 * multipliers ascend. Gates start from a ranking of the blocks, shifted so that the expected sparsity is the target
 * from the first step on; training only redistributes. (Starting from open gates, 80 of 100 steps pass before the
 * penalty closes any gate, and then it closes all at once.)
 *
 * Every step is a function of the previous state and the step's number, so a resumed run, which reads its samples from
 * the journal, ends with the same result.
 */
import { lowestFirst } from '../../measure.ts';
import { createRandom } from '../../random.ts';
import type { AdamState, GateSample, Multipliers } from './hard-concrete.ts';
import {
  adamStep,
  clampLogAlpha,
  expectedSparsity,
  newAdam,
  normalizedWeights,
  sampleGate,
  shiftToSparsity,
  sparsityPenalty,
} from './hard-concrete.ts';

/** A training run between two steps. */
type TrainingState = {
  /** Steps done. */
  readonly step: number;
  /** `[2L]`. */
  readonly logAlphas: readonly number[];
  readonly multipliers: Multipliers;
  readonly gateAdam: AdamState;
  readonly multiplierAdam: AdamState;
  /** One entry a step: the learning curve. */
  readonly history: readonly { readonly loss: number; readonly expectedSparsity: number }[];
};

export type TrainingOptions = {
  /** The cost of removing each block alone, `[2L]`: blocks with higher costs are kept longer. */
  readonly importance: readonly number[];
  /** The weight of each block in the sparsity, `[2L]`: 1, or its cost. */
  readonly blockWeights: readonly number[];
  /** Share of the weights' sum to be skipped, in (0, 1). */
  readonly targetSparsity: number;
  readonly steps: number;
  readonly seed: number;
  /**
   * Parts of a step, each with its own text and its own drawn gates; their gradients are averaged. More parts of fewer
   * sequences cost the same and have a lower variance.
   */
  readonly parts: number;
  /** Loss and gate gradients on the text of a step's part; the same numbers give the same result. */
  sample(step: number, part: number, gates: readonly number[]): Promise<LossAndGradients>;
  readonly signal: AbortSignal | undefined;
};

export type LossAndGradients = { readonly loss: number; readonly gradients: ArrayLike<number> };

/** Adam's learning rate of the gates and of the penalty's multipliers. */
export const LEARNING_RATE = 0.1;
/** logAlpha of the first-ranked and the last-ranked block before the shift. */
const RANK_SPREAD = 2;

/** The gates before the first step. */
export function startState(options: TrainingOptions): TrainingState {
  const { importance, targetSparsity } = options;
  const weights = normalizedWeights(options.blockWeights);
  if (weights.length !== importance.length)
    throw new RangeError(`${weights.length} weights for ${importance.length} blocks`);
  const order = lowestFirst(importance.keys(), (block) => importance[block]!);
  const ranked = Array<number>(order.length).fill(0);
  order.forEach((block, rank) => {
    ranked[block] = RANK_SPREAD * ((2 * rank) / Math.max(1, order.length - 1) - 1);
  });
  const shift = shiftToSparsity(ranked, weights, targetSparsity);
  return {
    step: 0,
    logAlphas: ranked.map((value) => clampLogAlpha(value + shift)),
    multipliers: [-borderPrice(order, importance, weights, targetSparsity), 0],
    gateAdam: newAdam(ranked.length),
    multiplierAdam: newAdam(2),
    history: [],
  };
}

/**
 * The cost of a unit of sparsity at the border between skipped and kept blocks: with this multiplier the ranking's own
 * mask is an equilibrium. A multiplier that starts from 0 takes longer to get there than the gates take to open all
 * blocks.
 */
function borderPrice(
  order: readonly number[],
  importance: readonly number[],
  weights: readonly number[],
  targetSparsity: number,
): number {
  let skipped = 0;
  const border = order.find((block) => {
    skipped += weights[block]!;
    return skipped >= targetSparsity;
  });
  const block = border ?? order.at(-1)!;
  return Math.max(0, importance[block]!) / weights[block]!;
}

export type TrainedGates = Pick<TrainingState, 'logAlphas' | 'history'>;

/** Rejects when `signal` aborts. */
export async function trainMask(options: TrainingOptions): Promise<TrainedGates> {
  let state = startState(options);
  while (state.step < options.steps) {
    options.signal?.throwIfAborted();
    state = await trainingStep(options, state);
  }
  return state;
}

async function trainingStep(options: TrainingOptions, state: TrainingState): Promise<TrainingState> {
  const { logAlphas, multipliers, step } = state;
  const weights = normalizedWeights(options.blockWeights);
  const { loss, gradients } = await sampledLoss(options, state);
  const penalty = sparsityPenalty(logAlphas, weights, options.targetSparsity, multipliers);
  const total = gradients.map((gradient, i) => gradient + penalty.logAlphaGradients[i]!);
  const gates = adamStep(logAlphas, total, state.gateAdam, LEARNING_RATE);
  const ascent = penalty.multiplierGradients.map((gradient) => -gradient);
  const moved = adamStep(multipliers, ascent, state.multiplierAdam, LEARNING_RATE);
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

/** Mean loss over the parts and its gradient by logAlpha: ∂loss/∂gate · ∂gate/∂logAlpha. */
async function sampledLoss(
  { parts, sample, seed }: TrainingOptions,
  { logAlphas, step }: TrainingState,
): Promise<{ loss: number; gradients: number[] }> {
  const gradients = Array<number>(logAlphas.length).fill(0);
  let loss = 0;
  const draws = Array.from({ length: parts }, (_, part) => drawGates(logAlphas, seed, step, part));
  const results = await Promise.all(
    draws.map((drawn, part) =>
      sample(
        step,
        part,
        drawn.map(({ gate }) => gate),
      ),
    ),
  );
  for (const [part, result] of results.entries()) {
    if (!Number.isFinite(result.loss)) throw new RangeError(`the loss of step ${step} is ${result.loss}`);
    loss += result.loss / parts;
    draws[part]!.forEach(({ slope }, i) => {
      gradients[i]! += (result.gradients[i]! * slope) / parts;
    });
  }
  return { loss, gradients };
}

/**
 * Every second part uses the mirrored noise of the part before it (antithetic variates), so that their errors tend to
 * cancel.
 */
export function drawGates(
  logAlphas: readonly number[],
  seed: number,
  step: number,
  part: number,
): GateSample[] {
  const random = createRandom(Math.imul(seed, 0x9e3779b1) ^ Math.imul(step, 0x85ebca6b) ^ (part >> 1));
  return logAlphas.map((logAlpha) => {
    const noise = random.next();
    return sampleGate(logAlpha, part % 2 === 0 ? noise : 1 - noise);
  });
}
