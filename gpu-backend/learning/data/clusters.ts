/**
 * Clusters of prompts: embeds as the edge does, picks the cluster that the edge would pick, and counts kinds by
 * cluster.
 */
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import { nearestCentroid } from '../../../shared/mask/centroids.ts';
import { nextTurn } from '../../event-loop.ts';
import { sumOf } from '../../measure.ts';
import { type Clusters, POINTS_A_STEP, type Points } from './kmeans.ts';
import type { CalibrationRow } from './read-data.ts';

export const centroidPoints = ({ centroids, dimensions, sizes }: Clusters): Points => ({
  count: sizes.length,
  dimensions,
  values: centroids,
});

/** Number of prompts of each kind in each cluster. */
export type KindTable = { readonly kind: string; readonly counts: number[] }[];

/** Most texts, and characters, embedded between two looks at the signal: half a second of the static encoder's time. */
const [EMBED_BATCH, EMBED_CHARS] = [1024, 2 ** 19];

export async function embedRows(
  rows: readonly CalibrationRow[],
  encoder: Encoder,
  signal?: AbortSignal,
): Promise<Float32Array[]> {
  const vectors: Float32Array[] = [];
  while (vectors.length < rows.length) {
    const texts: string[] = [];
    for (let chars = 0; texts.length < EMBED_BATCH && chars < EMBED_CHARS; ) {
      const row = rows[vectors.length + texts.length];
      if (row === undefined) break;
      texts.push(row.routeText);
      chars += row.routeText.length;
    }
    vectors.push(...(await encoder.embed(texts, signal)));
    // The static encoder takes no turn of its own.
    await nextTurn();
  }
  return vectors;
}

/** The cluster that the edge would pick for each vector, in steps. */
export function* assignRows(
  vectors: readonly Float32Array[],
  { sizes, dimensions, centroids }: Clusters,
): Generator<void, Uint16Array> {
  const packed = { clusterCount: sizes.length, dimensions, values: centroids };
  const assignment = new Uint16Array(vectors.length);
  for (const [i, vector] of vectors.entries()) {
    if (i % POINTS_A_STEP === 0) yield;
    assignment[i] = nearestCentroid(vector, packed).cluster;
  }
  return assignment;
}

export function kindTable(
  rows: readonly Pick<CalibrationRow, 'kind'>[],
  assignment: ArrayLike<number>,
  clusterCount: number,
): KindTable {
  const table = new Map<string, number[]>();
  rows.forEach((row, i) => {
    const counts = table.get(row.kind) ?? Array<number>(clusterCount).fill(0);
    counts[assignment[i]!] = counts[assignment[i]!]! + 1;
    table.set(row.kind, counts);
  });
  return [...table].map(([kind, counts]) => ({ kind, counts }));
}

/**
 * Mutual information of cluster and kind in bits, from the table's counts: Σ p(k,c) log₂ (p(k,c) / p(k) p(c)). At most
 * log₂ of the number of kinds.
 */
export function informationBits(table: KindTable): number {
  const total = table.reduce((sum, { counts }) => sum + sumOf(counts), 0);
  const clusterTotals =
    table[0]?.counts.map((_, c) => table.reduce((sum, row) => sum + row.counts[c]!, 0)) ?? [];
  let bits = 0;
  for (const { counts } of table) {
    const kindTotal = sumOf(counts);
    counts.forEach((count, c) => {
      if (count > 0) bits += (count / total) * Math.log2((count * total) / (kindTotal * clusterTotals[c]!));
    });
  }
  return bits;
}

/** For people: the kinds that make up at least a fifth of a cluster, the largest first. */
export function clusterLabel(table: KindTable, cluster: number): string {
  const total = table.reduce((sum, { counts }) => sum + counts[cluster]!, 0);
  const shares = table
    .map(({ kind, counts }) => ({ kind, share: total === 0 ? 0 : counts[cluster]! / total }))
    .sort((a, b) => b.share - a.share);
  const large = shares.filter(({ share }, rank) => rank === 0 || share >= 0.2).slice(0, 3);
  return large
    .map(({ kind, share }) => `${kind} ${Math.round(100 * share)} %`)
    .join(', ')
    .slice(0, 200);
}
