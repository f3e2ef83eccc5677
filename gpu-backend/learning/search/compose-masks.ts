/**
 * Composes masks for groups of clusters from the effects of single blocks. Some prompts are scored under the mask for
 * everybody with one block changed, for each of a few blocks. The effect of a few changes together is close to the sum
 * of their effects, so every similar mask has a predicted cost for every cluster, and a group's best mask is found
 * without a search.
 *
 * C clusters, B blocks that may change.
 */
import { type Mask, maskBits } from '../../../shared/mask/mask.ts';
import { highestFirst, lowestFirst, sumOf } from '../../measure.ts';
import { groupsBy, kMeans, type Points } from '../data/kmeans.ts';
import { type Budget, countsOf, withChanged } from './budget.ts';
import { byDistance, ridgeOnCentroids } from './centroid-ridge.ts';
import { blocksOf } from './exchange.ts';

/** The effects of single blocks on one prompt. */
export type RowChanges = {
  readonly cluster: number;
  /** Scored positions. */
  readonly positions: number;
  /** By how much the sum of the KL rises when one block alone changes, in the order of `blocks`, `[B]`. */
  readonly changes: readonly number[];
};

type ComposeOptions = {
  readonly start: Mask;
  readonly blocks: readonly number[];
  readonly budget: Budget;
  readonly centroids: Points;
  /** Prompts by cluster, `[C]`: a cluster's weight in its group. */
  readonly prompts: ArrayLike<number>;
  readonly maskCount: number;
  readonly seed: number;
};

/** Most changed blocks: with more, the sum of single effects predicts the joint effect badly. */
const CHANGED_MAX = 8;
const TURNS = 20;
/** Strength of the prior that all clusters are equal, as a number of prompts. */
const PRIOR_ROWS = 1;

/** `expected`: predicted cost for each cluster minus that of the mask for everybody, nats a position, `[C]`. */
type ComposedMask = { readonly mask: Mask; readonly expected: readonly number[] };

/**
 * At most `maskCount` distinct masks other than `start`, one for each group of clusters. Groups and masks are improved
 * alternately, like assignments and means in k-means. Returns none when too little is known to tell clusters apart.
 */
export function composeMasks(rows: readonly RowChanges[], options: ComposeOptions): ComposedMask[] {
  const { start, blocks, prompts, maskCount, seed } = options;
  const predicted = changesByCluster(rows, options);
  if (predicted === undefined) return [];
  const bestFor = (clusters: readonly number[]) => {
    const sums = blocks.map((_, i) => sumOf(clusters.map((c) => prompts[c]! * predicted[c]![i]!)));
    return bestExchange(start, new Map(blocks.map((block, i) => [block, sums[i]!])), options.budget);
  };
  const points = {
    count: predicted.length,
    dimensions: blocks.length,
    values: Float32Array.from(predicted.flat()),
  };
  // Numbers that differ only by rounding count as equal.
  const distinct = new Set(predicted.map((changes) => Float32Array.from(changes).join(' '))).size;
  let groups: ArrayLike<number> = kMeans(points, {
    clusterCount: Math.min(maskCount, distinct),
    seed,
  }).assignment;
  let found: ComposedMask[] = [];
  for (let turn = 0; turn < TURNS; turn++) {
    found = groupsBy(groups).map((clusters) => {
      const mask = bestFor(clusters);
      return { mask, expected: predicted.map((changes) => changeOf(mask, start, blocks, changes)) };
    });
    const next = predicted.map((_, cluster) => cheapest(found.map(({ expected }) => expected[cluster]!)));
    if (next.every((group, cluster) => group === groups[cluster])) break;
    groups = next;
  }
  const distinctMasks = new Map(found.map((one) => [maskBits(one.mask), one]));
  distinctMasks.delete(maskBits(start));
  return [...distinctMasks.values()];
}

/** Predicted effect of each block on each cluster, nats a position, `[C, B]`. */
function changesByCluster(rows: readonly RowChanges[], options: ComposeOptions): number[][] | undefined {
  const { blocks, centroids } = options;
  const counts = new Array<number>(centroids.count).fill(0);
  const positions = new Array<number>(centroids.count).fill(0);
  const sums = counts.map(() => new Array<number>(blocks.length).fill(0));
  for (const row of rows) {
    counts[row.cluster]! += 1;
    positions[row.cluster]! += row.positions;
    row.changes.forEach((change, i) => {
      sums[row.cluster]![i]! += change;
    });
  }
  const means = sums.map((own, c) => (counts[c] === 0 ? undefined : own.map((sum) => sum / positions[c]!)));
  const everybody = blocks.map((_, i) => sumOf(sums.map((own) => own[i]!)) / Math.max(1, sumOf(positions)));
  const dearer = surcharge(everybody, options);
  const predicted = ridgeOnCentroids(means, counts, byDistance(centroids), PRIOR_ROWS);
  return predicted?.map((own) => own.map((change, i) => (isOut(options, i) ? change : change + dearer)));
}

const isOut = ({ start, blocks }: ComposeOptions, i: number): boolean => start.runs[blocks[i]!] === 0;

const SURCHARGE_TURNS = 32;

/**
 * The mask for everybody was chosen on much more text than this, so a change that seems to improve it for all prompts
 * is noise. The surcharge is added to the cost of skipping a block, so that no exchange improves the mask for
 * everybody.
 */
function surcharge(everybody: readonly number[], options: ComposeOptions): number {
  const { start, blocks, budget } = options;
  let dearer = 0;
  for (let turn = 0; turn < SURCHARGE_TURNS; turn++) {
    const changes = new Map(
      blocks.map((block, i) => [block, everybody[i]! + (isOut(options, i) ? 0 : dearer)]),
    );
    const best = bestExchange(start, changes, budget);
    const changed = [...changes].filter(([block]) => best.runs[block] !== start.runs[block]);
    const closed = changed.filter(([block]) => start.runs[block] === 1);
    if (closed.length === 0) break;
    dearer -= sumOf(changed.map(([, change]) => change)) / closed.length;
  }
  return dearer;
}

const cheapest = (costs: readonly number[]): number => costs.indexOf(Math.min(...costs));

const changeOf = (mask: Mask, start: Mask, blocks: readonly number[], changes: readonly number[]): number =>
  sumOf(changes.filter((_, i) => mask.runs[blocks[i]!] !== start.runs[blocks[i]!]));

type Changes = { readonly blocks: readonly number[]; readonly change: number };

/**
 * The mask within the budget that costs least by the sum of its blocks' changes.
 * @param changes the effect of each block that may change, nats a position.
 */
export function bestExchange(start: Mask, changes: ReadonlyMap<number, number>, budget: Budget): Mask {
  const here = countsOf(start);
  let best: Changes = { blocks: [], change: 0 };
  for (const pair of budget.allowed) {
    const attention = changesOfKind(start, changes, 0, pair.attention - here.attention);
    const ffn = changesOfKind(start, changes, 1, pair.ffn - here.ffn);
    for (const a of attention) {
      for (const b of ffn) {
        const change = a.change + b.change;
        if (a.blocks.length + b.blocks.length <= CHANGED_MAX && change < best.change)
          best = { blocks: [...a.blocks, ...b.blocks], change };
      }
    }
  }
  return withChanged(start, best.blocks);
}

/**
 * Blocks that are worth changing for some prompts: the skipped blocks whose return lowers the cost most, and the
 * running blocks whose removal costs least. Half of `count` each, if there are as many.
 * @param worth the worth of each block under the mask, `[2L]`.
 */
export function blocksToChange(start: Mask, worth: readonly number[], count: number): number[] {
  const ofBit = (bit: 0 | 1) => [...start.runs.keys()].filter((block) => start.runs[block] === bit);
  const out = highestFirst(ofBit(0), (block) => worth[block]!).slice(0, Math.ceil(count / 2));
  const running = lowestFirst(ofBit(1), (block) => worth[block]!).slice(0, Math.floor(count / 2));
  return [...out, ...running].sort((a, b) => a - b);
}

/** The cheapest changes of one kind of block that skip `more` additional blocks, with 0, 1, 2, … exchanges as well. */
function changesOfKind(
  start: Mask,
  changes: ReadonlyMap<number, number>,
  kind: 0 | 1,
  more: number,
): Changes[] {
  const changeOf = (block: number): number => changes.get(block)!;
  const byCost = (bit: 0 | 1) =>
    lowestFirst(
      blocksOf(start, kind, bit).filter((block) => changes.has(block)),
      changeOf,
    );
  const [out, running] = [byCost(0), byCost(1)];
  const [open, close] = [Math.max(0, -more), Math.max(0, more)];
  const most = Math.min(out.length - open, running.length - close);
  return Array.from({ length: Math.max(0, most + 1) }, (_, exchanges) => {
    const taken = [...out.slice(0, open + exchanges), ...running.slice(0, close + exchanges)];
    return { blocks: taken, change: sumOf(taken.map(changeOf)) };
  });
}
