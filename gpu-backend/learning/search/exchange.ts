/**
 * Searches masks that meet a budget, by their exact cost on some text.
 *
 * `greedyMask` removes blocks one by one (FinerCut's greedy search, Zhang et al. 2024, with lazy evaluation: a block's
 * last measured rise is its estimate until it is the lowest). `improveMask` then exchanges blocks. The effect of an
 * exchange is predicted as the sum of its blocks' single effects; only the best predictions are evaluated, and
 * improvements are kept. The sums predict well because an exchange changes few of the blocks.
 *
 * An exchange gains thousandths of a nat, less than the noise of some hundred positions, and most exchanges are worse
 * from the start. So each races against the mask that it would replace, one part of the text after the other (Maron and
 * Moore, 1994, without their bound), and is kept only if it leads after every part.
 */
import type { Mask } from '../../../shared/mask/mask.ts';
import { denseMask, maskBits } from '../../../shared/mask/mask.ts';
import { highestFirst, lowestFirst, sumOf } from '../../measure.ts';
import type { BlockCounts, Budget } from './budget.ts';
import { countsOf, meetsBudget, withChanged } from './budget.ts';

/** Lower is better; the same mask gives the same cost. */
export type MaskCost = (mask: Mask) => Promise<number>;

export type CostedMask = { readonly mask: Mask; readonly cost: number };

/** How masks compare on a text that comes in parts. */
export type SearchCost = {
  /**
   * Cost on the first parts of the text: good enough for ranking, but not comparable with the cost on the whole text.
   */
  readonly atAGlance: MaskCost;
  /** Whether the mask leads after every part; evaluation stops at the first part after which it does not. */
  isBetter(mask: Mask, rival: Mask): Promise<boolean>;
};

type ImproveOptions = {
  readonly cost: SearchCost;
  readonly budget: Budget;
  /** Most exchanges that are tried. */
  readonly evaluationsMax: number;
  /** A round of exchanges ends after this many failures in a row. */
  readonly triesMax: number;
};

/** One exchange: blocks to run again, and blocks to leave out. */
type Move = { readonly open: readonly number[]; readonly close: readonly number[]; readonly change: number };

/** @param alone cost of removing each block alone, minus the cost of the dense model, `[2L]`: the first estimates. */
export async function greedyMask(
  cost: MaskCost,
  budget: Budget,
  alone: readonly number[],
  evaluationsMax: number,
): Promise<CostedMask> {
  let current: CostedMask = { mask: denseMask(alone.length), cost: await cost(denseMask(alone.length)) };
  const rises = [...alone];
  let evaluations = 0;
  while (!meetsBudget(current.mask, budget)) {
    const open = [...rises.keys()].filter((block) => mayClose(current.mask, block, budget));
    const fresh = new Map<number, CostedMask>();
    for (;;) {
      const block = open.reduce((best, other) => (rises[other]! < rises[best]! ? other : best));
      const known = fresh.get(block);
      if (known !== undefined) {
        current = known;
        break;
      }
      const mask = withChanged(current.mask, [block]);
      // When no evaluations are left, the estimates decide.
      if (evaluations++ >= evaluationsMax) {
        current = { mask, cost: current.cost + rises[block]! };
        break;
      }
      const found = { mask, cost: await cost(mask) };
      rises[block] = found.cost - current.cost;
      fresh.set(block, found);
    }
  }
  return { mask: current.mask, cost: await cost(current.mask) };
}

/**
 * The worth of each block under a mask: the cost without the block minus the cost with it, `[2L]`. Under the dense mask
 * this ranks the blocks by removing each. With a `ranking`, only candidates are measured: the skipped blocks, and of
 * each kind about twice as many that rank lowest. The others count as much as the most valuable measured block.
 */
export async function worthOfBlocks(
  cost: MaskCost,
  mask: Mask,
  ranking?: readonly number[],
): Promise<number[]> {
  const here = await cost(mask);
  const measured = ranking === undefined ? [...mask.runs.keys()] : blocksInQuestion(mask, ranking);
  const worths = measured.map(async (block): Promise<[number, number]> => {
    const there = await cost(withChanged(mask, [block]));
    return [block, mask.runs[block] === 0 ? here - there : there - here];
  });
  const worth = new Map(await Promise.all(worths));
  const dearest = Math.max(...worth.values());
  return Array.from(mask.runs, (_, block) => worth.get(block) ?? dearest);
}

/** The candidates of {@link worthOfBlocks}, by rising index. */
function blocksInQuestion(mask: Mask, ranking: readonly number[]): number[] {
  const { attention, ffn } = countsOf(mask);
  const lowest = (kind: 0 | 1, count: number) =>
    lowestFirst(blocksOf(mask, kind, 1), (block) => ranking[block]!).slice(0, count);
  const out = [...blocksOf(mask, 0, 0), ...blocksOf(mask, 1, 0)];
  return [...out, ...lowest(0, attention + 4), ...lowest(1, ffn + 4)].sort((a, b) => a - b);
}

/**
 * Lighter masks: with 1, 2, … `steps` blocks returned. Blocks return in the order of the cost that they save for their
 * weight, each measured alone.
 */
export async function lighterMasks(
  mask: Mask,
  { blockWeights }: Budget,
  steps: number,
  cost: MaskCost,
): Promise<Mask[]> {
  const here = await cost(mask);
  const gains = new Map<number, number>();
  for (const block of [...blocksOf(mask, 0, 0), ...blocksOf(mask, 1, 0)]) {
    gains.set(block, (here - (await cost(withChanged(mask, [block])))) / blockWeights[block]!);
  }
  const order = highestFirst(gains.keys(), (block) => gains.get(block)!);
  return order.slice(0, steps).map((_, i) => withChanged(mask, order.slice(0, i + 1)));
}

/** Tries exchanges in the order of `worth`'s predictions, measuring each; the result is never worse than `start`. */
export async function exchangeBlocks(
  start: Mask,
  worth: readonly number[],
  { cost, budget, evaluationsMax, triesMax }: ImproveOptions,
): Promise<Mask> {
  if (!meetsBudget(start, budget)) throw new RangeError('the mask to improve is not within the budget');
  const tried = new Set([maskBits(start)]);
  let current = start;
  for (let failed = 0, evaluations = 0; failed < triesMax && evaluations < evaluationsMax; evaluations++) {
    const mask = movesOf(current, worth, budget)
      .map(({ open, close }) => withChanged(current, [...open, ...close]))
      .find((other) => !tried.has(maskBits(other)));
    if (mask === undefined) break;
    tried.add(maskBits(mask));
    if (await cost.isBetter(mask, current)) {
      current = mask;
      failed = 0;
    } else {
      failed++;
    }
  }
  return current;
}

/** Rounds of measuring the worth of candidate blocks and exchanging them, until a round changes nothing. */
export async function improveMask(
  start: Mask,
  ranking: readonly number[],
  rounds: number,
  options: ImproveOptions,
): Promise<Mask> {
  let best = start;
  for (let round = 0; round < rounds; round++) {
    const worth = await worthOfBlocks(options.cost.atAGlance, best, ranking);
    const next = await exchangeBlocks(best, worth, options);
    if (next === best) break;
    best = next;
  }
  return best;
}

/** All exchanges that lead to an allowed pair of counts, the best prediction first. */
function movesOf(mask: Mask, worth: readonly number[], budget: Budget): Move[] {
  const here = countsOf(mask);
  const index = budget.allowed.findIndex((pair) => samePair(pair, here));
  const moves = [...exchangesWithin(mask, 0), ...exchangesWithin(mask, 1)].map(([open, close]) => ({
    open: [open],
    close: [close],
  }));
  const worthOf = (blocks: readonly number[]) => sumOf(blocks.map((block) => worth[block]!));
  const neighbours = [budget.allowed[index - 1], budget.allowed[index + 1]];
  for (const pair of neighbours) if (pair !== undefined) moves.push(...exchangesTo(mask, worth, here, pair));
  return moves
    .map(({ open, close }) => ({ open, close, change: worthOf(close) - worthOf(open) }))
    .sort((a, b) => a.change - b.change || order(a, b));
}

const order = (a: Move, b: Move): number =>
  (a.open[0] ?? -1) - (b.open[0] ?? -1) || (a.close[0] ?? -1) - (b.close[0] ?? -1);
const samePair = (a: BlockCounts, b: BlockCounts) => a.attention === b.attention && a.ffn === b.ffn;

/** Blocks of one kind that run (`bit` 1) or are skipped (0). */
export const blocksOf = ({ runs }: Mask, kind: 0 | 1, bit: 0 | 1): number[] =>
  [...runs.keys()].filter((block) => block % 2 === kind && runs[block] === bit);

function exchangesWithin(mask: Mask, kind: 0 | 1): [number, number][] {
  const running = blocksOf(mask, kind, 1);
  return blocksOf(mask, kind, 0).flatMap((out) => running.map((block): [number, number] => [out, block]));
}

/**
 * Exchanges to other counts: where one block of a kind changes, every choice of it; where several change, only the best
 * predicted.
 */
function exchangesTo(mask: Mask, worth: readonly number[], from: BlockCounts, to: BlockCounts) {
  const changes = [
    { kind: 0 as const, more: to.attention - from.attention },
    { kind: 1 as const, more: to.ffn - from.ffn },
  ];
  let moves: { open: number[]; close: number[] }[] = [{ open: [], close: [] }];
  for (const { kind, more } of changes) {
    const isClosing = more > 0;
    const inOrder = isClosing ? lowestFirst : highestFirst;
    const blocks = inOrder(blocksOf(mask, kind, isClosing ? 1 : 0), (block) => worth[block]!);
    const count = Math.abs(more);
    const choices = count === 1 ? blocks.map((block) => [block]) : [blocks.slice(0, count)];
    moves = moves.flatMap(({ open, close }) =>
      choices.map((chosen) =>
        isClosing ? { open, close: [...close, ...chosen] } : { open: [...open, ...chosen], close },
      ),
    );
  }
  return moves;
}

/** Whether an allowed pair can still be reached once this block is removed. */
function mayClose(mask: Mask, block: number, { allowed }: Budget): boolean {
  if (mask.runs[block] === 0) return false;
  const { attention, ffn } = countsOf(withChanged(mask, [block]));
  return allowed.some((pair) => attention <= pair.attention && ffn <= pair.ffn);
}
