/** What pages compute before they draw. */
import { PCA } from 'ml-pca';
import type { Stats } from '../../../shared/admin/stats-wire.ts';

/*
 * Centroids seen from where they differ most (their first two principal components, ml-pca), and further points placed
 * among them from their distances alone.
 */

type Point = { readonly x: number; readonly y: number };
export type Projection = {
  readonly centroids: readonly Point[];
  /** The share of the centroids' variance that the picture shows, 0 to 1. */
  readonly explained: number;
  /** `distances` to every centroid, Euclidean; undefined when they are not as many. */
  readonly place: (distances: readonly number[]) => Point | undefined;
};

const ORIGIN: Point = { x: 0, y: 0 };

/** `rows` is `[clusters][dimensions]`; fewer than two clusters all lie in the middle. */
export function projectCentroids(rows: readonly (readonly number[])[]): Projection {
  if (rows.length < 2) return { centroids: rows.map(() => ORIGIN), explained: 1, place: () => ORIGIN };
  const vectors = rows.map((row) => [...row]);
  const pca = new PCA(vectors, { center: true, scale: false });
  const coordinates = pca.predict(vectors, { nComponents: 2 }).to2DArray();
  const [first = 0, second = 0] = pca.getExplainedVariance();
  const place = createPlacer(vectors, coordinates);
  return { centroids: coordinates.map(([x = 0, y = 0]) => ({ x, y })), explained: first + second, place };
}

/**
 * Landmark multidimensional scaling (de Silva and Tenenbaum 2004): with centred centroids cᵢ, their coordinates pᵢ on
 * an axis and λ = Σ pᵢ², a point at the distances δᵢ has on that axis the coordinate Σ pᵢ(|cᵢ|² − δᵢ²) / 2λ. That is its
 * orthogonal projection, exactly: Σ pᵢ = 0 drops the point's own length, and Σ pᵢcᵢ is λ times the axis.
 */
function createPlacer(vectors: readonly number[][], coordinates: readonly number[][]): Projection['place'] {
  const mean = vectors[0]!.map((_, i) => vectors.reduce((sum, row) => sum + row[i]!, 0) / vectors.length);
  const lengths_sq = vectors.map((row) => row.reduce((sum, value, i) => sum + (value - mean[i]!) ** 2, 0));
  const lambda = (axis: number) => coordinates.reduce((sum, point) => sum + (point[axis] ?? 0) ** 2, 0);
  const lambdas = [lambda(0), lambda(1)];
  return (distances) => {
    if (distances.length !== vectors.length) return undefined;
    const [x, y] = lambdas.map((of, axis) =>
      of === 0
        ? 0
        : coordinates.reduce(
            (sum, point, i) => sum + (point[axis] ?? 0) * (lengths_sq[i]! - distances[i]! ** 2),
            0,
          ) /
          (2 * of),
    );
    return { x: x!, y: y! };
  };
}

/* From counts by time and cluster to bars over the whole range: a time without requests is a gap, and not a zero. */

export type Series = {
  /** The beginnings of all steps of the range. */
  readonly starts_ms: readonly number[];
  readonly requests: number;
  readonly clusters: readonly {
    /** Null: requests that fell into none. */
    readonly cluster: number | null;
    readonly requests: number;
    /** At every step; null where there was no request at all. */
    readonly shares: readonly (number | null)[];
  }[];
};

/** Of the requests of one version; null for those without one. */
export function sharesOverTime(
  routing: Stats['routing'],
  version: string | null,
  range: { readonly from_ms: number; readonly step_ms: number; readonly steps: number },
): Series {
  const starts_ms = Array.from({ length: range.steps }, (_, step) => range.from_ms + step * range.step_ms);
  const totals = starts_ms.map(() => 0);
  const counts = new Map<number | null, number[]>();
  for (const row of routing) {
    if (row.version !== version) continue;
    const step = Math.floor((Date.parse(row.start) - range.from_ms) / range.step_ms);
    if (step < 0 || step >= range.steps) continue;
    const own = counts.get(row.cluster) ?? starts_ms.map(() => 0);
    own[step]! += row.requests;
    totals[step]! += row.requests;
    counts.set(row.cluster, own);
  }
  const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0);
  return {
    starts_ms,
    requests: sum(totals),
    clusters: [...counts]
      .sort(([a], [b]) => (a ?? -1) - (b ?? -1))
      .map(([cluster, own]) => ({
        cluster,
        requests: sum(own),
        shares: own.map((count, step) => (totals[step] === 0 ? null : count / totals[step]!)),
      })),
  };
}

/** The versions that requests were routed by, the most common first; null for requests without one. */
export function versionsIn(routing: Stats['routing']): (string | null)[] {
  const counts = new Map<string | null, number>();
  for (const { version, requests } of routing) counts.set(version, (counts.get(version) ?? 0) + requests);
  return [...counts].sort(([, a], [, b]) => b - a).map(([version]) => version);
}

/** Clusters whose masks are the same, together: what is drawn once. */
export function groupByMask<Cluster extends { readonly mask: string }>(
  clusters: readonly Cluster[],
): { readonly mask: string; readonly members: readonly (Cluster & { readonly index: number })[] }[] {
  const groups = new Map<string, (Cluster & { index: number })[]>();
  clusters.forEach((cluster, index) => {
    groups.set(cluster.mask, [...(groups.get(cluster.mask) ?? []), { ...cluster, index }]);
  });
  return [...groups].map(([mask, members]) => ({ mask, members }));
}
