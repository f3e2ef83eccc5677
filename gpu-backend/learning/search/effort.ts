/** How much work a run puts into its masks, and what that is in units of progress. */
import type { Scored } from '../data/samples.ts';

/** What the gates' loss is held against: the dense model's distributions, or the text itself. */
export type TargetKind = 'dense' | 'next-token';

/** What a sparsity counts: blocks, or measured time of a decoded token. */
export type BlockCost = 'blocks' | 'time';

export type GateEffort = {
  readonly gateSteps: number;
  readonly gateLearningRate: number;
  readonly multiplierLearningRate: number;
};

type MaskEffort = GateEffort & {
  /** Scored positions that masks are searched on. */
  readonly searchPositions: number;
  /** Batches of them that blocks and drawn gates are ranked on. */
  readonly glanceParts: number;
  /** Rounds of measuring all blocks and exchanging some. */
  readonly rounds: number;
  /** Exchanges measured in a round at most, and those in a row that may fail. */
  readonly exchanges: number;
  readonly triesMax: number;
};

export type LearnEffort = {
  readonly one: MaskEffort & {
    /** Masks that taking blocks out one by one may try. */
    readonly greedyEvaluations: number;
  };
  readonly cluster: MaskEffort;
  /**
   * Scored positions, of other prompts, on which the best of the masks found is chosen; a cluster's own has to lead the
   * mask for everybody on as many more.
   */
  readonly choicePositions: number;
  /** Scored positions of a cluster's held-out figures. */
  readonly heldOutPositions: number;
  /** Tokens of one sequence, cut at the end: many short texts tell more than one long one. */
  readonly tokensMax: number;
  readonly targets: TargetKind;
  readonly scored: Scored;
};

export const LEARN_EFFORT: LearnEffort = {
  one: {
    searchPositions: 4096,
    glanceParts: 2,
    greedyEvaluations: 300,
    gateSteps: 80,
    gateLearningRate: 0.1,
    multiplierLearningRate: 0.1,
    rounds: 1,
    exchanges: 40,
    triesMax: 12,
  },
  cluster: {
    searchPositions: 2560,
    glanceParts: 1,
    gateSteps: 30,
    gateLearningRate: 0.1,
    multiplierLearningRate: 0.1,
    rounds: 1,
    exchanges: 24,
    triesMax: 8,
  },
  choicePositions: 3072,
  heldOutPositions: 1024,
  tokensMax: 128,
  targets: 'dense',
  scored: 'all',
};
