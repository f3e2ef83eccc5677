/**
 * From rows to clusters of prompts: splits off the held-out rows, embeds all rows as the edge does, and clusters the
 * others.
 */
import { quantileSorted } from 'simple-statistics';
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import { FAR_SHARE, type Nearest } from '../../../shared/mask/held-out.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { finishInTurns } from '../../event-loop.ts';
import { createRandom, permutation } from '../../random.ts';
import type { KindTable } from './clusters.ts';
import { assignRows, centroidPoints, embedRows, kindTable } from './clusters.ts';
import { principalAxes, project } from './fit-vectors.ts';
import type { Clusters, Points } from './kmeans.ts';
import {
  clusterSizes,
  distanceBetween,
  kMeansBySample,
  kMeansSteps,
  POINTS_A_STEP,
  packPoints,
} from './kmeans.ts';
import type { CalibrationRow } from './read-data.ts';
import type { RoutingHealth } from './routing-health.ts';
import { routingHealth } from './routing-health.ts';
import { HELD_OUT_SHARE, splitRows } from './samples.ts';

/** Share of the rows that are not held out on which masks are chosen but not searched. */
const CHOICE_SHARE = 0.25;
/**
 * Numbers of clusters that `auto` chooses from: many small clusters, as clusters share masks. Fewer only where there
 * are too few prompts.
 */
const CLUSTER_COUNTS = [16, 32, 64, 128, 256];
const FEW_PROMPTS_COUNTS = [2, 4, 8];
/** Fewest prompts a cluster, on average, that show which mask suits it. */
const ROWS_A_CLUSTER_MIN = 25;
/**
 * How many starts k-means gets, by prompts times clusters: with many of both, the starts' results differ little and
 * each start takes long.
 */
const STARTS = [
  { upTo: 2 ** 15, starts: 8, iterationsMax: 100 },
  { upTo: 2 ** 20, starts: 2, iterationsMax: 40 },
  { upTo: Number.POSITIVE_INFINITY, starts: 1, iterationsMax: 25 },
] as const;
/** Prompts that place centroids, 128 for each of the most clusters: half a million take fifteen times as long. */
const PLACING_PROMPTS = 2 ** 15;
/** Prompts that `auto` compares numbers of clusters on. */
const COMPARED_PROMPTS = 2048;
/** Fewer held-out prompts say nothing about clusters. */
const HELD_OUT_ROWS_MIN = 20;

/** Disjoint shares of the prompts. */
type Shares = {
  /** Rows on which masks are searched and trained. */
  readonly search: readonly CalibrationRow[];
  /** Rows on which masks are chosen and assigned to clusters. */
  readonly choice: readonly CalibrationRow[];
  /** Nothing is learned from these. */
  readonly heldOut: readonly CalibrationRow[];
};

export type Prompts = {
  readonly everybody: Shares;
  readonly clusters: Clusters;
  /** Of every prompt. */
  readonly clusterOf: ReadonlyMap<CalibrationRow, number>;
  /** Each centroid along the two main directions of the prompts. */
  readonly positions: readonly (readonly [number, number])[];
  readonly kinds: { readonly fit: KindTable; readonly heldOut: KindTable };
  readonly health: RoutingHealth;
  /** How far held-out prompts lie from their centroids (all prompts where hardly any are held out). */
  readonly nearest: Nearest;
  /** What `auto` compared, on held-out prompts. */
  readonly counts: readonly ClusterCount[];
  readonly rows: { readonly fit: number; readonly heldOut: number };
};

type ClusterCount = {
  readonly clusters: number;
  readonly silhouette: number;
  readonly largestShare: number;
  readonly balance: number;
};

/** @throws MaskrouteError `invalid_data` when there are fewer distinct prompts than clusters, or all are held out. */
export async function groupPrompts(
  rows: readonly CalibrationRow[],
  encoder: Encoder,
  clusterCount: number | 'auto',
  seed: number,
  signal?: AbortSignal,
): Promise<Prompts> {
  const { fit, heldOut } = await finishInTurns(splitRows(rows, HELD_OUT_SHARE), signal);
  if (fit.length === 0) {
    const message = `The data are too few: all rows (${rows.length}) are held out, and none is left to learn from.`;
    throw new MaskrouteError('invalid_data', message);
  }
  const points = packPoints(await embedRows(fit, encoder, signal));
  const heldOutVectors = await embedRows(heldOut, encoder, signal);
  const placing = sampleOf(points, PLACING_PROMPTS, seed);
  const grouped = clusterPoints(points, placing, heldOutVectors, clusterCount, seed);
  const { clusters, health, counts, heldOutClusters, nearest } = await finishInTurns(grouped, signal);
  const count = clusters.sizes.length;
  const clusterOf = new Map<CalibrationRow, number>();
  for (const [i, row] of fit.entries()) clusterOf.set(row, clusters.assignment[i]!);
  for (const [i, row] of heldOut.entries()) clusterOf.set(row, heldOutClusters[i]!);
  return {
    everybody: { ...(await finishInTurns(searchAndChoice(fit), signal)), heldOut },
    clusters,
    clusterOf,
    health,
    counts,
    nearest,
    positions: centroidPositions(placing, clusters),
    kinds: {
      fit: kindTable(fit, clusters.assignment, count),
      heldOut: kindTable(heldOut, heldOutClusters, count),
    },
    rows: { fit: fit.length, heldOut: heldOut.length },
  };
}

/** Disjoint; with very few rows, all are used for both. */
function* searchAndChoice(
  rows: readonly CalibrationRow[],
): Generator<void, Pick<Shares, 'search' | 'choice'>> {
  const { fit: search, heldOut: choice } = yield* splitRows(rows, CHOICE_SHARE, 'choice');
  return search.length > 0 && choice.length > 0 ? { search, choice } : { search: rows, choice: rows };
}

/** In steps: many prompts and clusters take minutes. */
function* clusterPoints(
  points: Points,
  placing: Points,
  heldOut: readonly Float32Array[],
  clusterCount: number | 'auto',
  seed: number,
) {
  const found = yield* bestClusters(points, placing, heldOut, clusterCount, seed);
  const { clusters } = found;
  const judged = heldOut.length < HELD_OUT_ROWS_MIN ? points : packPoints(heldOut);
  return {
    ...found,
    health: routingHealth(points, clusters, seed),
    heldOutClusters: yield* assignRows(heldOut, clusters),
    nearest: yield* nearestDistances(judged, clusters),
  };
}

/** The clusters that are asked for, or that suit the prompts best, and what was compared for that. */
function* bestClusters(
  points: Points,
  placing: Points,
  heldOut: readonly Float32Array[],
  clusterCount: number | 'auto',
  seed: number,
): Generator<void, { readonly clusters: Clusters; readonly counts: readonly ClusterCount[] }> {
  function* cluster(count: number, of = placing): Generator<void, Clusters> {
    const { starts, iterationsMax } = STARTS.find(({ upTo }) => of.count * count <= upTo)!;
    const options = { clusterCount: count, seed, starts, iterationsMax };
    const isPart = of === placing && of !== points;
    return yield* isPart ? kMeansBySample(points, of, options) : kMeansSteps(of, options);
  }
  if (clusterCount !== 'auto') return { clusters: yield* cluster(clusterCount), counts: [] };
  const some = sampleOf(points, COMPARED_PROMPTS, seed);
  const distinct = distinctCount(some);
  const affordable = (count: number) => count * ROWS_A_CLUSTER_MIN <= points.count && count <= distinct;
  const fine = CLUSTER_COUNTS.filter(affordable);
  const possible = fine.length > 0 ? fine : FEW_PROMPTS_COUNTS.filter(affordable);
  if (possible.length === 0) return { clusters: yield* cluster(1), counts: [] };
  const attempts: { readonly clusters: Clusters; readonly health: RoutingHealth }[] = [];
  for (const count of possible) {
    const clusters = yield* cluster(count, some);
    attempts.push({ clusters, health: yield* healthOnOthers(some, heldOut, clusters, seed) });
  }
  // Prefers clusters that are well separated and evenly sized; of equal values the fewest clusters.
  const worth = ({ health }: (typeof attempts)[number]) => Math.max(0, health.silhouette!) * health.balance;
  const best = attempts.reduce((most, one) => (worth(one) > worth(most) ? one : most));
  const counts = attempts.map(({ clusters, health }) => ({
    clusters: clusters.sizes.length,
    silhouette: health.silhouette!,
    largestShare: health.largestShare,
    balance: health.balance,
  }));
  const clusters = some === points ? best.clusters : yield* cluster(best.clusters.sizes.length);
  return { clusters, counts };
}

/** A random sample of the points, or all of them where they are few. */
function sampleOf(points: Points, most: number, seed: number): Points {
  if (points.count <= most) return points;
  const { dimensions, values } = points;
  const chosen = permutation(points.count, createRandom(seed)).subarray(0, most);
  return packPoints(Array.from(chosen, (i) => values.subarray(i * dimensions, (i + 1) * dimensions)));
}

function distinctCount({ count, dimensions, values }: Points): number {
  const vector = (i: number) => values.subarray(i * dimensions, (i + 1) * dimensions).join();
  return new Set(Array.from({ length: count }, (_, i) => vector(i))).size;
}

/** Routing health on held-out prompts, or on the clustered prompts where hardly any are held out. */
function* healthOnOthers(
  points: Points,
  heldOut: readonly Float32Array[],
  clusters: Clusters,
  seed: number,
): Generator<void, RoutingHealth> {
  if (heldOut.length < HELD_OUT_ROWS_MIN) return routingHealth(points, clusters, seed);
  const assignment = yield* assignRows(heldOut, clusters);
  const sizes = clusterSizes(assignment, clusters.sizes.length);
  return routingHealth(packPoints(heldOut), { ...clusters, assignment, sizes }, seed);
}

function* nearestDistances(
  points: Points,
  { centroids, dimensions, sizes }: Clusters,
): Generator<void, Nearest> {
  const distances: number[] = [];
  for (let point = 0; point < points.count; point++) {
    if (point % POINTS_A_STEP === 0) yield;
    const all = Array.from(sizes, (_, cluster) =>
      distanceBetween(points.values, point, centroids, cluster, dimensions),
    );
    distances.push(Math.min(...all));
  }
  distances.sort((a, b) => a - b);
  const at = (share: number) => Number(quantileSorted(distances, share).toPrecision(4));
  return { rows: points.count, median: at(0.5), far: at(1 - FAR_SHARE) };
}

function centroidPositions(points: Points, clusters: Clusters): [number, number][] {
  const axes = principalAxes(points, Math.min(2, clusters.dimensions));
  const { values } = project(centroidPoints(clusters), axes);
  return Array.from(clusters.sizes, (_, cluster) => [
    values[cluster * axes.outputs]!,
    values[cluster * axes.outputs + 1] ?? 0,
  ]);
}
