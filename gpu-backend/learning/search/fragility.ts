/**
 * How much more, or less, a mask costs the prompts of a cluster than all prompts.
 *
 * C clusters, M masks.
 */
import type { Points } from '../data/kmeans.ts';
import { sumOf } from './bootstrap.ts';
import { alongLines, ridgeOnCentroids } from './centroid-ridge.ts';

/** As if so many prompts had said that all clusters are equal. */
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
  const ratios = ratiosOf(positions, kl).map((ratio) => (ratio === undefined ? undefined : [ratio]));
  const found = ridgeOnCentroids(ratios, rows, alongLines(centroids, rows), PRIOR_ROWS);
  return found?.map(([ratio]) => Math.max(FRAGILITY_MIN, ratio!)) ?? rows.map(() => 1);
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
