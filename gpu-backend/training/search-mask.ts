/**
 * Search among masks of bits that meet a budget, by their exact cost on some text.
 *
 * `greedyMask` takes blocks out one by one (FinerCut's greedy, Zhang et al. 2024, evaluated lazily: the rise that a
 * block caused last time stands for it until it comes first). `improveMask` then exchanges blocks. What an exchange
 * would change is first predicted as the sum of what opening and closing alone change; only the best predictions
 * are evaluated, and what helps is taken. Sums predict well because exchanges touch two blocks out of sixty.
 */
import type { Mask } from '../../shared/mask.ts';
import { denseMask, maskBits } from '../../shared/mask.ts';
import type { BlockCounts, Budget } from './budget.ts';
import { countsOf, meetsBudget } from './budget.ts';

/** Lower is better; the same mask gives the same cost. */
export type MaskCost = (mask: Mask) => Promise<number>;

export type FoundMask = { readonly mask: Mask; readonly cost: number };

export type ImproveOptions = {
  readonly cost: MaskCost;
  readonly budget: Budget;
  readonly evaluationsMax: number;
  /** Predictions in a row that may fail before a search has to measure again, or ends. */
  readonly triesMax: number;
  /** What each block is worth, `[2L]`, for a first round of exchanges that measures nothing. */
  readonly prior?: readonly number[];
};

/** One exchange: blocks to run again, and blocks to leave out. */
type Move = { readonly open: readonly number[]; readonly close: readonly number[]; readonly change: number };

/**
 * @param alone cost of every block alone missing minus the cost of the dense model, `[2L]`: where the first
 * estimates come from.
 */
export async function greedyMask(
  cost: MaskCost,
  budget: Budget,
  alone: readonly number[],
  evaluationsMax: number,
): Promise<FoundMask> {
  let current: FoundMask = { mask: denseMask(alone.length), cost: await cost(denseMask(alone.length)) };
  const rises = [...alone];
  let evaluations = 0;
  while (!meetsBudget(current.mask, budget)) {
    const open = [...rises.keys()].filter((block) => mayClose(current.mask, block, budget));
    const fresh = new Map<number, FoundMask>();
    for (;;) {
      const block = open.reduce((best, other) => (rises[other]! < rises[best]! ? other : best));
      const known = fresh.get(block);
      if (known !== undefined) {
        current = known;
        break;
      }
      const mask = exchanged(current.mask, [], [block]);
      // Out of evaluations, the estimates decide.
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

/** Never worse than `start`; ends when nothing predicted helps any more or the evaluations are spent. */
export async function improveMask(start: Mask, options: ImproveOptions): Promise<FoundMask> {
  const { budget, evaluationsMax, triesMax, prior } = options;
  if (!meetsBudget(start, budget)) throw new RangeError('the mask to improve is not within the budget');
  const known = new Map<string, number>();
  const cost = async (mask: Mask): Promise<number> => {
    const key = maskBits(mask);
    const value = known.get(key) ?? (await options.cost(mask));
    known.set(key, value);
    return value;
  };
  const isSpent = () => known.size >= evaluationsMax;
  let best: FoundMask = { mask: start, cost: await cost(start) };
  if (prior !== undefined) best = await exchangeBlocks(best, [...prior]);
  while (!isSpent()) {
    const estimates = await measureBlocks(best);
    if (estimates === undefined) break;
    const next = await exchangeBlocks(best, estimates);
    if (next.cost >= best.cost) break;
    best = next;
  }
  return best;

  /** What each block is worth under this mask: by how much the cost is lower with it than without. */
  async function measureBlocks({ mask, cost: here }: FoundMask): Promise<number[] | undefined> {
    const worth: number[] = [];
    for (let block = 0; block < mask.runs.length; block++) {
      if (isSpent()) return undefined;
      const isOut = mask.runs[block] === 0;
      const there = await cost(exchanged(mask, isOut ? [block] : [], isOut ? [] : [block]));
      worth.push(isOut ? here - there : there - here);
    }
    return worth;
  }

  async function exchangeBlocks(from: FoundMask, worth: number[]): Promise<FoundMask> {
    let current = from;
    for (let failed = 0; failed < triesMax; ) {
      const move = movesOf(current.mask, worth, budget).find(
        ({ open, close }) => !known.has(maskBits(exchanged(current.mask, open, close))),
      );
      if (move === undefined || isSpent()) break;
      const mask = exchanged(current.mask, move.open, move.close);
      const found = { mask, cost: await cost(mask) };
      if (found.cost < current.cost) {
        current = found;
        failed = 0;
      } else {
        failed++;
      }
    }
    return current;
  }
}

/** Every exchange to an allowed pair of counts, the one with the best prediction first. */
function movesOf(mask: Mask, worth: readonly number[], budget: Budget): Move[] {
  const here = countsOf(mask);
  const index = budget.allowed.findIndex((pair) => samePair(pair, here));
  const moves = [...exchangesWithin(mask, 0), ...exchangesWithin(mask, 1)].map(([open, close]) => ({
    open: [open],
    close: [close],
  }));
  const neighbours = [budget.allowed[index - 1], budget.allowed[index + 1]];
  for (const pair of neighbours) if (pair !== undefined) moves.push(...exchangesTo(mask, worth, here, pair));
  return moves
    .map(({ open, close }) => ({ open, close, change: sumOf(close, worth) - sumOf(open, worth) }))
    .sort((a, b) => a.change - b.change || order(a, b));
}

const order = (a: Move, b: Move): number =>
  (a.open[0] ?? -1) - (b.open[0] ?? -1) || (a.close[0] ?? -1) - (b.close[0] ?? -1);
const sumOf = (blocks: readonly number[], values: readonly number[]): number =>
  blocks.reduce((sum, block) => sum + values[block]!, 0);
const samePair = (a: BlockCounts, b: BlockCounts) => a.attention === b.attention && a.ffn === b.ffn;

/** Blocks of one kind that run, or that are out. */
const blocksOf = ({ runs }: Mask, kind: 0 | 1, bit: 0 | 1): number[] =>
  [...runs.keys()].filter((block) => block % 2 === kind && runs[block] === bit);

function exchangesWithin(mask: Mask, kind: 0 | 1): [number, number][] {
  const running = blocksOf(mask, kind, 1);
  return blocksOf(mask, kind, 0).flatMap((out) => running.map((block): [number, number] => [out, block]));
}

/** To other counts: where one block changes, each of its kind in turn; where several do, the best predicted. */
function exchangesTo(mask: Mask, worth: readonly number[], from: BlockCounts, to: BlockCounts) {
  const changes = [
    { kind: 0 as const, more: to.attention - from.attention },
    { kind: 1 as const, more: to.ffn - from.ffn },
  ];
  let moves: { open: number[]; close: number[] }[] = [{ open: [], close: [] }];
  for (const { kind, more } of changes) {
    const isClosing = more > 0;
    const blocks = blocksOf(mask, kind, isClosing ? 1 : 0).sort((a, b) =>
      isClosing ? worth[a]! - worth[b]! : worth[b]! - worth[a]!,
    );
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

/** Whether some allowed pair can still be reached once this block is out. */
function mayClose(mask: Mask, block: number, { allowed }: Budget): boolean {
  if (mask.runs[block] === 0) return false;
  const { attention, ffn } = countsOf(exchanged(mask, [], [block]));
  return allowed.some((pair) => attention <= pair.attention && ffn <= pair.ffn);
}

function exchanged({ runs }: Mask, open: readonly number[], close: readonly number[]): Mask {
  const changed = runs.slice();
  for (const block of open) changed[block] = 1;
  for (const block of close) changed[block] = 0;
  return { runs: changed };
}
