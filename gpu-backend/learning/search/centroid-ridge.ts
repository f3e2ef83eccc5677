/**
 * Predicts figures of all clusters from figures of some. A cluster has little text of its own, but the cost of masks
 * changes smoothly between neighbouring clusters, so ridge regression on the centroids also covers clusters without
 * text. It is kernel ridge regression (the dual form): only the similarity of centroids counts.
 *
 * C clusters, D dimensions, K figures of each.
 */
import { Matrix, solve } from 'ml-matrix';
import { sumOf } from '../../measure.ts';
import type { Points } from '../data/kmeans.ts';

/** The kernel: similarity of each two centroids, `[C, C]`. */
type Likeness = Matrix;

/**
 * Linear kernel: figures change linearly with the centroid; needs little text. `rows`: prompts by cluster, for the
 * mean.
 */
export function alongLines({ count, dimensions, values }: Points, rows: readonly number[]): Likeness {
  const points = Matrix.from1DArray(count, dimensions, values);
  const weights = Matrix.rowVector([...rows]).div(sumOf(rows));
  const centred = points.subRowVector(weights.mmul(points).to1DArray());
  return centred.mmul(centred.transpose());
}

/**
 * Gaussian kernel e^−d² of unit vectors: near centroids have similar figures; far from all text the figures are
 * everybody's.
 */
export function byDistance({ count, dimensions, values }: Points): Likeness {
  const points = Matrix.from1DArray(count, dimensions, values);
  const products = points.mmul(points.transpose());
  const squares = products.diagonal();
  return new Matrix(
    squares.map((a, i) => squares.map((b, j) => Math.exp(-Math.max(0, a + b - 2 * products.get(i, j))))),
  );
}

/**
 * @param figures `[K]` by cluster; undefined where unknown.
 * @param rows prompts behind each cluster's figures.
 * @param priorRows strength of the prior that all clusters are equal, as a number of prompts.
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
