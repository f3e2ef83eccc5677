/**
 * Assigns few masks to many clusters. Clusters are small, so that their prompts are alike; masks are few, so that each
 * is found on much text; a cluster gets the mask that measures best on its own prompts. A cluster has little text, so
 * its figures are shrunk towards everybody's.
 *
 * If masks have several sizes, skipping earns a price, the same for all clusters: a tolerant cluster skips more and a
 * fragile one less, until one more block costs both the same (equal slopes). The price is the lowest at which all
 * prompts together skip as much as under the mask for everybody.
 *
 * R rows (prompts that no search saw), C clusters, M masks.
 */
import { sumOf } from '../../measure.ts';
import { createRandom, permutation } from '../../random.ts';
import type { Points } from '../data/kmeans.ts';
import { type Lead, pairedLead } from './bootstrap.ts';
import { type ClusterText, fragilityOf } from './fragility.ts';

/** A prompt's costs under every mask. */
export type RowCosts = {
  readonly cluster: number;
  /** Scored positions. */
  readonly positions: number;
  /** Sum of the KL over the positions by mask, `[M]`. */
  readonly kl: readonly number[];
};

export type Sharing = {
  /**
   * Masks in use, as indices into the rows' costs: the mask for everybody first, then the others in the order of
   * choice.
   */
  readonly masks: readonly number[];
  /** The mask of each cluster, `[C]`. */
  readonly clusters: readonly number[];
  /** Price of skipping all blocks, nats a position; 0 if all masks have one size. */
  readonly price: number;
};

type Sizes = {
  /** The share of a token's time, or of the blocks, that each mask skips, `[M]`. */
  readonly skipped: readonly number[];
  /** Centroids of the clusters: neighbouring clusters are about equally fragile. */
  readonly centroids: Points;
  /** All prompts by cluster, measured or not, `[C]`: the weights of the mean sparsity. */
  readonly prompts: ArrayLike<number>;
};

/**
 * Predicted cost of each mask for each cluster, minus that of the mask for everybody, nats a position, `[M][C]`;
 * undefined for masks without a prediction.
 */
export type Expected = readonly (readonly number[] | undefined)[];

type SharingOptions = {
  readonly clusterCount: number;
  /** The mask for everybody. */
  readonly base: number;
  /** Most masks in use, including the mask for everybody. */
  readonly maskCount: number;
  /** Given if masks have several sizes. */
  readonly sizes?: Sizes | undefined;
  /** Predictions towards which figures are shrunk; without, everybody's figures. */
  readonly expected?: Expected | undefined;
};

/** Strength of the shrinkage towards everybody's figures, as a number of positions. */
const SHRINKAGE_POSITIONS = 300;
/** Strength of the shrinkage of a cluster's mean prompt length, as a number of prompts. */
const SHRINKAGE_ROWS = 3;
const FOLDS = 5;

/**
 * Adds masks one by one, always the mask that lowers the clusters' cost most, until none lowers it. With masks of one
 * size and without predictions, no cluster is worse on these rows than under the mask for everybody, and a cluster
 * without rows keeps that mask.
 */
export function shareMasks(rows: readonly RowCosts[], options: SharingOptions): Sharing {
  const { clusterCount, base, maskCount, sizes } = options;
  const maskTotal = rows[0]?.kl.length ?? base + 1;
  const text = textOf(rows, clusterCount, maskTotal);
  const traffic = trafficOf(text, sizes);
  const costs = shrunkCosts(text, traffic, options);
  if (sizes === undefined || rows.length === 0) return { ...takeMasks(costs, base, maskCount), price: 0 };
  const { skipped } = sizes;
  const more = skipped.map((share) => share - skipped[base]!);
  const at = (price: number) => {
    const priced = costs.map((cost, c) =>
      cost.map((value, mask) => value - price * traffic[c]! * more[mask]!),
    );
    return takeMasks(priced, base, maskCount);
  };
  const leftOut = ({ clusters }: Taken) =>
    clusters.reduce((sum, mask, c) => sum + traffic[c]! * more[mask]!, 0);
  const price = lowestPrice((price) => leftOut(at(price)) >= -ROUNDING * sumOf(traffic));
  const taken = price === undefined ? undefined : at(price);
  const isBetter = taken !== undefined && taken.clusters.reduce((sum, m, c) => sum + costs[c]![m]!, 0) < 0;
  if (isBetter) return { ...taken, price: price! };
  // Without a price, a mask that skips less would lower the mean.
  const noLighter = costs.map((cost) =>
    cost.map((value, m) => (more[m]! < 0 ? Number.POSITIVE_INFINITY : value)),
  );
  return { ...takeMasks(noLighter, base, maskCount), price: 0 };
}

const ROUNDING = 1e-9;

type Taken = Pick<Sharing, 'masks' | 'clusters'>;

/** @param costs of each mask for each cluster, `[C, M]`. */
function takeMasks(costs: readonly (readonly number[])[], base: number, maskCount: number): Taken {
  const masks = [base];
  let best = costs.map((cost) => ({ mask: base, cost: cost[base]! }));
  while (masks.length < maskCount) {
    const gains = costs[0]!.map((_, mask) =>
      costs.reduce((gain, cost, cluster) => gain + Math.max(0, best[cluster]!.cost - cost[mask]!), 0),
    );
    const mask = gains.indexOf(Math.max(...gains));
    if (!(gains[mask]! > 0)) break;
    masks.push(mask);
    best = best.map((known, c) => (costs[c]![mask]! < known.cost ? { mask, cost: costs[c]![mask]! } : known));
  }
  const clusters = best.map(({ mask }) => mask);
  return { masks: masks.filter((mask) => mask === base || clusters.includes(mask)), clusters };
}

/** Highest price of skipping all blocks, nats a position. */
const PRICE_MAX = 2 ** 12;
const HALVINGS = 40;

/** The lowest price for which `isEnough` holds, by bisection; undefined if none up to `PRICE_MAX` is enough. */
export function lowestPrice(isEnough: (price: number) => boolean): number | undefined {
  if (isEnough(0)) return 0;
  let [low, high] = [0, 1];
  while (!isEnough(high)) {
    if (high >= PRICE_MAX) return undefined;
    [low, high] = [high, 2 * high];
  }
  for (let i = 0; i < HALVINGS; i++) {
    const middle = (low + high) / 2;
    if (isEnough(middle)) high = middle;
    else low = middle;
  }
  return high;
}

function textOf(rows: readonly RowCosts[], clusterCount: number, maskTotal: number): ClusterText {
  const kl = Array.from({ length: clusterCount }, () => new Array<number>(maskTotal).fill(0));
  const positions = new Array<number>(clusterCount).fill(0);
  const counts = new Array<number>(clusterCount).fill(0);
  for (const row of rows) {
    positions[row.cluster]! += row.positions;
    counts[row.cluster]! += 1;
    for (let mask = 0; mask < maskTotal; mask++) kl[row.cluster]![mask]! += row.kl[mask]!;
  }
  return { rows: counts, positions, kl };
}

/**
 * Positions by cluster, `[C]`: those that were measured (at least one), or with `sizes` an estimate for all prompts.
 */
function trafficOf({ rows, positions }: ClusterText, sizes: Sizes | undefined): readonly number[] {
  if (sizes === undefined) return positions.map((count) => Math.max(1, count));
  const mean = sumOf(positions) / Math.max(1, sumOf(rows));
  return positions.map(
    (count, c) => (sizes.prompts[c]! * (count + SHRINKAGE_ROWS * mean)) / (rows[c]! + SHRINKAGE_ROWS),
  );
}

/**
 * Cost of each mask for a cluster minus that of the mask for everybody, over the cluster's traffic, `[C, M]`. Unless a
 * mask is lighter, everybody's cost counts as at least 0; otherwise a cluster could get a mask that is worse on its own
 * text.
 */
function shrunkCosts(
  { rows, positions, kl }: ClusterText,
  traffic: readonly number[],
  { base, sizes, expected }: SharingOptions,
): number[][] {
  const total = sumOf(positions);
  const everybody = kl[0]!.map((_, mask) => {
    const change = sumOf(kl.map((own) => own[mask]! - own[base]!)) / Math.max(1, total);
    const isLighter = sizes !== undefined && sizes.skipped[mask]! < sizes.skipped[base]!;
    return isLighter ? change : Math.max(0, change);
  });
  const fragility =
    sizes === undefined || total === 0 ? undefined : fragilityOf({ rows, positions, kl }, sizes.centroids);
  return kl.map((own, cluster) => {
    const weight = traffic[cluster]! / (positions[cluster]! + SHRINKAGE_POSITIONS);
    const scale = fragility?.[cluster] ?? 1;
    const usual = (mask: number) => expected?.[mask]?.[cluster] ?? scale * everybody[mask]!;
    return own.map((sum, mask) => weight * (sum - own[base]! + SHRINKAGE_POSITIONS * usual(mask)));
  });
}

/** Figures of a number of masks, on rows that did not decide their assignment. */
export type Validated = {
  /** Nats a position. */
  readonly kl: number;
  /** Lead over one mask. */
  readonly lead: Lead;
};

/**
 * Figures of 1, 2, … `maskCount` masks by five-fold cross-validation: every row is judged under an assignment made
 * without it. The searches saw none of these rows.
 */
export function validateCounts(
  rows: readonly RowCosts[],
  options: SharingOptions,
  seed: number,
): Validated[] {
  if (rows.length < 2) return [];
  const order = permutation(rows.length, createRandom(seed));
  const foldOf = new Map(Array.from(order, (row, i) => [row, i % FOLDS]));
  const positions = rows.reduce((sum, row) => sum + row.positions, 0);
  return Array.from({ length: options.maskCount }, (_, i) => {
    const costs = new Float64Array(rows.length);
    for (let fold = 0; fold < FOLDS; fold++) {
      const others = rows.filter((_, row) => foldOf.get(row) !== fold);
      const { clusters, price } = shareMasks(others, { ...options, maskCount: i + 1 });
      for (const [index, row] of rows.entries()) {
        if (foldOf.get(index) !== fold) continue;
        const mask = clusters[row.cluster]!;
        // A fold's rows may skip more or less than the mean; the difference counts at the price.
        costs[index] = row.kl[mask]! - price * row.positions * moreOut(options, mask);
      }
    }
    const lead = pairedLead(
      rows.map((row, index) => ({ positions: row.positions, sum: row.kl[options.base]! - costs[index]! })),
    );
    return { kl: sumOf(costs) / positions, lead };
  });
}

const moreOut = ({ sizes, base }: SharingOptions, mask: number): number =>
  sizes === undefined ? 0 : sizes.skipped[mask]! - sizes.skipped[base]!;

/**
 * The number of masks with the lowest KL, of equal ones the fewest; 1 if its lead over one mask is no more than the
 * error.
 */
export function countThatPays(validated: readonly Validated[]): number {
  const kls = validated.map(({ kl }) => kl);
  const best = kls.indexOf(Math.min(...kls));
  const lead = validated[best]?.lead;
  return lead !== undefined && lead.mean > lead.standardError ? best + 1 : 1;
}

/**
 * Index of the mask for everybody: `base`, unless another mask is better over all rows by more than the standard error
 * of the difference.
 */
export function bestForAll(rows: readonly RowCosts[], base: number): number {
  const maskCount = rows[0]?.kl.length ?? 0;
  let best = { mask: base, mean: 0 };
  for (let mask = 0; mask < maskCount; mask++) {
    const { mean, standardError } = pairedLead(
      rows.map(({ positions, kl }) => ({ positions, sum: kl[base]! - kl[mask]! })),
    );
    if (mean > standardError && mean > best.mean) best = { mask, mean };
  }
  return best.mask;
}
