/**
 * Proposes masks. For everybody: by ranking blocks, by greedy removal, and by learning gates. For a group of clusters:
 * starting from that mask, by exchanges and by gates on the group's prompts. Proposals are compared on prompts that no
 * search saw.
 */
import { denseMask, type Mask, maskBits } from '../../../shared/mask/mask.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import { drawGates, type TrainedGates, trainMask } from '../gates/train-mask.ts';
import { masksByScore } from './budget.ts';
import type { LearnEffort } from './effort.ts';
import {
  type CostedMask,
  exchangeBlocks,
  greedyMask,
  improveMask,
  type MaskCost,
  worthOfBlocks,
} from './exchange.ts';
import type { TextCost, Workbench } from './workbench.ts';

export type Proposal = { readonly source: string; readonly mask: Mask };
/** `kl`: on the text of the choice. */
export type Candidate = Proposal & { readonly kl: number };

export type MaskSearch = {
  readonly proposals: readonly Proposal[];
  /** Rise of the KL when each block is removed, `[2L]`: from the dense model, or from the mask for everybody. */
  readonly worth: readonly number[];
  /** Undefined where no gates were learned. */
  readonly gates: LearnedGates | undefined;
};

/** Replaces the search where masks are known already: only ranks the blocks. */
export async function rankBlocks(
  bench: Workbench,
  rows: readonly CalibrationRow[],
  known: readonly Mask[],
  effort: LearnEffort['one'],
): Promise<MaskSearch> {
  const { worth } = await ranked(bench, rows, effort);
  return { proposals: known.map((mask) => ({ source: 'the earlier set', mask })), worth, gates: undefined };
}

/** The text on which the mask for everybody is searched, and the worth of each block there. */
async function ranked(
  bench: Workbench,
  rows: readonly CalibrationRow[],
  { searchPositions, glanceParts }: LearnEffort['one'],
) {
  const on = bench.costOn('one search', rows, searchPositions, glanceParts);
  return { on, worth: await worthOfBlocks(on.atAGlance, denseMask(bench.blockCount)) };
}

export async function searchOneMask(
  bench: Workbench,
  rows: readonly CalibrationRow[],
  effort: LearnEffort['one'],
): Promise<MaskSearch> {
  const { budget } = bench;
  const { on, worth } = await ranked(bench, rows, effort);
  const options = { cost: on, budget, evaluationsMax: effort.exchanges, triesMax: effort.triesMax };
  const improved = (mask: Mask) => improveMask(mask, worth, effort.rounds, options);
  const byGreed = async () => {
    const { mask } = await greedyMask(on.atAGlance, budget, worth, effort.greedyEvaluations);
    return { mask, improved: await improved(mask) };
  };
  const byGates = async () => {
    const gates = await learnGates(bench, 'one gates', rows, worth, on, effort.gateSteps);
    const exchanged = await exchangeBlocks(gates.best.mask, gates.logAlphas, options);
    return { gates, improved: await improved(exchanged) };
  };
  const [greedy, { gates, improved: learned }] = await Promise.all([byGreed(), byGates()]);
  const proposals = [
    { source: 'rank', mask: masksByScore(worth, budget, 1)[0]! },
    { source: 'greedy', mask: greedy.mask },
    { source: 'greedy+swaps', mask: greedy.improved },
    { source: 'gates', mask: gates.best.mask },
    { source: 'gates+swaps', mask: learned },
  ];
  return { proposals, worth, gates };
}

/**
 * @param starts masks that the search may start from: the group's own or the mask for everybody, then those of others.
 * @param ranking ranking of the blocks on everybody's prompts.
 */
export async function searchGroupMask(
  bench: Workbench,
  name: string,
  rows: readonly CalibrationRow[],
  starts: readonly [Mask, ...Mask[]],
  ranking: readonly number[],
  effort: LearnEffort['group'],
): Promise<MaskSearch> {
  const on = bench.costOn(`${name} search`, rows, effort.searchPositions, effort.glanceParts);
  const { exchanges: evaluationsMax, triesMax } = effort;
  const options = { cost: on, budget: bench.budget, evaluationsMax, triesMax };
  const start = await bestStart(starts, on);
  const worth = await worthOfBlocks(on.atAGlance, start, ranking);
  const swapped = await exchangeBlocks(start, worth, options);
  const gates = await learnGates(bench, `${name} gates`, rows, worth, on, effort.gateSteps);
  const learned = await exchangeBlocks(gates.best.mask, gates.logAlphas, options);
  const best = (await on.isBetter(learned, swapped)) ? learned : swapped;
  const improved = await improveMask(best, worth, effort.rounds, options);
  const proposals = [
    { source: 'swaps', mask: swapped },
    { source: 'gates', mask: gates.best.mask },
    { source: 'gates+swaps', mask: learned },
    { source: best === learned ? 'gates+swaps twice' : 'swaps twice', mask: improved },
  ];
  return { proposals, worth, gates };
}

async function bestStart([one, ...others]: readonly [Mask, ...Mask[]], on: TextCost): Promise<Mask> {
  let best = one;
  for (const mask of others) if (await on.isBetter(mask, best)) best = mask;
  return best;
}

/** Pairs of counts tried for the learned gates: the nearest pair and its neighbours. */
const COUNTS_TRIED = 5;
/** Random draws of the gates, whose mean loss represents the gates in training. */
const DRAWS = 6;

type LearnedGates = {
  readonly logAlphas: readonly number[];
  readonly curve: TrainedGates['history'];
  readonly best: CostedMask;
  /** Mean cost of randomly drawn gates, on the same text as the cost of `best`: the search's glance. */
  readonly stochastic: number;
};

/**
 * Learns gates on one group of prompts, and finds the best binary mask for them.
 * @param worth rise of the loss when each block is removed, `[2L]`: the ranking from which the gates start.
 * @param on the text on which binary masks are tried; the gates learn on other text.
 * @param steps training steps.
 */
async function learnGates(
  bench: Workbench,
  name: string,
  rows: readonly CalibrationRow[],
  worth: readonly number[],
  on: TextCost,
  steps: number,
): Promise<LearnedGates> {
  const { budget, seed, signal } = bench;
  const { logAlphas, history } = await trainMask({
    importance: worth,
    blockWeights: budget.blockWeights,
    targetSparsity: budget.targetSparsity,
    steps,
    seed,
    signal,
    ...bench.training(name, rows, steps),
  });
  const draws = Array.from({ length: DRAWS }, (_, draw) => {
    const gates = drawGates(logAlphas, seed, steps, draw).map(({ gate }) => gate);
    return on.ofGates(`${name} draw ${draw}`, gates);
  });
  const tried = masksByScore(logAlphas, budget, COUNTS_TRIED).map(
    async (mask): Promise<CostedMask> => ({ mask, cost: await on.atAGlance(mask) }),
  );
  const [drawn, found] = await Promise.all([Promise.all(draws), Promise.all(tried)]);
  const stochastic = drawn.reduce((sum, cost) => sum + cost / DRAWS, 0);
  const best = found.reduce((least, one) => (one.cost < least.cost ? one : least));
  return { logAlphas, curve: history, best, stochastic };
}

/** Distinct masks by rising KL; ties keep their order. */
export async function compareMasks(proposals: readonly Proposal[], cost: MaskCost): Promise<Candidate[]> {
  const bits = proposals.map(({ mask }) => maskBits(mask));
  const candidates: Candidate[] = [];
  for (const [index, proposal] of proposals.entries()) {
    if (bits.indexOf(bits[index]!) === index) candidates.push({ ...proposal, kl: await cost(proposal.mask) });
  }
  return candidates.sort((a, b) => a.kl - b.kl);
}
