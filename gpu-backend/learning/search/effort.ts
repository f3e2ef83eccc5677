/**
 * How much work a learning run puts into its masks, and where it is: results so far against the most that a stage can
 * come to. A stage that ends early jumps ahead.
 */
import type { Scored } from '../data/samples.ts';

/** What the gates' loss is held against: the dense model's distributions, or the text itself. */
export type TargetKind = 'dense' | 'next-token';

/** What a sparsity counts: blocks, or measured time of a decoded token. */
export type BlockCost = 'blocks' | 'time';

/** Tokens before the decoded one whose time is measured, unless another number is asked for. */
export const CONTEXT_TOKENS = 64;

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
  /** Of the mask of a group of clusters. */
  readonly group: MaskEffort;
  /** Masks that are searched for at most, unless a number is asked for. */
  readonly masksMax: number;
  /** Turns of searching masks for groups of clusters and sharing the clusters out anew. */
  readonly turns: number;
  /** Scored positions, of other prompts, on which the mask for everybody is chosen. */
  readonly choicePositions: number;
  /** Scored positions, of the same prompts, on which it is measured which mask suits a cluster. */
  readonly sharePositions: number;
  /** Scored positions of the held-out figures. */
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
  group: {
    searchPositions: 2560,
    glanceParts: 1,
    gateSteps: 30,
    gateLearningRate: 0.1,
    multiplierLearningRate: 0.1,
    rounds: 1,
    exchanges: 24,
    triesMax: 8,
  },
  masksMax: 8,
  turns: 2,
  choicePositions: 6144,
  sharePositions: 32_768,
  heldOutPositions: 16_384,
  tokensMax: 128,
  targets: 'dense',
  scored: 'all',
};

/** A first set: less text, few exchanges, one turn. */
export const QUICK_EFFORT: LearnEffort = {
  ...LEARN_EFFORT,
  one: {
    ...LEARN_EFFORT.one,
    ...{
      searchPositions: 1024,
      glanceParts: 1,
      greedyEvaluations: 80,
      gateSteps: 20,
      exchanges: 12,
      triesMax: 6,
    },
  },
  group: {
    ...LEARN_EFFORT.group,
    ...{ searchPositions: 768, gateSteps: 8, exchanges: 10, triesMax: 5 },
  },
  masksMax: 4,
  turns: 1,
  choicePositions: 2048,
  sharePositions: 8192,
  heldOutPositions: 8192,
};

export type MaskStage = 'one mask' | 'masks' | 'share' | 'measure';

export type LearnProgress =
  | { readonly stage: 'read' | 'embed' }
  | {
      readonly stage: MaskStage;
      readonly done: number;
      readonly total: number;
      /** The group of clusters that is worked on. */
      readonly group: number | undefined;
    };

/** Parts of a training step, each on text of its own. */
export const STEP_PARTS = 2;
/** Results after learning gates: draws, and counts tried. */
const GATE_RESULTS = 11;
/** Masks that a choice compares at most. */
const CHOICE_RESULTS = 6;

/** The most results that each search comes to. */
export function searchResults({ one, group }: LearnEffort, blocks: number) {
  const rounds = ({ rounds, exchanges }: MaskEffort) => rounds * (blocks + exchanges + 1);
  const search = (effort: MaskEffort) =>
    blocks + 2 + STEP_PARTS * effort.gateSteps + GATE_RESULTS + effort.exchanges + rounds(effort);
  return {
    one: search(one) + rounds(one) + one.greedyEvaluations + CHOICE_RESULTS,
    group: search(group) + group.exchanges,
  };
}

/** A stage, or one of its parts: a search of a group of clusters out of several. */
type StagePart = {
  /** The most that it can come to. */
  readonly results: number;
  readonly group?: number;
  readonly groups?: number;
};

export function trackProgress(onProgress: (progress: LearnProgress) => void) {
  let at = { stage: 'one mask' as MaskStage, part: { results: 1 } as StagePart, done: 0 };
  const report = () => {
    const { results, group, groups = 1 } = at.part;
    const done = (group ?? 0) * results + Math.min(at.done, results);
    onProgress({ stage: at.stage, done, total: results * groups, group });
  };
  return {
    onStage(stage: MaskStage, part: StagePart) {
      at = { stage, part, done: 0 };
      report();
    },
    onResult() {
      at.done++;
      report();
    },
  };
}
