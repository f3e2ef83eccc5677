/**
 * How much more, or less, a mask costs the prompts of a cluster than all prompts. Clusters have little text of their own, but
 * what masks cost changes slowly from cluster to cluster: ridge regression on the centroids (in its dual form, for clusters
 * are fewer than dimensions) also says it of clusters without text.
 *
 * C clusters, M masks.
 */
import { Matrix, solve } from 'ml-matrix';
import type { Points } from '../data/kmeans.ts';
import { sumOf } from './bootstrap.ts';

/** What is known before any text: as if so many prompts had said that all clusters are equal. */
const PRIOR_ROWS = 3;
/** No cluster is taken for more tolerant than this, whatever the line through the others says. */
const FRAGILITY_MIN = 0.25;

export type ClusterText = {
  /** Rows and scored positions by cluster, `[C]`. */
  readonly rows: readonly number[];
  readonly positions: readonly number[];
  /** Sum of the KL over the cluster's positions by mask, `[C, M]`. */
  readonly kl: readonly (readonly number[])[];
};

/** 1: as everybody, `[C]`. */
export function fragilityOf({ rows, positions, kl }: ClusterText, centroids: Points): number[] {
  const ratios = ratiosOf(positions, kl);
  const known = [...ratios.keys()].filter((cluster) => ratios[cluster] !== undefined);
  const weight = known.reduce((sum, cluster) => sum + rows[cluster]!, 0);
  if (known.length < 2) return rows.map(() => 1);
  const mean = known.reduce((sum, cluster) => sum + rows[cluster]! * ratios[cluster]!, 0) / weight;
  const points = centred(centroids, rows, weight);
  const own = points.selection(known, allOf(centroids.dimensions));
  const gram = own.mmul(own.transpose());
  for (const [i, cluster] of known.entries()) gram.set(i, i, gram.get(i, i) + PRIOR_ROWS / rows[cluster]!);
  const factors = solve(gram, Matrix.columnVector(known.map((cluster) => ratios[cluster]! - mean)));
  const found = points.mmul(own.transpose().mmul(factors)).to1DArray();
  return found.map((change) => Math.max(FRAGILITY_MIN, mean + change));
}

/** KL a position against everybody's, the mean over the masks that cost anything; undefined without text. */
function ratiosOf(positions: readonly number[], kl: readonly (readonly number[])[]): (number | undefined)[] {
  const total = sumOf(positions);
  const all = (kl[0] ?? []).map((_, mask) => kl.reduce((sum, own) => sum + own[mask]!, 0) / total);
  const masks = [...all.keys()].filter((mask) => all[mask]! > 0);
  return positions.map((count, cluster) =>
    count === 0 || masks.length === 0
      ? undefined
      : masks.reduce((sum, mask) => sum + kl[cluster]![mask]! / count / all[mask]!, 0) / masks.length,
  );
}

function centred({ count, dimensions, values }: Points, rows: readonly number[], weight: number): Matrix {
  const points = Matrix.from1DArray(count, dimensions, values);
  const mean = Matrix.rowVector(rows).div(weight).mmul(points).to1DArray();
  return points.subRowVector(mean);
}

const allOf = (count: number): number[] => Array.from({ length: count }, (_, i) => i);
