/**
 * Distils surrogates: gradient descent on A, B and the biases lowers the KL of the masked model to the dense one, with
 * another random mask and new text in every step, so that one table serves every mask. The model's weights are frozen.
 * It starts from the closed form and stops by held-out text (early stopping); the running mean of the table is judged
 * and kept.
 *
 * Every step is a function of the previous state and the step's number, so a saved and resumed run ends like one
 * without interruption.
 */
import type { StoredLlama } from '../../model/architectures/llama.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import {
  eachPart,
  SURROGATE_PARTS,
  type SurrogatePart,
  type SurrogateTable,
} from '../../model/surrogates.ts';
import { floats } from '../../onnx/session.ts';
import { createRandom, type Random } from '../../random.ts';
import { type GateBatch, stepFeeds } from '../gates/batches.ts';
import { fittingStepGraph } from '../gates/gate-graph.ts';
import { openTrainingGraph, type TrainingSessionOptions } from '../gates/gate-session.ts';
import type { TaughtBatch } from '../gates/teacher.ts';
import type { TrainingLinears } from '../gates/training-weights.ts';
import { drawAround, drawMask } from './draw-mask.ts';

type Judgement = {
  readonly step: number;
  /** Mean over held-out text and masks, nats. */
  readonly kl: number;
};

export type DistillState = {
  readonly step: number;
  readonly descent: Descent;
  readonly best: { readonly table: SurrogateTable; readonly kl: number; readonly step: number };
  readonly judgements: readonly Judgement[];
  /** KL of every step's own text and mask. */
  readonly losses: readonly number[];
};

export type DistillOptions = {
  readonly session: Pick<SurrogateSession, 'step'>;
  readonly steps: number;
  readonly seed: number;
  /** Cost of replacing each block alone, `[2L]`. */
  readonly costs: readonly number[];
  /**
   * Masks in use, `[2L]` each: most steps take one of them or a similar mask. Without any, all masks are drawn by cost.
   */
  readonly around?: readonly Uint8Array[] | undefined;
  /** The text of a step: the same number gives the same text. */
  batch(step: number): Promise<TaughtBatch>;
  /** KL on held-out text under the judged masks. */
  judge(table: SurrogateTable): Promise<number>;
  readonly learningRate?: number | undefined;
  readonly onStep?: (state: DistillState) => Promise<void> | void;
  readonly signal?: AbortSignal | undefined;
};

/** Peak learning rate, as a share of a block's size; it warms up and then falls to a tenth. */
const LEARNING_RATE = 0.01;
const WARM_UP_STEPS = 20;
const FINAL_SHARE = 0.1;
const JUDGE_EVERY = 50;
/**
 * A run ends after this many judgements without improvement, once the learning rate is low. At a high rate a good table
 * first gets worse; the gain shows when the rate falls.
 */
const PATIENCE = 4;
const PATIENT_SHARE = 0.5;
/** Share of the steps that take a mask in use, if there are any. */
const AROUND_SHARE = 0.6;

export async function startDistillation(
  table: SurrogateTable,
  judge: DistillOptions['judge'],
): Promise<DistillState> {
  const kl = await judge(table);
  return {
    step: 0,
    descent: startDescent(table),
    best: { table: copyTable(table), kl, step: 0 },
    judgements: [{ step: 0, kl }],
    losses: [],
  };
}

/** Continues from `state`, whose arrays it changes, to the last step or until held-out KL stops improving. */
export async function distill(options: DistillOptions, state: DistillState): Promise<DistillState> {
  let current = state;
  while (current.step < options.steps && !hasStalled(current, options.steps)) {
    options.signal?.throwIfAborted();
    current = await distillStep(options, current);
    await options.onStep?.(current);
  }
  return current;
}

function hasStalled({ best, judgements }: DistillState, steps: number): boolean {
  const since = Math.max(best.step, PATIENT_SHARE * steps);
  return judgements.filter(({ step }) => step > since).length >= PATIENCE;
}

async function distillStep(options: DistillOptions, state: DistillState): Promise<DistillState> {
  const { session, seed, steps } = options;
  const random = createRandom(Math.imul(seed + 1, 0x9e3779b1) + state.step);
  const runs = drawRuns(options, random);
  const batch = await options.batch(state.step);
  const { loss, gradients } = await session.step(batch, runs, state.descent.table);
  if (!Number.isFinite(loss)) throw new RangeError(`the loss of step ${state.step} is ${loss}`);
  descend(state.descent, gradients, runs, learningRateAt(state.step, steps, options.learningRate));
  const step = state.step + 1;
  const losses = [...state.losses, loss - batch.entropy];
  const next = { ...state, step, losses };
  if (step % JUDGE_EVERY !== 0 && step !== steps) return next;
  const { average } = state.descent;
  const kl = await options.judge(average);
  const judgements = [...state.judgements, { step, kl }];
  return kl < state.best.kl
    ? { ...next, judgements, best: { table: copyTable(average), kl, step } }
    : { ...next, judgements };
}

function drawRuns({ costs, around = [] }: DistillOptions, random: Random): Uint8Array {
  return around.length > 0 && random.next() < AROUND_SHARE
    ? drawAround(around, costs, random)
    : drawMask(costs, random);
}

/** Linear warm-up, then cosine decay. */
function learningRateAt(step: number, steps: number, peak = LEARNING_RATE): number {
  const warm = Math.min(1, (step + 1) / WARM_UP_STEPS);
  const fall = (1 + Math.cos((Math.PI * step) / Math.max(1, steps))) / 2;
  return peak * warm * (FINAL_SHARE + (1 - FINAL_SHARE) * fall);
}

/* A step on one installed model: loss, and its gradients by the tables of surrogates. */

/** In the layout of `SurrogateTable`. */
type Parts = Readonly<Record<SurrogatePart, Float32Array>>;

export type SurrogateSession = {
  /** `runs`: `[2L]`, 1 or 0. Gradients are 0 for blocks that run. @throws RangeError on sizes that do not fit each other. */
  step(
    batch: GateBatch,
    runs: ArrayLike<number>,
    table: SurrogateTable,
  ): Promise<{ loss: number; gradients: Parts }>;
  close(): Promise<void>;
};

export async function openSurrogateSession(
  folder: string,
  config: ModelConfig,
  { rank, ...options }: TrainingSessionOptions & { readonly rank: number },
): Promise<SurrogateSession> {
  const build = (stored: StoredLlama, linears: TrainingLinears) =>
    fittingStepGraph(config, stored, linears, { by: 'surrogates', surrogateRank: rank, tail: true });
  const session = await openTrainingGraph(folder, config, build, options);
  return {
    async step(batch, runs, table) {
      const outputs = await session.run(stepFeeds(config, batch, runs, table), [
        'loss',
        ...SURROGATE_PARTS.map((part) => `surrogate_${part}_gradients`),
      ]);
      const gradients = eachPart((part) => floats(outputs[`surrogate_${part}_gradients`]!));
      return { loss: floats(outputs.loss!)[0]!, gradients };
    },
    close: () => session.release(),
  };
}

/*
 * Adam on tables of surrogates, in place on typed arrays (4.5 million numbers for the default model). Only the blocks
 * that a step skips have a gradient and are updated, each with its own step count. Updates are relative to the initial
 * size of a block's numbers, since blocks' outputs differ by orders of magnitude.
 */

type Descent = {
  readonly table: SurrogateTable;
  /** Running means of gradients and of their squares. */
  readonly mean: Parts;
  readonly square: Parts;
  /** Running mean of the table itself: it is judged and kept. */
  readonly average: SurrogateTable;
  /** Number of updates of each block, `[2L]`. */
  readonly moves: Int32Array;
  /** Root mean square of a block's numbers at the start, `[2L]` by part. */
  readonly scale: Parts;
};

const [BETA_1, BETA_2, EPSILON] = [0.9, 0.99, 1e-12];
/** Decay of the table's running mean at each update of a block. */
const AVERAGE_DECAY = 0.95;

export function startDescent(start: SurrogateTable): Descent {
  const table = copyTable(start);
  const zeros = () => eachPart((part) => new Float32Array(table[part].length));
  return {
    table,
    mean: zeros(),
    square: zeros(),
    average: copyTable(start),
    moves: new Int32Array(table.blockCount),
    scale: eachPart((part) => sizes(table[part], table.blockCount)),
  };
}

export const copyTable = (table: SurrogateTable): SurrogateTable => ({
  ...table,
  ...eachPart((part) => table[part].slice()),
});

function sizes(values: Float32Array, blockCount: number): Float32Array {
  const width = values.length / blockCount;
  return Float32Array.from({ length: blockCount }, (_, block) => {
    let sum = 0;
    for (let i = block * width; i < (block + 1) * width; i++) sum += values[i]! ** 2;
    return Math.sqrt(sum / width);
  });
}

/** Updates the blocks that `runs` skips. `learningRate`: the largest update, as a share of a block's size. */
export function descend(
  descent: Descent,
  gradients: Parts,
  runs: ArrayLike<number>,
  learningRate: number,
): void {
  for (let block = 0; block < descent.table.blockCount; block++) {
    if (runs[block] !== 0) continue;
    descent.moves[block]!++;
    for (const part of SURROGATE_PARTS) moveBlock(descent, gradients[part], part, block, learningRate);
  }
}

function moveBlock(
  { table, mean, square, average, moves, scale }: Descent,
  gradients: Float32Array,
  part: SurrogatePart,
  block: number,
  learningRate: number,
): void {
  const [values, averages, m, v] = [table[part], average[part], mean[part], square[part]];
  const width = values.length / table.blockCount;
  const count = moves[block]!;
  const rate = (learningRate * scale[part][block]!) / (1 - BETA_1 ** count);
  const squareScale = 1 / (1 - BETA_2 ** count);
  for (let i = block * width; i < (block + 1) * width; i++) {
    const gradient = gradients[i]!;
    m[i] = BETA_1 * m[i]! + (1 - BETA_1) * gradient;
    v[i] = BETA_2 * v[i]! + (1 - BETA_2) * gradient * gradient;
    values[i]! -= (rate * m[i]!) / (Math.sqrt(v[i]! * squareScale) + EPSILON);
    averages[i]! += (1 - AVERAGE_DECAY) * (values[i]! - averages[i]!);
  }
}
