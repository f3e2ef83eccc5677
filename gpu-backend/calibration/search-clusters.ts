/** The mask of every cluster, searched on its own prompts, and what it costs on its held-out ones. */

import { MaskrouteError } from '../../shared/errors.ts';
import { openRunner } from '../engine/runner.ts';
import { openModelText } from '../model/model-text.ts';
import type { InstalledModel } from '../model/store.ts';
import type { HeldOutScores } from './held-out.ts';
import { scoreHeldOut } from './held-out.ts';
import type { LearnState } from './learn-state.ts';
import { seededRandom } from './random.ts';
import type { BlockSearch } from './rank-blocks.ts';
import { evaluationCount, maskWithout, searchBlocks } from './rank-blocks.ts';
import type { CalibrationRow } from './read-data.ts';
import type { Sample } from './samples.ts';
import { drawSamples } from './samples.ts';
import type { DenseSample, MaskScorer } from './score-mask.ts';
import { createMaskScorer } from './score-mask.ts';

export type SearchSettings = {
  readonly seed: number;
  readonly skipCount: number;
  readonly candidateCount: number;
  /** Scored positions of a cluster's search, and of its held-out figures. */
  readonly positions: number;
  readonly heldOutPositions: number;
  readonly tokensMax: number;
  readonly threads: number;
};

export type ClusterRows = {
  readonly fit: readonly CalibrationRow[];
  readonly heldOut: readonly CalibrationRow[];
};

export type ClusterResult = {
  readonly search: BlockSearch;
  /** `undefined` when no held-out prompt fell into the cluster. */
  readonly heldOut: HeldOutScores | undefined;
};

/**
 * @param state where finished searches are kept, and taken from.
 * @param onProgress evaluations done of all; those of finished clusters count as done.
 */
export async function searchClusters(
  model: InstalledModel,
  clusters: readonly ClusterRows[],
  settings: SearchSettings,
  state: LearnState,
  onProgress: (done: number, total: number) => void,
  signal?: AbortSignal,
): Promise<ClusterResult[]> {
  const { manifest, folder } = model;
  const blockCount = 2 * manifest.config.layerCount;
  const text = await openModelText(folder, manifest);
  const runner = await openRunner(folder, manifest.config, { threads: settings.threads });
  try {
    const scorer = createMaskScorer(runner);
    const draw = (rows: readonly CalibrationRow[], cluster: number, positions: number): Sample[] => {
      const random = seededRandom(settings.seed * 1000 + cluster);
      return drawSamples(rows, text, manifest.eosTokenIds[0]!, random, { ...settings, positions });
    };
    /** A cluster whose prompts are too short to score anything takes the mask that suits everybody. */
    const samplesOf = (cluster: number): Sample[] => {
      const own = draw(clusters[cluster]!.fit, cluster, settings.positions);
      if (own.length > 0) return own;
      const all = clusters.flatMap((rows) => rows.fit);
      const shared = draw(all, cluster, settings.positions);
      if (shared.length > 0) return shared;
      throw new MaskrouteError('invalid_data', 'No row is long enough to score a mask on.');
    };
    const perCluster = evaluationCount({ ...settings, blockCount });
    const results: ClusterResult[] = [];
    for (const [cluster, rows] of clusters.entries()) {
      let done = cluster * perCluster;
      const known = state.get(cluster);
      const search =
        known === undefined
          ? await searchCluster(scorer, samplesOf(cluster), {
              ...settings,
              blockCount,
              onEvaluation: () => onProgress(++done, clusters.length * perCluster),
              ...(signal === undefined ? {} : { signal }),
            })
          : { ...known, mask: maskWithout(blockCount, known.skipped) };
      if (known === undefined)
        await state.set(cluster, { alone: [...search.alone], skipped: [...search.skipped] });
      const heldOut = draw(rows.heldOut, cluster, settings.heldOutPositions);
      results.push({ search, heldOut: await scoreHeldOut(scorer, heldOut, search.mask, signal) });
    }
    return results;
  } finally {
    await runner.close();
  }
}

async function searchCluster(
  scorer: MaskScorer,
  samples: readonly Sample[],
  options: Parameters<typeof searchBlocks>[1],
): Promise<BlockSearch> {
  const references: DenseSample[] = [];
  for (const sample of samples) references.push(await scorer.dense(sample));
  return searchBlocks(async (mask) => (await scorer.score(references, mask)).kl, options);
}
