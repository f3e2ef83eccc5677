/** Gates learned on one group of prompts, and the best bits that they stand for. */
import type { CalibrationRow } from '../calibration/read-data.ts';
import { masksByScore } from '../training/budget.ts';
import type { FoundMask } from '../training/search-mask.ts';
import type { TrainingState } from '../training/train-mask.ts';
import { drawGates, trainMask } from '../training/train-mask.ts';
import type { GateEffort } from './settings.ts';
import type { TextCost, Workbench } from './workbench.ts';

/** Masks of other counts of attention and FFN blocks that compete with the one that the gates are nearest to. */
const COUNTS_TRIED = 5;
/** Draws of the gates whose mean loss stands for gates as they are in training. */
const DRAWS = 6;

export type LearnedGates = {
  readonly logAlphas: readonly number[];
  readonly curve: TrainingState['history'];
  readonly best: FoundMask;
  /** Mean cost of gates as training draws them, on the text that `best` has its cost on: the beginning of the search's. */
  readonly stochastic: number;
};

/**
 * @param worth rise of the loss without each block, `[2L]`: the ranking that the gates start from.
 * @param on the text that bits are tried on; the gates learn on text of their own.
 */
export async function learnGates(
  bench: Workbench,
  name: string,
  rows: readonly CalibrationRow[],
  worth: readonly number[],
  on: TextCost,
  effort: GateEffort,
): Promise<LearnedGates> {
  const { budget, seed, signal } = bench;
  const { logAlphas, history } = await trainMask({
    importance: worth,
    blockWeights: budget.blockWeights,
    targetSparsity: budget.targetSparsity,
    steps: effort.gateSteps,
    seed,
    gateLearningRate: effort.gateLearningRate,
    multiplierLearningRate: effort.multiplierLearningRate,
    ...bench.training(name, rows, effort.gateSteps),
    ...(signal === undefined ? {} : { signal }),
  });
  let stochastic = 0;
  for (let draw = 0; draw < DRAWS; draw++) {
    const gates = drawGates(logAlphas, seed, effort.gateSteps, draw).map(({ gate }) => gate);
    stochastic += (await on.ofGates(`${name} draw ${draw}`, gates)) / DRAWS;
  }
  const found: FoundMask[] = [];
  for (const mask of masksByScore(logAlphas, budget, COUNTS_TRIED)) {
    found.push({ mask, cost: await on.atAGlance(mask) });
  }
  const best = found.reduce((least, one) => (one.cost < least.cost ? one : least));
  return { logAlphas, curve: history, best, stochastic };
}
