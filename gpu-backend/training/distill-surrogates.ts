/**
 * Distils surrogates: KL of the masked model to the dense one falls by the gradients of A, B and biases, with another
 * random mask and fresh text every step, so that one table serves every mask (in the manner of SliceGPT-like repair
 * by distillation, with the model's weights frozen). The closed form is where it starts; held-out text says when it
 * stops, and the running mean of the table is what is judged and kept.
 *
 * Every step is a function of the state before it and of its number: a run that is stored and taken up again ends as
 * one that was never interrupted.
 */
import type { Random } from '../calibration/random.ts';
import { seededRandom } from '../calibration/random.ts';
import type { SurrogateTable } from '../model/surrogates.ts';
import type { Descent } from './descend-surrogates.ts';
import { copyTable, descend, startDescent } from './descend-surrogates.ts';
import { drawAround, drawMask } from './draw-mask.ts';
import type { SurrogateSession } from './surrogate-session.ts';
import type { TaughtBatch } from './teacher.ts';

export type Judgement = {
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
  /** What replacing a block alone costs, `[2L]`. */
  readonly costs: readonly number[];
  /** Masks in use, `[2L]` each: most steps meet one of them or one near by. None: all masks are drawn by cost. */
  readonly around?: readonly Uint8Array[];
  /** The text of a step: the same number gives the same text. */
  batch(step: number): Promise<TaughtBatch>;
  /** KL on held-out text under the masks that matter. */
  judge(table: SurrogateTable): Promise<number>;
  readonly learningRate?: number;
  readonly onStep?: (state: DistillState) => Promise<void> | void;
  readonly signal?: AbortSignal | undefined;
};

/** Share of a block's size; rises at first and falls to a tenth. */
const LEARNING_RATE = 0.01;
const WARM_UP_STEPS = 20;
const FINAL_SHARE = 0.1;
const JUDGE_EVERY = 50;
/**
 * Judgements without a better one that end a run, in the part of it whose steps are short. Before that a table that
 * began well gets worse: long steps shake it, and what they gain shows when they are shorter.
 */
const PATIENCE = 4;
const PATIENT_SHARE = 0.5;
const [SPARSITY_MIN, SPARSITY_MAX] = [0.1, 0.35];
/** Share of the steps that meet a mask in use, where some are named. */
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

/** Goes on from `state`, whose arrays it changes, to the last step or until held-out text says that it is enough. */
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
  const random = seededRandom(Math.imul(seed + 1, 0x9e3779b1) + state.step);
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
    : drawMask({ costs, sparsityMin: SPARSITY_MIN, sparsityMax: SPARSITY_MAX }, random);
}

/** Linear up, then half a cosine down. */
export function learningRateAt(step: number, steps: number, peak = LEARNING_RATE): number {
  const warm = Math.min(1, (step + 1) / WARM_UP_STEPS);
  const fall = (1 + Math.cos((Math.PI * step) / Math.max(1, steps))) / 2;
  return peak * warm * (FINAL_SHARE + (1 - FINAL_SHARE) * fall);
}
