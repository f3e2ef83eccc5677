/** Centroids seen from where they differ most: their first two principal components (ml-pca, by SVD). */
import { PCA } from 'ml-pca';

export type Point = { readonly x: number; readonly y: number };
export type Projection = {
  readonly centroids: readonly Point[];
  /** The share of the centroids' variance that the picture shows, 0 to 1. */
  readonly explained: number;
  /** Places further vectors of the same dimensions. */
  readonly place: (vectors: readonly (readonly number[])[]) => Point[];
};

/** `rows` is `[clusters][dimensions]`; fewer than two clusters all lie in the middle. */
export function projectCentroids(rows: readonly (readonly number[])[]): Projection {
  if (rows.length < 2) {
    return { centroids: rows.map(() => ORIGIN), explained: 1, place: (vectors) => vectors.map(() => ORIGIN) };
  }
  const pca = new PCA(rows.map(normalised), { center: true, scale: false });
  const place = (vectors: readonly (readonly number[])[]): Point[] =>
    vectors.length === 0
      ? []
      : pca
          .predict(vectors.map(normalised), { nComponents: 2 })
          .to2DArray()
          .map(([x, y]) => ({ x: x ?? 0, y: y ?? 0 }));
  const [first = 0, second = 0] = pca.getExplainedVariance();
  return { centroids: place(rows), explained: first + second, place };
}

const ORIGIN: Point = { x: 0, y: 0 };

/** Routing compares directions. */
function normalised(vector: readonly number[]): number[] {
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}
