/**
 * How many clusters are best: the paper's open question, asked of one's own data. The same run for several numbers of
 * clusters; what they have in common (the mask for everybody) is learned once.
 */
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { writeWhole } from '../write-whole.ts';
import type { LearnOptions } from './learn.ts';
import { learn, STATE_FILE } from './learn.ts';

export const SWEEP_FILE = 'sweep.json';

export type SweepRow = {
  readonly clusters: number;
  /** On held-out prompts, weighted by the clusters' shares. */
  readonly kl: number;
  readonly agreement: number;
  readonly perplexity: number;
  readonly largestShare: number;
  readonly silhouette: number | null;
  readonly folder: string;
};

/** Each number's run is in a folder of its own in `out`; killed and started again it goes on. */
export async function sweepClusters(
  options: Omit<LearnOptions, 'clusterCount' | 'sharedState'>,
  clusterCounts: readonly number[],
  onRow: (row: SweepRow) => void,
): Promise<SweepRow[]> {
  await mkdir(options.out, { recursive: true });
  const sharedState = join(options.out, STATE_FILE);
  const rows: SweepRow[] = [];
  for (const clusterCount of clusterCounts) {
    const out = join(options.out, `clusters-${clusterCount}`);
    const { maskSet, report } = await learn({ ...options, clusterCount, out, sharedState });
    const { kl, agreement, perplexity } = maskSet.heldOut.learned as Record<string, number>;
    rows.push({
      clusters: clusterCount,
      ...{ kl: kl!, agreement: agreement!, perplexity: perplexity! },
      largestShare: report.routing.largestShare,
      silhouette: report.routing.silhouette,
      folder: out,
    });
    onRow(rows.at(-1)!);
  }
  await writeWhole(join(options.out, SWEEP_FILE), `${JSON.stringify({ rows }, null, 1)}\n`);
  await rm(sharedState, { force: true });
  return rows;
}
