/**
 * k-means: k-means++ seeding (Arthur and Vassilvitskii, 2007), Lloyd's iterations, the best of several starts.
 * Seeded, so that equal data give equal clusters.
 */
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { finish } from '../../event-loop.ts';
import { sumOf } from '../../measure.ts';
import type { Random } from '../../random.ts';
import { createRandom } from '../../random.ts';

/** `values` is row-major `[count, dimensions]`. */
export type Points = { readonly count: number; readonly dimensions: number; readonly values: Float32Array };

export type Clusters = {
  readonly dimensions: number;
  /** `[clusterCount, dimensions]`, row-major. */
  readonly centroids: Float32Array;
  /** The cluster of each point, `[count]`. */
  readonly assignment: Uint16Array;
  /** Points of each cluster, `[clusterCount]`; none is empty. */
  readonly sizes: Uint32Array;
  /** Sum of squared distances of the points to their centroids. */
  readonly inertia: number;
};

type KMeansOptions = {
  readonly clusterCount: number;
  readonly seed: number;
  readonly starts?: number;
  readonly iterationsMax?: number;
};

/** @throws MaskrouteError `invalid_data` when there are fewer distinct points than clusters. */
export const kMeans = (points: Points, options: KMeansOptions): Clusters =>
  finish(kMeansSteps(points, options));

/** {@link kMeans} in steps: many points take minutes. */
export function* kMeansSteps(points: Points, options: KMeansOptions): Generator<void, Clusters> {
  const { clusterCount, seed, starts = 8, iterationsMax = 100 } = options;
  const random = createRandom(seed);
  let best: Clusters | undefined;
  for (let start = 0; start < starts; start++) {
    const centroids = yield* seedCentroids(points, clusterCount, random);
    const result = yield* lloyd(points, centroids, iterationsMax);
    if (best === undefined || result.inertia < best.inertia) best = result;
  }
  return best!;
}

/**
 * All points under the centroids that `sample`, some of them, gives, in steps. @throws MaskrouteError as {@link kMeans} of the
 * sample.
 */
export function* kMeansBySample(
  points: Points,
  sample: Points,
  options: KMeansOptions,
): Generator<void, Clusters> {
  const { centroids } = yield* kMeansSteps(sample, options);
  const assignment = new Uint16Array(points.count);
  const distances = new Float64Array(points.count);
  yield* assign(points, centroids, assignment, distances);
  return clustersOf(points, centroids, assignment, distances);
}

export function packPoints(rows: readonly Float32Array[]): Points {
  const dimensions = rows[0]?.length ?? 0;
  const values = new Float32Array(rows.length * dimensions);
  rows.forEach((row, i) => {
    values.set(row, i * dimensions);
  });
  return { count: rows.length, dimensions, values };
}

/**
 * k-means++: each next centroid is a point drawn with probability proportional to its squared distance from the nearest
 * centroid so far.
 */
function* seedCentroids(points: Points, clusterCount: number, random: Random): Generator<void, Float32Array> {
  const { count, dimensions, values } = points;
  const centroids = new Float32Array(clusterCount * dimensions);
  const nearest = new Float64Array(count).fill(Number.POSITIVE_INFINITY);
  let chosen = random.below(count);
  for (let cluster = 0; cluster < clusterCount; cluster++) {
    centroids.set(values.subarray(chosen * dimensions, (chosen + 1) * dimensions), cluster * dimensions);
    let total = 0;
    for (let i = 0; i < count; i++) {
      nearest[i] = Math.min(nearest[i]!, squaredDistance(values, i, centroids, cluster, dimensions));
      total += nearest[i]!;
    }
    if (cluster + 1 === clusterCount) break;
    if (!(total > 0)) {
      throw new MaskrouteError(
        'invalid_data',
        `There are only ${cluster + 1} distinct prompts for ${clusterCount} clusters.`,
      );
    }
    chosen = draw(nearest, total, random);
    yield;
  }
  return centroids;
}

function draw(weights: Float64Array, total: number, random: Random): number {
  let left = random.next() * total;
  let last = 0;
  for (let i = 0; i < weights.length; i++) {
    if (weights[i]! <= 0) continue;
    last = i;
    left -= weights[i]!;
    if (left < 0) return i;
  }
  return last;
}

function* lloyd(points: Points, centroids: Float32Array, iterationsMax: number): Generator<void, Clusters> {
  const clusterCount = centroids.length / points.dimensions;
  const assignment = new Uint16Array(points.count);
  const distances = new Float64Array(points.count);
  for (let iteration = 0; ; iteration++) {
    const moved = (yield* assign(points, centroids, assignment, distances)) > 0 || iteration === 0;
    const repaired = fillEmptyClusters(assignment, distances, clusterCount);
    if (!repaired && (!moved || iteration >= iterationsMax)) break;
    moveCentroids(points, centroids, assignment);
  }
  return clustersOf(points, centroids, assignment, distances);
}

const clustersOf = (
  { dimensions }: Points,
  centroids: Float32Array,
  assignment: Uint16Array,
  distances: Float64Array,
): Clusters => ({
  dimensions,
  centroids,
  assignment,
  sizes: clusterSizes(assignment, centroids.length / dimensions),
  inertia: sumOf(distances),
});

/** Points whose nearest centroid is found in one step: a fraction of a second with the most clusters. */
export const POINTS_A_STEP = 4096;

/** Ties go to the lowest cluster, as at the edge. Returns how many points changed cluster. */
function* assign(
  points: Points,
  centroids: Float32Array,
  assignment: Uint16Array,
  distances: Float64Array,
): Generator<void, number> {
  const { count, dimensions, values } = points;
  const clusterCount = centroids.length / dimensions;
  let moved = 0;
  for (let i = 0; i < count; i++) {
    if (i % POINTS_A_STEP === 0) yield;
    let cluster = 0;
    let least = Number.POSITIVE_INFINITY;
    for (let c = 0; c < clusterCount; c++) {
      const distance = squaredDistance(values, i, centroids, c, dimensions, least);
      if (distance < least) {
        least = distance;
        cluster = c;
      }
    }
    if (assignment[i] !== cluster) moved++;
    assignment[i] = cluster;
    distances[i] = least;
  }
  return moved;
}

/**
 * Gives each empty cluster the point that is farthest from its centroid, taken from a cluster of two or more points.
 */
function fillEmptyClusters(assignment: Uint16Array, distances: Float64Array, clusterCount: number): boolean {
  const sizes = clusterSizes(assignment, clusterCount);
  let repaired = false;
  sizes.forEach((size, cluster) => {
    if (size > 0) return;
    let farthest = -1;
    distances.forEach((distance, i) => {
      if (distance > 0 && sizes[assignment[i]!]! > 1 && (farthest < 0 || distance > distances[farthest]!)) {
        farthest = i;
      }
    });
    if (farthest < 0) return;
    sizes[assignment[farthest]!] = sizes[assignment[farthest]!]! - 1;
    sizes[cluster] = 1;
    assignment[farthest] = cluster;
    distances[farthest] = 0;
    repaired = true;
  });
  return repaired;
}

function moveCentroids(points: Points, centroids: Float32Array, assignment: Uint16Array): void {
  const { dimensions, values } = points;
  const clusterCount = centroids.length / dimensions;
  const sums = new Float64Array(centroids.length);
  const sizes = clusterSizes(assignment, clusterCount);
  assignment.forEach((cluster, i) => {
    for (let d = 0; d < dimensions; d++) {
      sums[cluster * dimensions + d] = sums[cluster * dimensions + d]! + values[i * dimensions + d]!;
    }
  });
  for (let c = 0; c < clusterCount; c++) {
    if (sizes[c] === 0) continue;
    for (let d = 0; d < dimensions; d++)
      centroids[c * dimensions + d] = sums[c * dimensions + d]! / sizes[c]!;
  }
}

/** Euclidean, between row i of `a` and row j of `b`. */
export const distanceBetween = (
  a: Float32Array,
  i: number,
  b: Float32Array,
  j: number,
  width: number,
): number => Math.sqrt(squaredDistance(a, i, b, j, width));

/** Coordinates between two looks at the bound. */
const STRETCH = 32;

/** Between row i of `a` and row j of `b`; if that is `bound` or more, any number of `bound` or more. */
function squaredDistance(
  a: Float32Array,
  i: number,
  b: Float32Array,
  j: number,
  width: number,
  bound = Number.POSITIVE_INFINITY,
): number {
  let sum = 0;
  for (let start = 0; start < width && sum < bound; start += STRETCH) {
    const end = Math.min(width, start + STRETCH);
    for (let d = start; d < end; d++) {
      const difference = a[i * width + d]! - b[j * width + d]!;
      sum += difference * difference;
    }
  }
  return sum;
}

/** How many points each cluster has. */
export function clusterSizes(assignment: Uint16Array, clusterCount: number): Uint32Array {
  const sizes = new Uint32Array(clusterCount);
  for (const cluster of assignment) sizes[cluster] = sizes[cluster]! + 1;
  return sizes;
}

/** Indices grouped by label (such as points by cluster), by rising label. */
export const groupsBy = (labels: ArrayLike<number>): number[][] =>
  [...Map.groupBy(Array.from(labels).keys(), (index) => labels[index]!)]
    .sort(([a], [b]) => a - b)
    .map(([, group]) => group);
