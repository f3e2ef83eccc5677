/**
 * `maskroute learn`: calibration files to a mask set. Embed, cluster, search each cluster's blocks, measure on
 * held-out prompts, write. Killed and started again with the same inputs it goes on after the last finished
 * cluster.
 */
import { createHash } from 'node:crypto';
import { mkdir, rm } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { MaskrouteError } from '../../shared/errors.ts';
import type { EncoderSpec, MaskSet } from '../../shared/mask-set.ts';
import { canonicalJson, maskSetSchema } from '../../shared/mask-set.ts';
import type { InstalledModel } from '../model/store.ts';
import { sha256OfFiles } from '../model/store.ts';
import { writeWhole } from '../write-whole.ts';
import { assembleMaskSet } from './assemble.ts';
import type { Clusters } from './cluster.ts';
import { assignRows, clusterRows, embedRows, kindTable } from './cluster.ts';
import type { EncoderOptions } from '../encoder/full-encoder.ts';
import { openEncoder } from './encoders.ts';
import { openLearnState, STATE_FILE } from './learn-state.ts';
import { skipCountFor } from './rank-blocks.ts';
import type { CalibrationRow } from './read-data.ts';
import { readData } from './read-data.ts';
import type { LearnReport } from './report.ts';
import { buildReport, heldOutFigures } from './report.ts';
import type { ClusterResult, ClusterRows, SearchProgress, SearchSettings } from './search-clusters.ts';
import { searchClusters } from './search-clusters.ts';
import { splitRows } from './split.ts';

export const MASK_SET_FILE = 'mask-set.json';
export const REPORT_FILE = 'report.json';
const METHOD = 'rank-blocks';

const SEED = 1;
const HELD_OUT_SHARE = 0.1;

/** How much work goes into a mask; more is slower and surer. */
export type SearchEffort = {
  /** Scored positions of each cluster's search. */
  readonly positions: number;
  /** Scored positions, of other prompts of the cluster, on which its mask is chosen among all that were found. */
  readonly choicePositions: number;
  /** Scored positions of each cluster's held-out figures. */
  readonly heldOutPositions: number;
  readonly tokensMax: number;
  /** Blocks that compete at each greedy step, for each block to skip; 1: the ranking alone decides. */
  readonly candidatesPerSkip: number;
};
export const SEARCH_EFFORT: SearchEffort = {
  positions: 768,
  choicePositions: 2048,
  heldOutPositions: 1024,
  tokensMax: 160,
  candidatesPerSkip: 1.5,
};

export type LearnOptions = {
  readonly model: InstalledModel;
  readonly data: readonly string[];
  /** Rows taken from each file. */
  readonly rowsMax?: number;
  readonly clusterCount: number;
  /** Share of blocks to skip, 0 to 1. */
  readonly sparsity: number;
  readonly encoder: string;
  readonly encoderOptions: EncoderOptions;
  /** Folder for the mask set, the report, and the state of an unfinished run. */
  readonly out: string;
  /** The mask set's own name. */
  readonly name: string;
  readonly seed?: number;
  readonly effort?: SearchEffort;
  readonly onProgress: (progress: LearnProgress) => void;
  readonly signal?: AbortSignal;
};

export type LearnProgress =
  | { readonly stage: 'read' | 'embed' }
  | { readonly stage: 'search' | 'choose' | 'measure'; readonly done: number; readonly total: number };

export type Learned = { readonly maskSet: MaskSet; readonly report: LearnReport };

/** @throws MaskrouteError `invalid_request`, `invalid_data`, `invalid_encoder`. Rejects when `signal` aborts; the state stays. */
export async function learn(options: LearnOptions): Promise<Learned> {
  const { model, out, signal, onProgress, clusterCount } = options;
  checkName(options.name);
  const settings = searchSettings(options);
  onProgress({ stage: 'read' });
  const { rows } = await readData(options.data, options.rowsMax);
  await mkdir(out, { recursive: true });
  const { fit, heldOut } = splitRows(rows, HELD_OUT_SHARE);
  const open = await openEncoder(options.encoder, options.encoderOptions);
  try {
    onProgress({ stage: 'embed' });
    const encoder = open.encoder.spec;
    const clusters = await clusterRows(fit, open.encoder, clusterCount, settings.seed, signal);
    const assigned = {
      fit: clusters.assignment,
      heldOut: assignRows(await embedRows(heldOut, open.encoder, signal), clusters),
    };
    const state = await openLearnState(out, await stateKey(options, settings, encoder));
    const byCluster = Array.from({ length: clusterCount }, (_, cluster) => ({
      fit: fit.filter((_, i) => assigned.fit[i] === cluster),
      heldOut: heldOut.filter((_, i) => assigned.heldOut[i] === cluster),
    }));
    const report: SearchProgress = (stage, done, total) => onProgress({ stage, done, total });
    const results = await searchClusters(model, byCluster, settings, state, report, signal);
    const learned = finish(options, settings, encoder, clusters, byCluster, results);
    await writeWhole(join(out, REPORT_FILE), `${JSON.stringify(learned.report, null, 1)}\n`);
    await writeWhole(join(out, MASK_SET_FILE), `${JSON.stringify(learned.maskSet)}\n`);
    await rm(join(out, STATE_FILE), { force: true });
    return learned;
  } finally {
    await open.close();
  }
}

/** Before the work, not after it. */
function checkName(name: string): void {
  if (maskSetSchema.shape.name.safeParse(name).success) return;
  throw new MaskrouteError(
    'invalid_request',
    `${name} cannot name a mask set: up to 64 letters, digits, . _ -`,
  );
}

function searchSettings({ model, sparsity, seed, effort, encoderOptions }: LearnOptions): SearchSettings {
  const blockCount = 2 * model.manifest.config.layerCount;
  const skipCount = skipCountFor(blockCount, sparsity);
  const { positions, choicePositions, heldOutPositions, tokensMax, candidatesPerSkip } =
    effort ?? SEARCH_EFFORT;
  return {
    seed: seed ?? SEED,
    skipCount,
    candidateCount: Math.min(blockCount, Math.ceil(candidatesPerSkip * skipCount)),
    positions,
    choicePositions,
    heldOutPositions,
    tokensMax,
    threads: encoderOptions.threads,
  };
}

/** Everything that a cluster's search depends on, but not how many threads ran it. */
async function stateKey(
  options: LearnOptions,
  settings: SearchSettings,
  encoder: EncoderSpec,
): Promise<string> {
  const { manifest } = options.model;
  const inputs = {
    model: [manifest.hash, manifest.weights],
    data: await sha256OfFiles(options.data),
    rowsMax: options.rowsMax ?? null,
    clusterCount: options.clusterCount,
    heldOutShare: HELD_OUT_SHARE,
    settings: { ...settings, threads: null },
    encoder,
  };
  return createHash('sha256').update(canonicalJson(inputs)).digest('hex');
}

function finish(
  options: LearnOptions,
  settings: SearchSettings,
  encoder: EncoderSpec,
  clusters: Clusters,
  rows: readonly ClusterRows[],
  results: readonly ClusterResult[],
): Learned {
  const { manifest } = options.model;
  const count = (part: keyof ClusterRows) => rows.reduce((sum, group) => sum + group[part].length, 0);
  const maskSet = assembleMaskSet({
    name: options.name,
    model: { name: manifest.name, hash: manifest.hash, blockCount: 2 * manifest.config.layerCount },
    encoder,
    clusters,
    kinds: tableOf(rows.map((group) => group.fit)),
    masks: results.map(({ mask }) => mask),
    targetSparsity: options.sparsity,
    learned: {
      method: METHOD,
      weights: manifest.weights,
      data: options.data.map((path) => basename(path)),
      rows: count('fit'),
      heldOutRows: count('heldOut'),
      seed: settings.seed,
      positions: settings.positions,
      choicePositions: settings.choicePositions,
      tokensMax: settings.tokensMax,
      candidateCount: settings.candidateCount,
    },
    heldOut: heldOutFigures(METHOD, clusters.sizes, results),
    createdAt: new Date(),
  });
  const tables = {
    fit: tableOf(rows.map((group) => group.fit)),
    heldOut: tableOf(rows.map((group) => group.heldOut)),
  };
  return { maskSet, report: buildReport(maskSet, tables, results) };
}

const tableOf = (groups: readonly (readonly CalibrationRow[])[]) =>
  kindTable(
    groups.flat(),
    groups.flatMap((rows, cluster) => rows.map(() => cluster)),
    groups.length,
  );
