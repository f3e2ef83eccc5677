/** What the embedding map and the routing page compute before they draw. */
import { PCA } from 'ml-pca';
import type { Stats } from '../../../shared/admin/stats-wire.ts';
import { shortVersion } from '../look.ts';

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

/* From counts by time and cluster to shares over time, ready to be stacked. */

export type Series = {
  readonly requests: number;
  readonly clusters: readonly {
    readonly name: string;
    readonly requests: number;
    /** At every time at which there was any request, 0 where this cluster had none: stacks need all of them. */
    readonly shares: readonly { readonly start_ms: number; readonly share: number }[];
  }[];
};

export function sharesOverTime(routing: Stats['routing']): Series {
  const totals = new Map<number, number>();
  const counts = new Map<string, Map<number, number>>();
  for (const { start, version, cluster, requests } of routing) {
    const start_ms = Date.parse(start);
    totals.set(start_ms, (totals.get(start_ms) ?? 0) + requests);
    const name = cluster === null ? 'not routed' : `${shortVersion(version ?? 'none')} · ${cluster}`;
    const own = counts.get(name) ?? new Map<number, number>();
    own.set(start_ms, (own.get(start_ms) ?? 0) + requests);
    counts.set(name, own);
  }
  const times = [...totals.keys()].sort((a, b) => a - b);
  const sum = (values: Iterable<number>) => [...values].reduce((total, value) => total + value, 0);
  return {
    requests: sum(totals.values()),
    clusters: [...counts]
      .sort(([a], [b]) => a.localeCompare(b, undefined, { numeric: true }))
      .map(([name, own]) => ({
        name,
        requests: sum(own.values()),
        shares: times.map((start_ms) => ({
          start_ms,
          share: (own.get(start_ms) ?? 0) / totals.get(start_ms)!,
        })),
      })),
  };
}
