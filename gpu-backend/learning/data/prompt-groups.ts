/** From rows to groups of prompts: the held-out ones apart, all embedded as the edge does, clustered. */
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import type { Clusters, KindTable } from './clusters.ts';
import { assignRows, embedRows, kindTable } from './clusters.ts';
import { principalAxes, project } from './fit-vectors.ts';
import type { Points } from './kmeans.ts';
import { clusterSizes, distanceBetween, kMeans, packPoints } from './kmeans.ts';
import type { CalibrationRow } from './read-data.ts';
import type { RoutingHealth } from './routing-health.ts';
import { routingHealth } from './routing-health.ts';
import { HELD_OUT_SHARE, splitRows } from './samples.ts';

/** Of what is learned from, the share that masks are only chosen on. */
const CHOICE_SHARE = 0.25;
/** A cluster with fewer prompts borrows the nearest ones of others, up to as many. */
const CLUSTER_ROWS_MIN = 200;
/** What `auto` chooses among. */
const CLUSTER_COUNTS = [2, 4, 8, 16, 32];
/** Clusters with fewer prompts on average are not worth a mask. */
const ROWS_A_CLUSTER_MIN = 25;
/** Fewer held-out prompts say nothing about clusters. */
const HELD_OUT_ROWS_MIN = 20;

type PromptGroup = {
  /** Prompts to search and train on. */
  readonly search: readonly CalibrationRow[];
  /** Prompts to choose among masks on. */
  readonly choice: readonly CalibrationRow[];
  readonly heldOut: readonly CalibrationRow[];
  readonly borrowedRows: number;
  /** The centroid along the two main directions of the prompts. */
  readonly position: readonly [number, number];
};

export type Prompts = {
  /** All prompts that are learned from. */
  readonly everybody: Pick<PromptGroup, 'search' | 'choice'>;
  readonly clusters: Clusters;
  readonly groups: readonly PromptGroup[];
  readonly kinds: { readonly fit: KindTable; readonly heldOut: KindTable };
  readonly health: RoutingHealth;
  /** What `auto` compared, on held-out prompts. */
  readonly counts: readonly ClusterCount[];
  readonly rows: { readonly fit: number; readonly heldOut: number };
};

export type ClusterCount = {
  readonly clusters: number;
  readonly silhouette: number;
  readonly largestShare: number;
  readonly balance: number;
};

/** @throws MaskrouteError `invalid_data` when there are fewer distinct prompts than clusters. */
export async function groupPrompts(
  rows: readonly CalibrationRow[],
  encoder: Encoder,
  clusterCount: number | 'auto',
  seed: number,
  signal?: AbortSignal,
): Promise<Prompts> {
  const { fit, heldOut } = splitRows(rows, HELD_OUT_SHARE);
  const points = packPoints(await embedRows(fit, encoder, signal));
  const heldOutVectors = await embedRows(heldOut, encoder, signal);
  const { clusters, health, counts } = clusterPoints(points, heldOutVectors, clusterCount, seed);
  const heldOutClusters = assignRows(heldOutVectors, clusters);
  const count = clusters.sizes.length;
  const positions = centroidPositions(points, clusters);
  const groups = positions.map((position, cluster): PromptGroup => {
    const own = [...clusters.assignment.keys()].filter((i) => clusters.assignment[i] === cluster);
    const borrowed = nearestOthers(points, clusters, cluster, CLUSTER_ROWS_MIN - own.length);
    return {
      ...searchAndChoice([...own, ...borrowed].map((i) => fit[i]!)),
      heldOut: heldOut.filter((_, i) => heldOutClusters[i] === cluster),
      borrowedRows: borrowed.length,
      position,
    };
  });
  return {
    everybody: searchAndChoice(fit),
    ...{ clusters, groups, health, counts },
    kinds: {
      fit: kindTable(fit, clusters.assignment, count),
      heldOut: kindTable(heldOut, heldOutClusters, count),
    },
    rows: { fit: fit.length, heldOut: heldOut.length },
  };
}

/** Disjoint, and a prompt is on the same side in every group. A group with next to nothing uses all of it for both. */
function searchAndChoice(rows: readonly CalibrationRow[]): Pick<PromptGroup, 'search' | 'choice'> {
  const { fit: search, heldOut: choice } = splitRows(rows, CHOICE_SHARE, 'choice');
  return search.length > 0 && choice.length > 0 ? { search, choice } : { search: rows, choice: rows };
}

function clusterPoints(
  points: Points,
  heldOut: readonly Float32Array[],
  clusterCount: number | 'auto',
  seed: number,
) {
  const cluster = (count: number): Clusters => ({
    dimensions: points.dimensions,
    ...kMeans(points, { clusterCount: count, seed }),
  });
  const found = (clusters: Clusters, counts: readonly ClusterCount[]) => ({
    ...{ clusters, counts },
    health: routingHealth(points, clusters, seed),
  });
  if (clusterCount !== 'auto') return found(cluster(clusterCount), []);
  const possible = CLUSTER_COUNTS.filter((count) => count * ROWS_A_CLUSTER_MIN <= points.count);
  if (possible.length === 0) return found(cluster(1), []);
  const attempts = possible.map((count) => {
    const clusters = cluster(count);
    return { clusters, health: healthOnOthers(points, heldOut, clusters, seed) };
  });
  // Clusters that stand apart and share the requests out evenly; fewer of equally good.
  const worth = ({ health }: (typeof attempts)[number]) => Math.max(0, health.silhouette!) * health.balance;
  const best = attempts.reduce((most, one) => (worth(one) > worth(most) ? one : most));
  const counts = attempts.map(({ clusters, health }) => ({
    clusters: clusters.sizes.length,
    silhouette: health.silhouette!,
    largestShare: health.largestShare,
    balance: health.balance,
  }));
  return found(best.clusters, counts);
}

/** How clusters divide held-out prompts; where there are hardly any, the prompts that they were made from. */
function healthOnOthers(
  points: Points,
  heldOut: readonly Float32Array[],
  clusters: Clusters,
  seed: number,
): RoutingHealth {
  if (heldOut.length < HELD_OUT_ROWS_MIN) return routingHealth(points, clusters, seed);
  const assignment = assignRows(heldOut, clusters);
  const sizes = clusterSizes(assignment, clusters.sizes.length);
  return routingHealth(packPoints(heldOut), { ...clusters, assignment, sizes }, seed);
}

/** The rows of other clusters that are nearest to this one's centroid. */
function nearestOthers(points: Points, clusters: Clusters, cluster: number, count: number): number[] {
  if (count <= 0) return [];
  const { assignment, centroids, dimensions } = clusters;
  return [...assignment.keys()]
    .filter((i) => assignment[i] !== cluster)
    .map((i) => ({ i, distance: distanceBetween(points.values, i, centroids, cluster, dimensions) }))
    .sort((a, b) => a.distance - b.distance || a.i - b.i)
    .slice(0, count)
    .map(({ i }) => i);
}

function centroidPositions(points: Points, { centroids, dimensions, sizes }: Clusters): [number, number][] {
  const axes = principalAxes(points, Math.min(2, dimensions));
  const { values } = project({ count: sizes.length, dimensions, values: centroids }, axes);
  return Array.from(sizes, (_, cluster) => [
    values[cluster * axes.outputs]!,
    values[cluster * axes.outputs + 1] ?? 0,
  ]);
}
