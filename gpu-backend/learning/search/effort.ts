/** How much work a learning run puts into its masks. It follows the data: on little text, more searching finds noise. */
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
  /** Of masks that are composed of what single blocks change for each cluster. */
  readonly compose: {
    /** Masks at most; none are composed without. */
    readonly masks: number;
    /** Blocks that are changed one at a time. */
    readonly blocks: number;
    /** Scored positions that this is measured on. */
    readonly positions: number;
  };
  /**
   * Sizes that the mask for everybody also gets, as multiples of what it leaves out: tolerant clusters leave out more,
   * fragile ones less, at the same mean. 0 is the dense model. Sizes at which models fall apart are left out.
   */
  readonly sizes: readonly number[];
  /** Exchanges tried for each of these sizes at most. */
  readonly sizeExchanges: number;
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
  compose: { masks: 16, blocks: 24, positions: 24_576 },
  sizes: [0, 0.5, 1.5, 2],
  sizeExchanges: 14,
  turns: 2,
  choicePositions: 6144,
  sharePositions: 32_768,
  heldOutPositions: 16_384,
  tokensMax: 128,
  targets: 'dense',
  scored: 'all',
};

/** A first set: less text, few exchanges and none in rounds, two groups, one turn. */
export const QUICK_EFFORT: LearnEffort = {
  ...LEARN_EFFORT,
  one: {
    ...LEARN_EFFORT.one,
    ...{ searchPositions: 768, glanceParts: 1, greedyEvaluations: 60, gateSteps: 8 },
    ...{ rounds: 0, exchanges: 10, triesMax: 5 },
  },
  group: {
    ...LEARN_EFFORT.group,
    ...{ searchPositions: 768, gateSteps: 6, rounds: 0, exchanges: 10, triesMax: 5 },
  },
  masksMax: 2,
  compose: { masks: 0, blocks: 0, positions: 0 },
  sizes: [0, 1.5],
  sizeExchanges: 0,
  turns: 1,
  choicePositions: 1536,
  sharePositions: 2048,
  heldOutPositions: 2048,
};

/** Of a run whose masks are known: it searches for none, and shares the clusters out once. */
export const withoutSearch = (effort: LearnEffort): LearnEffort => ({
  ...effort,
  one: { ...effort.one, ...{ greedyEvaluations: 0, gateSteps: 0, rounds: 0, exchanges: 0 } },
  turns: 0,
});

/** A search can use so many times the text that one of its masks is measured on: gates learn on text of their own. */
const TEXTS_A_SEARCH = 3;
/** Less than this part of an effort finds nothing. */
const LEAST_PART = 0.25;
/** Even on little text it is worth looking whether two masks suit better than one. */
const MASKS_MIN = 2;

/** Scored positions that an effort is worth in full. */
export const fullText = ({ one }: LearnEffort): number => TEXTS_A_SEARCH * one.searchPositions;

/**
 * Effort follows the data: the less text there is to search on, the fewer masks are tried on it, for the best of many is
 * then the one that noise favours. And each group of clusters gets text enough to be measured on.
 * @param positions scored positions to search on.
 */
export function effortFor(effort: LearnEffort, positions: number): LearnEffort {
  const part = Math.min(1, Math.max(LEAST_PART, positions / fullText(effort)));
  if (part === 1) return effort;
  const some = (count: number) => Math.ceil(part * count);
  const less = <T extends MaskEffort>(search: T): T => ({
    ...search,
    glanceParts: some(search.glanceParts),
    gateSteps: some(search.gateSteps),
    exchanges: some(search.exchanges),
    triesMax: some(search.triesMax),
  });
  const groups = Math.floor(positions / effort.group.searchPositions);
  return {
    ...effort,
    one: { ...less(effort.one), greedyEvaluations: some(effort.one.greedyEvaluations) },
    group: less(effort.group),
    sizeExchanges: some(effort.sizeExchanges),
    masksMax: Math.min(effort.masksMax, Math.max(MASKS_MIN, groups)),
  };
}

/** Parts of a training step, each on text of its own. */
export const STEP_PARTS = 2;
/** Results after learning gates: draws, and counts tried. */
const GATE_RESULTS = 11;
/** Masks that a choice compares at most. */
const CHOICE_RESULTS = 6;

/** The most results that each search comes to. */
export function searchResults({ one, group, sizeExchanges }: LearnEffort, blocks: number) {
  const rounds = ({ rounds, exchanges }: MaskEffort) => rounds * (blocks + exchanges + 1);
  const search = (effort: MaskEffort) =>
    blocks + 2 + STEP_PARTS * effort.gateSteps + GATE_RESULTS + effort.exchanges + rounds(effort);
  return {
    /** Of one size: what blocks in question are worth, and exchanges. */
    size: blocks + sizeExchanges + 2,
    one: search(one) + rounds(one) + one.greedyEvaluations + CHOICE_RESULTS,
    group: search(group) + group.exchanges,
  };
}
