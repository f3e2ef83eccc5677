/** The mask of every cluster: searched on its own prompts, chosen on fresh ones, measured on held-out ones. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { Mask } from '../../shared/mask.ts';
import { openRunner } from '../engine/runner.ts';
import { openModelText } from '../model/model-text.ts';
import type { InstalledModel } from '../model/store.ts';
import type { Candidate } from './choose-masks.ts';
import { candidateMasks, lowest } from './choose-masks.ts';
import type { HeldOutScores } from './held-out.ts';
import { scoreMasks } from './held-out.ts';
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
  /** Scored positions of a cluster's search, of the choice among masks, and of its held-out figures. */
  readonly positions: number;
  readonly choicePositions: number;
  readonly heldOutPositions: number;
  readonly tokensMax: number;
  readonly threads: number;
};

export type ClusterRows = {
  readonly fit: readonly CalibrationRow[];
  readonly heldOut: readonly CalibrationRow[];
};

export type ClusterResult = {
  readonly mask: Mask;
  /** Where the mask was found: on this or another cluster's prompts, or for all. */
  readonly source: Candidate['source'];
  /** KL of each block alone, on this cluster's prompts. */
  readonly alone: readonly number[];
  /** `undefined` when no held-out prompt fell into the cluster. */
  readonly heldOut: HeldOutScores | undefined;
};

export type SearchProgress = (stage: 'search' | 'choose' | 'measure', done: number, total: number) => void;

/** What every stage needs. */
type Context = {
  readonly scorer: MaskScorer;
  readonly clusters: readonly ClusterRows[];
  readonly blockCount: number;
  readonly settings: SearchSettings;
  readonly onProgress: SearchProgress;
  readonly signal: AbortSignal | undefined;
  /** Distinct `stream`s draw distinct rows. */
  draw(rows: readonly CalibrationRow[], stream: number, positions: number): Sample[];
};

/**
 * @param state where finished searches are kept, and taken from.
 * @throws MaskrouteError `invalid_data` when there is nothing to score a mask on.
 */
export async function searchClusters(
  model: InstalledModel,
  clusters: readonly ClusterRows[],
  settings: SearchSettings,
  state: LearnState,
  onProgress: SearchProgress,
  signal?: AbortSignal,
): Promise<ClusterResult[]> {
  const { manifest, folder } = model;
  const text = await openModelText(folder, manifest);
  const runner = await openRunner(folder, manifest.config, { threads: settings.threads });
  try {
    const context: Context = {
      ...{ clusters, settings, onProgress, signal },
      scorer: createMaskScorer(runner),
      blockCount: 2 * manifest.config.layerCount,
      draw(rows, stream, positions) {
        const random = seededRandom(settings.seed * 1_000_000 + stream);
        return drawSamples(rows, text, manifest.eosTokenIds[0]!, random, { ...settings, positions });
      },
    };
    const searches = await searchAll(context, state);
    const chosen = await chooseAll(context, searches);
    return await measureAll(context, searches, chosen);
  } finally {
    await runner.close();
  }
}

async function searchAll(context: Context, state: LearnState): Promise<BlockSearch[]> {
  const { blockCount, clusters, settings, onProgress, signal } = context;
  const perCluster = evaluationCount({ ...settings, blockCount });
  const searches: BlockSearch[] = [];
  for (const cluster of clusters.keys()) {
    let done = cluster * perCluster;
    const known = state.get(cluster);
    if (known !== undefined) {
      searches.push({ ...known, mask: maskWithout(blockCount, known.skipped) });
      continue;
    }
    const references: DenseSample[] = [];
    for (const sample of ownSamples(context, cluster, 0, settings.positions)) {
      references.push(await context.scorer.dense(sample));
    }
    const search = await searchBlocks(async (mask) => (await context.scorer.score(references, mask)).kl, {
      ...settings,
      blockCount,
      onEvaluation: () => onProgress('search', ++done, clusters.length * perCluster),
      ...(signal === undefined ? {} : { signal }),
    });
    await state.set(cluster, { alone: [...search.alone], skipped: [...search.skipped] });
    searches.push(search);
  }
  return searches;
}

async function chooseAll(context: Context, searches: readonly BlockSearch[]): Promise<Candidate[]> {
  const { clusters, settings, onProgress, scorer, signal } = context;
  const sizes = clusters.map(({ fit }) => fit.length);
  const candidates = candidateMasks(searches, sizes);
  const masks = candidates.map(({ mask }) => mask);
  const chosen: Candidate[] = [];
  for (const cluster of clusters.keys()) {
    const samples = ownSamples(context, cluster, 1, settings.choicePositions);
    const scores = await scoreMasks(scorer, samples, masks, () => {}, signal);
    chosen.push(candidates[lowest(scores!.map(({ kl }) => kl))]!);
    onProgress('choose', cluster + 1, clusters.length);
  }
  return chosen;
}

async function measureAll(
  context: Context,
  searches: readonly BlockSearch[],
  chosen: readonly Candidate[],
): Promise<ClusterResult[]> {
  const { clusters, settings, onProgress, scorer, signal } = context;
  const results: ClusterResult[] = [];
  for (const [cluster, { mask, source }] of chosen.entries()) {
    const samples = context.draw(clusters[cluster]!.heldOut, 3 * cluster + 2, settings.heldOutPositions);
    const scores = await scoreMasks(scorer, samples, [mask], () => {}, signal);
    results.push({ mask, source, alone: searches[cluster]!.alone, heldOut: scores?.[0] });
    onProgress('measure', cluster + 1, clusters.length);
  }
  return results;
}

/** A cluster whose prompts are too short to score anything goes by everybody's. */
function ownSamples(context: Context, cluster: number, part: 0 | 1, positions: number): Sample[] {
  const stream = 3 * cluster + part;
  const own = context.draw(context.clusters[cluster]!.fit, stream, positions);
  if (own.length > 0) return own;
  const all = context.draw(
    context.clusters.flatMap((rows) => rows.fit),
    stream,
    positions,
  );
  if (all.length > 0) return all;
  throw new MaskrouteError('invalid_data', 'No row is long enough to score a mask on.');
}
