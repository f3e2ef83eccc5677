/**
 * Compares numbers of clusters on the user's data (the paper leaves the best number open): the same run for several
 * numbers of clusters. What the runs have in common (the mask for everybody) is learned once.
 */
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { writeWhole } from '../files.ts';
import { withOutput } from './journal.ts';
import type { LearnOptions } from './learn.ts';
import { checkRun, learn, STATE_FILE } from './learn.ts';
import type { Figures } from './search/score-masks.ts';

const SWEEP_FILE = 'sweep.json';

/** The figures are of held-out prompts, weighted by the clusters' shares. */
export type SweepRow = Figures & {
  readonly clusters: number;
  /**
   * KL of the mask for everybody on the same prompts. Each row draws its own prompts, so compare KLs within a row;
   * across rows compare only the relative gain of clusters.
   */
  readonly oneMask_kl: number;
  readonly largestShare: number;
  readonly silhouette: number | null;
  readonly folder: string;
};

/**
 * Each number of clusters has a folder in the output folder, whose `sweep.json` has the rows so far. Killed and started
 * again, it resumes.
 * @throws MaskrouteError what `learn` throws, and `invalid_data` when no prompt is held out to compare on.
 */
export async function sweepClusters(
  options: SweepOptions,
  clusterCounts: readonly number[],
  onRow: (row: SweepRow) => void,
): Promise<SweepRow[]> {
  await checkRun(options);
  return await withOutput(options.output.folder, () => sweepAlone(options, clusterCounts, onRow));
}

type SweepOptions = Omit<LearnOptions, 'clusterCount'>;

async function sweepAlone(
  options: SweepOptions,
  clusterCounts: readonly number[],
  onRow: (row: SweepRow) => void,
): Promise<SweepRow[]> {
  const { output } = options;
  const sharedState = join(output.folder, STATE_FILE);
  const rows: SweepRow[] = [];
  for (const clusterCount of clusterCounts) {
    const folder = join(output.folder, `clusters-${clusterCount}`);
    const own = { ...options, clusterCount, output: { folder, name: output.name } };
    const { maskSet, report } = await learn(own, sharedState);
    const { kl, agreement, perplexity } = heldOutOf(maskSet, 'learned');
    rows.push({
      clusters: clusterCount,
      kl,
      agreement,
      perplexity,
      oneMask_kl: heldOutOf(maskSet, 'one-mask').kl,
      largestShare: report.routing.largestShare,
      silhouette: report.routing.silhouette,
      folder,
    });
    await writeWhole(join(output.folder, SWEEP_FILE), `${JSON.stringify({ rows }, null, 1)}\n`);
    onRow(rows.at(-1)!);
  }
  await rm(sharedState, { force: true });
  return rows;
}

function heldOutOf({ heldOut }: MaskSet, method: 'learned' | 'one-mask'): Figures {
  if (heldOut[method] !== undefined) return heldOut[method] as Figures;
  throw new MaskrouteError(
    'invalid_data',
    'No prompt is held out to compare numbers of clusters on: the data are too few.',
  );
}
