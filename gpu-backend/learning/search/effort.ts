/**
 * How much work a learning run puts into its masks, and where it is: results so far against the most that a stage can
 * come to. A stage that ends early jumps ahead.
 */
import type { Scored } from '../data/samples.ts';
import type { Budget } from './budget.ts';

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

export type MaskStage = 'one mask' | 'masks' | 'choose' | 'measure';

export type LearnProgress =
  | { readonly stage: 'read' | 'embed' }
  | {
      readonly stage: MaskStage;
      readonly done: number;
      readonly total: number;
      /** The cluster that is worked on. */
      readonly cluster: number | undefined;
    };

/** Parts of a training step, each on text of its own. */
export const STEP_PARTS = 2;
/** Results after learning gates: draws, and counts tried. */
const GATE_RESULTS = 11;
/** Masks that a choice compares at most, beside other clusters'. */
const CHOICE_RESULTS = 6;

export function trackProgress(
  onProgress: (progress: LearnProgress) => void,
  effort: LearnEffort,
  clusterCount: number,
  budget: Budget,
) {
  const blocks = budget.blockWeights.length;
  const rounds = ({ rounds, exchanges }: LearnEffort['cluster']) => rounds * (blocks + exchanges + 1);
  const search = (one: LearnEffort['cluster']) =>
    blocks + 2 + STEP_PARTS * one.gateSteps + GATE_RESULTS + one.exchanges + rounds(one);
  const perStep: Record<MaskStage, number> = {
    'one mask': search(effort.one) + rounds(effort.one) + effort.one.greedyEvaluations + CHOICE_RESULTS,
    masks: search(effort.cluster) + effort.cluster.exchanges,
    choose: CHOICE_RESULTS + clusterCount,
    measure: 1,
  };
  let at = { stage: 'one mask' as MaskStage, cluster: undefined as number | undefined, done: 0 };
  const report = () => {
    const { stage, cluster } = at;
    const size = perStep[stage];
    const done = (cluster ?? 0) * size + Math.min(at.done, size);
    onProgress({ stage, done, total: size * (cluster === undefined ? 1 : clusterCount), cluster });
  };
  return {
    onStage(stage: MaskStage, cluster?: number) {
      at = { stage, cluster, done: 0 };
      report();
    },
    onResult() {
      at.done++;
      report();
    },
  };
}
