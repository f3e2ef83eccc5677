/**
 * What is known of some clusters, told of all. Clusters have little text of their own, but what masks cost changes slowly from
 * cluster to cluster: ridge regression on the centroids also says it of clusters without text. It is in its dual form, where all
 * that counts is how alike two centroids are.
 *
 * C clusters, D dimensions, K figures of each.
 */
import { Matrix, solve } from 'ml-matrix';
import type { Points } from '../data/kmeans.ts';
import { sumOf } from './bootstrap.ts';

/** How alike each two centroids are, `[C, C]`. */
export type Likeness = Matrix;

/** Figures change along straight lines, which little text is enough for. `rows`: prompts by cluster, for the middle. */
export function alongLines({ count, dimensions, values }: Points, rows: readonly number[]): Likeness {
  const points = Matrix.from1DArray(count, dimensions, values);
  const weights = Matrix.rowVector([...rows]).div(sumOf(rows));
  const centred = points.subRowVector(weights.mmul(points).to1DArray());
  return centred.mmul(centred.transpose());
}

/** Figures are alike where centroids are near each other, and far from all text they are everybody's: e^−d², for vectors of length 1. */
export function byDistance({ count, dimensions, values }: Points): Likeness {
  const points = Matrix.from1DArray(count, dimensions, values);
  const products = points.mmul(points.transpose());
  const squares = products.diagonal();
  return new Matrix(
    squares.map((a, i) => squares.map((b, j) => Math.exp(-Math.max(0, a + b - 2 * products.get(i, j))))),
  );
}

/**
 * @param figures `[K]` by cluster; undefined where nothing is known.
 * @param rows prompts that say so, by cluster.
 * @param priorRows what is known before any text: as if so many prompts had said that all clusters are equal.
 * @returns `[C, K]`; undefined where fewer than two clusters are known.
 */
export function ridgeOnCentroids(
  figures: readonly (readonly number[] | undefined)[],
  rows: readonly number[],
  likeness: Likeness,
  priorRows: number,
): number[][] | undefined {
  const known = [...figures.keys()].filter((cluster) => figures[cluster] !== undefined);
  if (known.length < 2) return undefined;
  const values = new Matrix(known.map((cluster) => [...figures[cluster]!]));
  const weights = known.map((cluster) => rows[cluster]!);
  const mean = Matrix.rowVector(weights).div(sumOf(weights)).mmul(values).to1DArray();
  const toKnown = likeness.subMatrixColumn(known);
  const among = toKnown.subMatrixRow(known);
  for (const [i, weight] of weights.entries()) among.set(i, i, among.get(i, i) + priorRows / weight);
  return toKnown
    .mmul(solve(among, values.subRowVector(mean)))
    .addRowVector(mean)
    .to2DArray();
}
