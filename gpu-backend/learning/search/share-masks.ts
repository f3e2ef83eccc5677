/**
 * Few masks for many clusters. Clusters are fine, so that prompts of a cluster are alike; masks are few, so that each is
 * found on much text; and a cluster takes the mask that measures best on its own prompts. What a cluster's own text says
 * is shrunk towards what everybody's says, for a cluster has little of it.
 *
 * R rows (prompts that no search saw), C clusters, M masks.
 */
import { createRandom, permutation } from '../../random.ts';
import { type Lead, pairedLead } from './bootstrap.ts';

/** A prompt under every mask. */
export type RowCosts = {
  readonly cluster: number;
  /** Scored positions. */
  readonly positions: number;
  /** Sum of the KL over the positions by mask, `[M]`. */
  readonly kl: readonly number[];
};

export type Sharing = {
  /** Masks in use, as indices into the rows' costs; the mask for everybody first, the others as they were chosen. */
  readonly masks: readonly number[];
  /** The mask of each cluster, `[C]`. */
  readonly clusters: readonly number[];
};

type SharingOptions = {
  readonly clusterCount: number;
  /** The mask for everybody. */
  readonly base: number;
  /** Masks in use at most, the mask for everybody among them. */
  readonly maskCount: number;
};

/** Everybody's figures weigh as much as so many positions of a cluster's own text. */
const SHRINKAGE_POSITIONS = 300;
const FOLDS = 5;

/**
 * Masks are taken one by one: always the mask that takes most off the clusters' cost, and no more once another
 * takes nothing off. On these rows no cluster is worse off than under the mask for everybody, and a cluster without rows
 * keeps that mask.
 */
export function shareMasks(
  rows: readonly RowCosts[],
  { clusterCount, base, maskCount }: SharingOptions,
): Sharing {
  const costs = shrunkCosts(rows, clusterCount, base);
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

/**
 * By how much each mask costs a cluster more than the mask for everybody, times the cluster's positions, `[C, M]`. What
 * a mask costs everybody counts as 0 at least, else a cluster might take a mask that its own text speaks against.
 */
function shrunkCosts(rows: readonly RowCosts[], clusterCount: number, base: number): number[][] {
  const maskCount = rows[0]?.kl.length ?? base + 1;
  const sums = Array.from({ length: clusterCount }, () => new Array<number>(maskCount).fill(0));
  const positions = new Array<number>(clusterCount).fill(0);
  for (const row of rows) {
    positions[row.cluster]! += row.positions;
    row.kl.forEach((kl, mask) => {
      sums[row.cluster]![mask]! += kl - row.kl[base]!;
    });
  }
  const total = positions.reduce((sum, count) => sum + count, 0);
  const everybody = Array.from({ length: maskCount }, (_, mask) =>
    Math.max(0, sums.reduce((sum, own) => sum + own[mask]!, 0) / Math.max(1, total)),
  );
  return sums.map((own, cluster) => {
    const weight = positions[cluster]! / (positions[cluster]! + SHRINKAGE_POSITIONS);
    return own.map((sum, mask) => weight * (sum + SHRINKAGE_POSITIONS * everybody[mask]!));
  });
}

/** A number of masks on rows that did not share them out. */
export type Validated = {
  /** Nats a position. */
  readonly kl: number;
  /** Over one mask. */
  readonly lead: Lead;
};

/**
 * What 1, 2, … `maskCount` masks come to on rows that did not share them out. Every row is judged once (five-fold
 * cross-validation); the searches saw none of them.
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
      const { clusters } = shareMasks(others, { ...options, maskCount: i + 1 });
      for (const [index, row] of rows.entries()) {
        if (foldOf.get(index) === fold) costs[index] = row.kl[clusters[row.cluster]!]!;
      }
    }
    const lead = pairedLead(
      rows.map((row, index) => ({ positions: row.positions, sum: row.kl[options.base]! - costs[index]! })),
    );
    return { kl: costs.reduce((sum, cost) => sum + cost, 0) / positions, lead };
  });
}

/** The number of masks with the lowest KL, the fewest of equals; one where that leads one mask by no more than its error. */
export function countThatPays(validated: readonly Validated[]): number {
  const kls = validated.map(({ kl }) => kl);
  const best = kls.indexOf(Math.min(...kls));
  const lead = validated[best]?.lead;
  return lead !== undefined && lead.mean > lead.standardError ? best + 1 : 1;
}

/**
 * The mask for everybody: `base`, unless another costs all rows together less by more than the standard error of the
 * difference.
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
