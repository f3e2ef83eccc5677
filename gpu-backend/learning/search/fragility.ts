/**
 * The fragility of clusters: the cost of a mask for a cluster's prompts, relative to its cost for all prompts.
 *
 * C clusters, M masks.
 */
import { sumOf } from '../../measure.ts';
import type { Points } from '../data/kmeans.ts';
import { alongLines, ridgeOnCentroids } from './centroid-ridge.ts';

/** Strength of the prior that all clusters are equal, as a number of prompts. */
const PRIOR_ROWS = 3;
/** Lower bound of a fragility, in case the regression predicts less. */
const FRAGILITY_MIN = 0.25;

export type ClusterText = {
  /** Rows and scored positions by cluster, `[C]`. */
  readonly rows: readonly number[];
  readonly positions: readonly number[];
  /** Sum of the KL over the cluster's positions by mask, `[C, M]`. */
  readonly kl: readonly (readonly number[])[];
};

/** Fragility of each cluster, `[C]`; 1: as fragile as all prompts together. */
export function fragilityOf({ rows, positions, kl }: ClusterText, centroids: Points): number[] {
  const ratios = ratiosOf(positions, kl).map((ratio) => (ratio === undefined ? undefined : [ratio]));
  const found = ridgeOnCentroids(ratios, rows, alongLines(centroids, rows), PRIOR_ROWS);
  return found?.map(([ratio]) => Math.max(FRAGILITY_MIN, ratio!)) ?? rows.map(() => 1);
}

/**
 * Each cluster's KL a position relative to everybody's, averaged over the masks whose KL is above 0; undefined without
 * text.
 */
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
