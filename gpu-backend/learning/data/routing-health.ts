/**
 * Whether clusters divide requests well: how even they are, how well they stand apart, and, when nearly all requests
 * would go to one mask (routing collapse), why.
 */
import { sumOf } from '../../measure.ts';
import { createRandom, permutation } from '../../random.ts';
import { type Clusters, distanceBetween, type Points } from './kmeans.ts';

export type RoutingHealth = {
  readonly largestShare: number;
  readonly entropy_bits: number;
  /** Entropy over its maximum; 1: all clusters are equally large, or there is only one. */
  readonly balance: number;
  /** −1 to 1; null with one cluster. */
  readonly silhouette: number | null;
  readonly nearest: { readonly clusters: [number, number]; readonly distance: number } | null;
  readonly collapse: string | null;
};

/** Above this share of the prompts in one cluster, routing has collapsed. */
const COLLAPSED_SHARE = 0.8;
/** Centroids nearly coincide when their distance is below this share of the prompts' distance to their own centroid. */
const NEAR_SHARE = 0.25;
/** Sample size: the silhouette's cost is quadratic in the number of points. */
const SILHOUETTE_POINTS = 1000;

export function routingHealth(points: Points, clusters: Clusters, seed: number): RoutingHealth {
  const total = sumOf(clusters.sizes);
  const shares = Array.from(clusters.sizes, (size) => size / total);
  const largestShare = Math.max(...shares);
  const entropy_bits = shares.reduce((sum, share) => sum - (share > 0 ? share * Math.log2(share) : 0), 0);
  const nearest = nearestCentroids(clusters);
  return {
    largestShare,
    entropy_bits,
    balance: shares.length === 1 ? 1 : entropy_bits / Math.log2(shares.length),
    silhouette: shares.length === 1 ? null : silhouette(points, clusters.assignment, shares.length, seed),
    nearest,
    collapse: collapseReason(clusters, largestShare, nearest),
  };
}

function collapseReason(
  clusters: Clusters,
  largestShare: number,
  nearest: RoutingHealth['nearest'],
): string | null {
  if (clusters.sizes.length === 1 || largestShare < COLLAPSED_SHARE) return null;
  const percent = Math.round(100 * largestShare);
  const spread = Math.sqrt(clusters.inertia / clusters.assignment.length);
  if (nearest !== null && nearest.distance < NEAR_SHARE * spread) {
    const [a, b] = nearest.clusters;
    return `${percent} % of the prompts go to one cluster, and centroids ${a} and ${b} nearly coincide: the encoder hardly tells these prompts apart, so use fewer clusters or more varied data`;
  }
  return `${percent} % of the prompts go to one cluster: the data are nearly of one kind, with a few outliers that have clusters to themselves`;
}

function nearestCentroids({ centroids, dimensions, sizes }: Clusters): RoutingHealth['nearest'] {
  let best: RoutingHealth['nearest'] = null;
  for (let a = 0; a < sizes.length; a++) {
    for (let b = a + 1; b < sizes.length; b++) {
      const distance = distanceBetween(centroids, a, centroids, b, dimensions);
      if (best === null || distance < best.distance) best = { clusters: [a, b], distance };
    }
  }
  return best;
}

/**
 * Mean over a sample of the points of (b − a) / max(a, b): a is the mean distance to others of the own cluster, b the
 * least mean distance to another cluster's (Rousseeuw, 1987). A point alone in its cluster counts 0.
 */
export function silhouette(
  points: Points,
  assignment: ArrayLike<number>,
  clusterCount: number,
  seed: number,
): number {
  const chosen = permutation(points.count, createRandom(seed)).subarray(0, SILHOUETTE_POINTS);
  let total = 0;
  for (const point of chosen) {
    const sums = new Float64Array(clusterCount);
    const counts = new Uint32Array(clusterCount);
    for (const other of chosen) {
      if (other === point) continue;
      const cluster = assignment[other]!;
      counts[cluster]!++;
      sums[cluster]! += distanceBetween(points.values, point, points.values, other, points.dimensions);
    }
    const own = assignment[point]!;
    if (counts[own] === 0) continue;
    const within = sums[own]! / counts[own]!;
    let between = Number.POSITIVE_INFINITY;
    counts.forEach((count, cluster) => {
      if (cluster !== own && count > 0) between = Math.min(between, sums[cluster]! / count);
    });
    if (Number.isFinite(between) && Math.max(within, between) > 0)
      total += (between - within) / Math.max(within, between);
  }
  return total / chosen.length;
}
