/** Computations for the pages' charts. */
import { PCA } from 'ml-pca';
import { z } from 'zod';
import { listSchema } from '../../../shared/admin/admin-wire.ts';
import { maskSetSummarySchema } from '../../../shared/admin/publication-wire.ts';
import { type EvaluatedRow, evaluatedRowSchema, type Stats } from '../../../shared/admin/stats-wire.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { ApiError, admin, query } from '../api.ts';
import { loadMaskSet, publicationInUse } from '../hooks.ts';
import { shortVersion } from '../look.ts';

/*
 * Projects centroids on their first two principal components (ml-pca), and places further points by their distances to
 * the centroids.
 */

type Point = { readonly x: number; readonly y: number };
export type Projection = {
  readonly centroids: readonly Point[];
  /** The share of the centroids' variance that the picture shows, 0 to 1. */
  readonly explained: number;
  /** Places a point by its Euclidean distances to all centroids; undefined when their number is wrong. */
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

/* Counts by time and cluster as shares over the whole range; a step without requests is a gap, not zero. */

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

/** Shares of one version's requests; `version` null: requests without a version. */
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

/** Groups clusters with equal masks, which are drawn once. */
export function groupByMask<Cluster extends { readonly mask: string }>(
  clusters: readonly Cluster[],
): { readonly mask: string; readonly members: readonly (Cluster & { readonly index: number })[] }[] {
  const groups = new Map<string, (Cluster & { index: number })[]>();
  clusters.forEach((cluster, index) => {
    groups.set(cluster.mask, [...(groups.get(cluster.mask) ?? []), { ...cluster, index }]);
  });
  return [...groups].map(([mask, members]) => ({ mask, members }));
}

/* Quality and cost of methods, and their Pareto front. */

export type QualityRow = {
  /** The name of the mask set; null for a method without one. */
  readonly set: string | null;
  readonly method: string;
  /**
   * How an evaluation matched the method to a learned set: by the number of skipped blocks, or by time; null outside
   * evaluations.
   */
  readonly matched: EvaluatedRow['matched'] | null;
  readonly surrogate: boolean;
  /** 0 to 1. */
  readonly sparsity: number;
  readonly kl: number | null;
  readonly agreement: number | null;
  readonly perplexity: number | null;
  readonly ms_per_token: number | null;
};

/** `names`: those of known sets, by version. */
export const evaluatedRows = (
  rows: readonly EvaluatedRow[],
  names: ReadonlyMap<string, string>,
): QualityRow[] =>
  rows.map(({ method, matched, maskSet, surrogate, sparsity, kl, agreement, perplexity, msPerToken }) => ({
    set: maskSet === null || matched === 'time' ? null : (names.get(maskSet) ?? maskSet),
    method,
    matched,
    surrogate,
    sparsity,
    kl,
    agreement,
    perplexity,
    ms_per_token: msPerToken,
  }));

export type Measure = 'kl' | 'agreement' | 'perplexity';

/**
 * The Pareto front: rows that no other row beats in both `cost` and `measure`. Rows without one of these figures are
 * left out.
 */
export function paretoFront(
  rows: readonly QualityRow[],
  cost: (row: QualityRow) => number | null,
  measure: Measure,
): QualityRow[] {
  const sign = measure === 'agreement' ? -1 : 1;
  const known = rows.filter((row) => cost(row) !== null && row[measure] !== null);
  const isBeaten = (row: QualityRow) =>
    known.some((other) => {
      const cheaper = cost(other)! - cost(row)!;
      const better = sign * (other[measure]! - row[measure]!);
      return cheaper <= 0 && better <= 0 && (cheaper < 0 || better < 0);
    });
  return known.filter((row) => !isBeaten(row)).sort((a, b) => cost(a)! - cost(b)!);
}

/*
 * The held-out figures of mask sets, as one row for each method. `learn` writes them by method, beside other findings,
 * which are left out.
 */

const figuresSchema = z.object({
  kl: z.number().optional(),
  agreement: z.number().optional(),
  perplexity: z.number(),
});

/** `learn` writes a dozen methods. A tenant may store a set with more of them than a page can draw. */
export const METHODS_SHOWN_MAX = 50;

export function qualityRows(set: MaskSet): QualityRow[] {
  const rows = Object.entries(set.heldOut).flatMap(([method, value]): QualityRow[] => {
    const figures = figuresSchema.safeParse(value).data;
    if (figures === undefined) return [];
    const isDense = method === 'dense';
    return [
      {
        set: set.name,
        method,
        matched: null,
        surrogate: !isDense && set.surrogate,
        sparsity: isDense ? 0 : set.reachedSparsity,
        kl: isDense ? 0 : (figures.kl ?? null),
        agreement: isDense ? 1 : (figures.agreement ?? null),
        perplexity: figures.perplexity,
        ms_per_token: null,
      },
    ];
  });
  return rows.slice(0, METHODS_SHOWN_MAX);
}

/* Sources of figures: sets' evaluations, and the sets' own held-out figures. */

export type Figures = {
  readonly title: string;
  readonly isEvaluation: boolean;
  readonly rows: readonly QualityRow[];
};

/** Most sets that are read, as each is read as a whole. */
const SET_COUNT_MAX = 12;

/** `unreadable`: what cannot be read, and why; it does not hide the others. */
type AllFigures = { readonly figures: readonly Figures[]; readonly unreadable: readonly string[] };

/**
 * First the evaluation of the live set, then those of other sets, newest first, and last the held-out figures of all
 * sets.
 */
export async function loadFigures(tenant: string, signal: AbortSignal): Promise<AllFigures> {
  const unreadable: string[] = [];
  const nullIfUnreadable = (error: unknown): null => {
    if (!(error instanceof ApiError && isUnreadable(error))) throw error;
    unreadable.push(error.message);
    return null;
  };
  const scope = query({ tenant });
  const [inUse, { data }] = await Promise.all([
    publicationInUse(tenant, signal),
    admin(listSchema(maskSetSummarySchema), `/mask-sets${scope}`, { signal }),
  ]);
  const sets = inUse === null ? data : [inUse, ...data];
  const versions = [...new Set(sets.map(({ version }) => version))].slice(0, SET_COUNT_MAX);
  const found = await Promise.all(
    versions.map(async (version) => {
      const path = `/mask-sets/${version}/evaluation${scope}`;
      const [set, evaluation] = await Promise.all([
        loadMaskSet(version, tenant, signal).catch(nullIfUnreadable),
        admin(listSchema(evaluatedRowSchema), path, { signal }).catch(nullIfUnreadable),
      ]);
      return set === null ? [] : [{ version, set, evaluation: evaluation?.data ?? [] }];
    }),
  ).then((each) => each.flat());
  const names = new Map(found.map(({ version, set }) => [version, set.name]));
  const evaluations = found.map(({ version, set, evaluation }) => ({
    title: `evaluation of ${set.name} ${shortVersion(version)}`,
    isEvaluation: true,
    rows: evaluatedRows(evaluation, names),
  }));
  const heldOut = found.flatMap(({ set }) => qualityRows(set));
  const figures = [
    ...evaluations,
    { title: 'held-out figures of every set', isEvaluation: false, rows: heldOut },
  ].filter(({ rows }) => rows.length > 0);
  return { figures, unreadable };
}

/** An answer in another form, or the edge's own word that it cannot read what is stored. */
const isUnreadable = ({ code }: ApiError): boolean => code === 'unreadable' || code === 'conflict';
