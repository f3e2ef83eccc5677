/**
 * How much a learning run searches. The effort follows the amount of data: on little text, more searching only fits
 * noise.
 */
import type { Scored } from '../data/samples.ts';

/** Targets of the gates' loss: the dense model's distributions, or the text's own next tokens. */
export type TargetKind = 'dense' | 'next-token';

/** What sparsity is a share of: the blocks, or the measured time of a decoded token. */
export type BlockCost = 'blocks' | 'time';

/** Default number of tokens before the decoded token whose time is measured. */
export const CONTEXT_TOKENS = 64;

type MaskEffort = {
  /** Training steps of the gates. */
  readonly gateSteps: number;
  /** Scored positions that masks are searched on. */
  readonly searchPositions: number;
  /** How many of their batches rank blocks and drawn gates. */
  readonly glanceParts: number;
  /** Rounds of measuring the blocks and exchanging some. */
  readonly rounds: number;
  /** Most exchanges measured in a round, and how many in a row may fail. */
  readonly exchanges: number;
  readonly triesMax: number;
};

export type LearnEffort = {
  readonly one: MaskEffort & {
    /** Most masks that greedy removal may try. */
    readonly greedyEvaluations: number;
  };
  /** Effort for the mask of a group of clusters. */
  readonly group: MaskEffort;
  /** Most masks that are searched for, unless a number is requested. */
  readonly masksMax: number;
  /** Masks composed from the effects of single blocks (`compose-masks.ts`). */
  readonly compose: {
    /** Most composed masks; 0: none. */
    readonly masks: number;
    /** Blocks whose effect is measured, one at a time. */
    readonly blocks: number;
    /** Scored positions on which effects are measured. */
    readonly positions: number;
  };
  /**
   * Other sizes of the mask for everybody, as multiples of its sparsity: tolerant clusters skip more, fragile ones
   * less, at the same mean. 0 is the dense model. Sizes at which models fail are left out.
   */
  readonly sizes: readonly number[];
  /** Exchanges tried for each of these sizes at most. */
  readonly sizeExchanges: number;
  /** Turns of searching masks for groups of clusters and assigning masks to clusters again. */
  readonly turns: number;
  /** Scored positions of other prompts, on which the mask for everybody is chosen. */
  readonly choicePositions: number;
  /** Scored positions of these prompts, on which masks are assigned to clusters. */
  readonly sharePositions: number;
  /** Scored positions of the held-out figures. */
  readonly heldOutPositions: number;
  /** Tokens of one sequence beside its system prompt, cut at the end: many short texts tell more than one long one. */
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
    rounds: 1,
    exchanges: 40,
    triesMax: 12,
  },
  group: {
    searchPositions: 2560,
    glanceParts: 1,
    gateSteps: 30,
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

/** `--quick`, for a first set: less text, few exchanges and no rounds, two groups, one turn. */
export const QUICK_EFFORT: LearnEffort = {
  ...LEARN_EFFORT,
  one: {
    ...LEARN_EFFORT.one,
    searchPositions: 768,
    glanceParts: 1,
    greedyEvaluations: 60,
    gateSteps: 8,
    rounds: 0,
    exchanges: 10,
    triesMax: 5,
  },
  group: { ...LEARN_EFFORT.group, searchPositions: 768, gateSteps: 6, rounds: 0, exchanges: 10, triesMax: 5 },
  masksMax: 2,
  compose: { masks: 0, blocks: 0, positions: 0 },
  sizes: [0, 1.5],
  sizeExchanges: 0,
  turns: 1,
  choicePositions: 1536,
  sharePositions: 2048,
  heldOutPositions: 2048,
};

/** Effort of a run whose masks are known: it does not search, and assigns masks to clusters once. */
export const withoutSearch = (effort: LearnEffort): LearnEffort => ({
  ...effort,
  one: { ...effort.one, greedyEvaluations: 0, gateSteps: 0, rounds: 0, exchanges: 0 },
  turns: 0,
});

/** A search uses this many times the text that one mask is measured on: gates learn on other text. */
const TEXTS_A_SEARCH = 3;
/** Smallest share of an effort that still finds something. */
const LEAST_PART = 0.25;
/** Even on little text it is worth looking whether two masks suit better than one. */
const MASKS_MIN = 2;

/** Scored positions that justify the full effort. */
export const fullText = ({ one }: LearnEffort): number => TEXTS_A_SEARCH * one.searchPositions;

/**
 * Adapts the effort to the data: with less text to search on, fewer masks are tried, since the best of many would be
 * a favourite of noise. Each group of clusters keeps enough text to be measured on.
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
/** Results after learning gates: drawn gates, and pairs of counts tried. */
const GATE_RESULTS = 11;
/** Most masks that a choice compares. */
const CHOICE_RESULTS = 6;

/** Upper bounds of the results that each search computes. */
export function searchResults({ one, group, sizeExchanges }: LearnEffort, blocks: number) {
  const rounds = ({ rounds, exchanges }: MaskEffort) => rounds * (blocks + exchanges + 1);
  const search = (effort: MaskEffort) =>
    blocks + 2 + STEP_PARTS * effort.gateSteps + GATE_RESULTS + effort.exchanges + rounds(effort);
  return {
    /** For one other size: the worth of candidate blocks, and exchanges. */
    size: blocks + sizeExchanges + 2,
    one: search(one) + rounds(one) + one.greedyEvaluations + CHOICE_RESULTS,
    group: search(group) + group.exchanges,
  };
}
