/** What is going on, from what was counted: routing over time, its balance, speed by version, fallbacks. */
import type { Latencies } from '../../shared/admin/experiment-wire.ts';
import {
  countOf,
  type Histogram,
  type Moments,
  meanInterval,
  PAIRS_MIN,
  quantilesOf,
} from '../../shared/admin/statistics.ts';
import { COLLAPSE, type Saved, type Stats } from '../../shared/admin/stats-wire.ts';
import { type Database, isoTime } from '../db/d1.ts';
import { latenciesOfBackends, versionKey, versionLatencies } from '../db/latencies.ts';
import { findClusterCounts } from '../db/mask-set-rows.ts';
import {
  clusterSeries,
  fallbackCounts,
  maskCounts,
  type SeriesRequest,
  totalSums,
  versionSums,
} from '../db/outcomes.ts';
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
      ...{ requests, errors },
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
      ...{ mask, requests, sparsity: sparsity < 0 ? null : sparsity },
    })),
    saved: savedOf(total.saved),
  };
}

function savedOf(saved: Moments): Saved {
  const found = meanInterval(saved, SAVED_ALPHA);
  const interval = found ?? { mean: null, low: null, high: null };
  return { pairs: saved.count, pairs_min: PAIRS_MIN, ...interval };
}

/** Of an interval that misses the true mean at any time of looking. */
const SAVED_ALPHA = 0.05;

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

type ClusterCount = { readonly version: string; readonly cluster: number; readonly requests: number };

/** `clusterCounts`: how many clusters each version has, those that no request fell into included. */
function balances(
  series: readonly ClusterCount[],
  clusterCounts: ReadonlyMap<string, number>,
): Stats['balance'] {
  const counts = new Map<string, Map<number, number>>();
  for (const { version, cluster, requests } of series) {
    if (version === '' || cluster < 0) continue;
    const clusters = counts.get(version) ?? new Map<number, number>();
    counts.set(version, clusters.set(cluster, (clusters.get(cluster) ?? 0) + requests));
  }
  return [...counts].map(([version, clusters]) => {
    const requests = [...clusters.values()].reduce((sum, count) => sum + count, 0);
    const shares = [...clusters.values()].map((count) => count / requests).filter((share) => share > 0);
    const clusterCount = clusterCounts.get(version) ?? clusters.size;
    const largest_share = Math.max(0, ...shares);
    return {
      ...{ version, requests, largest_share, clusters: clusterCount },
      entropy_bits: Math.max(0, -shares.reduce((sum, share) => sum + share * Math.log2(share), 0)),
      collapsed: clusterCount > 1 && requests >= COLLAPSE.requests_min && largest_share >= COLLAPSE.share,
    };
  });
}
