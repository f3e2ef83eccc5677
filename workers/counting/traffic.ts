/** Statistics of traffic: routing over time, its balance, speed by version, fallbacks; and drift. */
import { LRUCache } from 'lru-cache';
import type { Latencies } from '../../shared/admin/experiment-wire.ts';
import {
  countOf,
  type Histogram,
  type Moments,
  meanInterval,
  PAIRS_MIN,
  quantilesOf,
  sharesOf,
} from '../../shared/admin/statistics.ts';
import { COLLAPSE, DRIFT, type Drift, type Stats } from '../../shared/admin/stats-wire.ts';
import { centroidDistances } from '../../shared/mask/centroids.ts';
import { saidOfRouting } from '../../shared/mask/held-out.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { type Hold, steadyNow_ms, withDeadline } from '../base/waiting.ts';
import { type Database, isoTime } from '../db/d1.ts';
import { latenciesOfBackends, versionKey, versionLatencies } from '../db/latencies.ts';
import { findClusterCounts, type StoredMaskSet } from '../db/mask-set-rows.ts';
import {
  agreementByCluster,
  clusterSeries,
  fallbackCounts,
  maskCounts,
  type SeriesRequest,
  totalSums,
  versionSums,
} from '../db/outcomes.ts';
import { listTrafficSamples, type NewTrafficSample } from '../db/request-rows.ts';
import { TRAFFIC } from '../limits.ts';
import type { Routed } from '../routing/decision.ts';
import { figuresOf } from './side-by-side.ts';

export async function stats(db: Database, request: SeriesRequest): Promise<Stats> {
  const [series, versions, latencies, byBackend, fallbacks, total, masks] = await Promise.all([
    clusterSeries(db, request),
    versionSums(db, request),
    versionLatencies(db, request),
    request.tenant === undefined ? latenciesOfBackends(db, request) : new Map<string, Latencies>(),
    fallbackCounts(db, request),
    totalSums(db, request),
    maskCounts(db, request),
  ]);
  const clusterCounts = await findClusterCounts(db, [...new Set(series.map(({ version }) => version))]);
  return {
    from: isoTime(request.from_ms),
    to: isoTime(request.to_ms),
    routing: series.map(({ start_ms, version, cluster, requests, errors }) => ({
      start: isoTime(start_ms),
      version: version === '' ? null : version,
      cluster: cluster < 0 ? null : cluster,
      requests,
      errors,
    })),
    balance: balances(series, clusterCounts),
    versions: versions.map(({ version, sparsity, sums }) => ({
      version: version === '' ? null : version,
      sparsity: sparsity < 0 ? null : sparsity,
      figures: figuresOf(sums, latencies.get(versionKey({ version, sparsity }))),
    })),
    backends: [...byBackend].map(([backend, { ttft, tpot }]) => ({
      backend,
      answers: countOf(ttft),
      ttft_quantiles_ms: quantilesOf(ttft),
      tpot_quantiles_ms: quantilesOf(tpot),
    })),
    fallbacks: fallbacks.map(({ fallback, requests }) => ({ reason: fallback, requests })),
    total: figuresOf(total.sums, mergeLatencies([...latencies.values()])),
    masks: masks.map(({ mask, sparsity, requests }) => ({
      mask,
      requests,
      sparsity: sparsity < 0 ? null : sparsity,
    })),
    saved: { ...meanOf(total.saved, ALPHA), pairs_min: PAIRS_MIN },
  };
}

/** Probability that the intervals of one answer ever miss. */
const ALPHA = 0.05;

/** The mean of paired differences, with its interval once there are enough pairs. */
const meanOf = (pairs: Moments, alpha: number) => ({
  pairs: pairs.count,
  ...(meanInterval(pairs, alpha) ?? { mean: null, low: null, high: null }),
});

function mergeLatencies(parts: readonly Latencies[]): Latencies | undefined {
  if (parts.length === 0) return undefined;
  const merged = (of: (part: Latencies) => Histogram): Histogram => {
    const sum = new Map<number, number>();
    for (const part of parts) {
      for (const [bucket, count] of of(part)) sum.set(bucket, (sum.get(bucket) ?? 0) + count);
    }
    return sum;
  };
  return { ttft: merged(({ ttft }) => ttft), tpot: merged(({ tpot }) => tpot) };
}

type ClusterCount = {
  readonly version: string;
  readonly cluster: number;
  readonly client_requests: number;
};

/**
 * How evenly clients' requests fall into clusters; the playground's are no sign of collapse. `clusterCounts`: the number
 * of clusters of each version, including those without requests.
 */
function balances(
  series: readonly ClusterCount[],
  clusterCounts: ReadonlyMap<string, number>,
): Stats['balance'] {
  const counts = new Map<string, Map<number, number>>();
  for (const { version, cluster, client_requests } of series) {
    if (version === '' || cluster < 0 || client_requests === 0) continue;
    const clusters = counts.get(version) ?? new Map<number, number>();
    counts.set(version, clusters.set(cluster, (clusters.get(cluster) ?? 0) + client_requests));
  }
  return [...counts].map(([version, clusters]) => {
    const requests = [...clusters.values()].reduce((sum, count) => sum + count, 0);
    const shares = [...clusters.values()].map((count) => count / requests);
    const clusterCount = clusterCounts.get(version) ?? clusters.size;
    const largest_share = Math.max(...shares);
    return {
      version,
      requests,
      largest_share,
      clusters: clusterCount,
      entropy_bits: Math.max(0, -shares.reduce((sum, share) => sum + share * Math.log2(share), 0)),
      collapsed: clusterCount > 1 && requests >= COLLAPSE.requests_min && largest_share >= COLLAPSE.share,
    };
  });
}

/*
 * Drift: whether a mask set still fits its traffic. Two signs: requests that are farther from every centroid than the
 * set's own prompts, and clusters whose masked answers diverge from the dense ones sooner than before.
 */

/** `tenant` undefined: all tenants. */
export async function driftOf(
  db: Database,
  { version, content }: StoredMaskSet,
  tenant: string | undefined,
  since_ms: number,
): Promise<Drift> {
  const [samples, agreement] = await Promise.all([
    listTrafficSamples(db, version, tenant),
    agreementByCluster(db, version, tenant, since_ms),
  ]);
  const set = JSON.parse(content) as MaskSet;
  const { nearest } = saidOfRouting(set);
  const nearestOf = ({ distances }: (typeof samples)[number]) => Math.min(...distances);
  const distance = nearest === null ? null : farAway(samples.map(nearestOf), nearest.far);
  const clusters = clusterDrift(agreement);
  return {
    version,
    since: isoTime(since_ms),
    distance,
    clusters,
    pairs_min: PAIRS_MIN,
    proposal: proposalFor(distance, clusters),
  };
}

function farAway(distances: readonly number[], limit: number): NonNullable<Drift['distance']> {
  const samples = distances.length;
  const far = distances.filter((distance) => distance > limit).length;
  const said = { samples, samples_min: DRIFT.samples_min, limit };
  // One near and one far request are added, so that the variance is not 0.
  const found = samples < DRIFT.samples_min ? null : meanInterval(sharesOf(samples + 2, far + 1), ALPHA);
  if (found === null) return { ...said, far_share: null, low: null, high: null, drifted: false };
  const [low, high] = [Math.max(0, found.low), Math.min(1, found.high)];
  return { ...said, far_share: far / samples, low, high, drifted: low > DRIFT.farShare };
}

/** A cluster has drifted when its present interval of agreement is entirely below its earlier one. */
function clusterDrift(
  agreement: ReadonlyMap<number, { readonly before: Moments; readonly recent: Moments }>,
): Drift['clusters'] {
  const alpha = ALPHA / Math.max(1, agreement.size);
  return [...agreement].map(([cluster, sums]) => {
    const [before, recent] = [meanOf(sums.before, alpha), meanOf(sums.recent, alpha)];
    const drifted = before.low !== null && recent.high !== null && recent.high < before.low;
    return { cluster, before, recent, drifted };
  });
}

function proposalFor(distance: Drift['distance'], clusters: Drift['clusters']): string | null {
  const drifted = clusters.filter((one) => one.drifted).map(({ cluster }) => cluster);
  const signs: string[] = [];
  if (distance?.drifted) {
    const percent = Math.round(100 * distance.far_share!);
    signs.push(
      `${percent} % of recent requests lie farther from every cluster than 95 % of the prompts that the set was made for`,
    );
  }
  if (drifted.length > 0) {
    const which = drifted.length === 1 ? `cluster ${drifted[0]}` : `clusters ${drifted.join(', ')}`;
    signs.push(`answers of ${which} part from the dense model's sooner than they used to`);
  }
  if (signs.length === 0) return null;
  return `Learn again with recent prompts: ${signs.join(', and ')}.`;
}

/*
 * Samples of requests' positions, for drift and for the dashboard's map. No request waits for them: the clock alone
 * skips most requests, and errors are only logged.
 */

export interface TrafficSampler {
  /** Does nothing for a request that fell into no cluster. */
  seen(tenant: string, routed: Routed, hold: Hold): void;
}

const DIGITS = 4;

export function createTrafficSampler(insert: (sample: NewTrafficSample) => Promise<void>): TrafficSampler {
  const sampledAt_ms = new LRUCache<string, number>({ max: TRAFFIC.tenantsMax });
  return {
    seen(tenant, { decision, vector }, hold) {
      const { set, cluster } = decision;
      if (set === null || cluster === null || vector === null) return;
      const now_ms = steadyNow_ms();
      if (now_ms - (sampledAt_ms.get(tenant) ?? 0) < TRAFFIC.every_ms) return;
      sampledAt_ms.set(tenant, now_ms);
      const distances = [...centroidDistances(vector, set.centroids)].map((distance) =>
        Number(distance.toFixed(DIGITS)),
      );
      const sample = { tenant, version: set.version, cluster, distances, createdAt_ms: Date.now() };
      hold(
        withDeadline(insert(sample), TRAFFIC.write_ms, 'keeping a traffic sample').catch((error) =>
          log('warn', 'traffic_sample_lost', { reason: reasonOf(error) }),
        ),
      );
    },
  };
}
