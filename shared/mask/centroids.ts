/** Routing: the nearest centroid of an embedding (Euclidean, as in the IG-Pruning paper). Pure, no I/O. */

/** `centroids` is row-major `[clusterCount, dimensions]`, decoded once a version. */
export type Centroids = {
  readonly clusterCount: number;
  readonly dimensions: number;
  readonly values: Float32Array;
};

type Nearest = {
  readonly cluster: number;
  /** Euclidean distance to the centroid. */
  readonly distance: number;
  /** Cosine of the embedding and the centroid, -1 to 1; 0 when either is the zero vector. */
  readonly similarity: number;
};

/** @throws RangeError when rows differ in length. */
export function packCentroids(rows: readonly (readonly number[])[]): Centroids {
  const dimensions = rows[0]?.length ?? 0;
  const values = new Float32Array(rows.length * dimensions);
  rows.forEach((row, index) => {
    if (row.length !== dimensions) throw new RangeError(`centroid ${index} has ${row.length} dimensions`);
    values.set(row, index * dimensions);
  });
  return { clusterCount: rows.length, dimensions, values };
}

/** clusterCount · dimensions multiply-adds; ties go to the lowest cluster. @throws RangeError on a wrong length. */
export const nearestCentroid = (embedding: Float32Array, centroids: Centroids): Nearest =>
  nearestAllowed(embedding, centroids, () => true)!;

/** The nearest centroid among the allowed clusters; null when none is allowed. */
export function nearestAllowed(
  embedding: Float32Array,
  centroids: Centroids,
  isAllowed: (cluster: number) => boolean,
): Nearest | null {
  requireSameLength(embedding, centroids);
  let cluster = -1;
  let best = Number.POSITIVE_INFINITY;
  for (let row = 0; row < centroids.clusterCount; row++) {
    if (!isAllowed(row)) continue;
    const distance = squaredDistance(embedding, centroids, row);
    if (distance < best) {
      best = distance;
      cluster = row;
    }
  }
  if (cluster === -1) return null;
  return { cluster, distance: Math.sqrt(best), similarity: cosine(embedding, centroids, cluster) };
}

/** Euclidean distance to every centroid. @throws RangeError on a wrong length. */
export function centroidDistances(embedding: Float32Array, centroids: Centroids): Float64Array {
  requireSameLength(embedding, centroids);
  return Float64Array.from({ length: centroids.clusterCount }, (_, row) =>
    Math.sqrt(squaredDistance(embedding, centroids, row)),
  );
}

function requireSameLength(embedding: Float32Array, { clusterCount, dimensions }: Centroids): void {
  if (embedding.length !== dimensions || clusterCount === 0) {
    throw new RangeError(`an embedding of ${embedding.length} against centroids of ${dimensions} dimensions`);
  }
}

function squaredDistance(embedding: Float32Array, { dimensions, values }: Centroids, row: number): number {
  const start = row * dimensions;
  let sum = 0;
  for (let i = 0; i < dimensions; i++) {
    const difference = embedding[i]! - values[start + i]!;
    sum += difference * difference;
  }
  return sum;
}

function cosine(embedding: Float32Array, { dimensions, values }: Centroids, row: number): number {
  const start = row * dimensions;
  let dot = 0;
  let normA = 0;
  let normB = 0;
  for (let i = 0; i < embedding.length; i++) {
    const a = embedding[i]!;
    const b = values[start + i]!;
    dot += a * b;
    normA += a * a;
    normB += b * b;
  }
  return normA === 0 || normB === 0 ? 0 : dot / Math.sqrt(normA * normB);
}
