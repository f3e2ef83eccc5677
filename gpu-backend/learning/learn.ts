/**
 * `maskroute learn`: calibration files to a mask set. Read, embed, cluster, learn one mask, learn each cluster's,
 * choose, measure, write. Killed and started again with the same inputs it goes on where it was, to the same bytes.
 */

import { mkdir, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { MaskrouteError } from '../../shared/errors.ts';
import {
  type Mask,
  type ModelHash,
  maskBits,
  maskId,
  type SurrogatesId,
  sparsity,
  withSurrogates,
} from '../../shared/mask.ts';
import { type EncoderSpec, type MaskSet, maskSetSchema } from '../../shared/mask-set.ts';
import type { EncoderOptions } from '../encoder/full-encoder.ts';
import { type InstalledModel, sha256OfFiles } from '../model/store.ts';
import type { Surrogates } from '../model/surrogates.ts';
import { writeWhole } from '../write-whole.ts';
import { type Clusters, clusterLabel, type KindTable } from './data/clusters.ts';
import { openEncoder } from './data/encoders.ts';
import { groupPrompts, type Prompts } from './data/prompts.ts';
import { readData } from './data/read-data.ts';
import { distinctRows } from './data/samples.ts';
import { HARD_CONCRETE } from './gates/hard-concrete.ts';
import { contentKey, openRunJournal, type RunJournal } from './journal.ts';
import { writeReportHtml } from './report/write-report.ts';
import type { Budget, CountRange } from './search/budget.ts';
import { type BlockCost, LEARN_EFFORT, type LearnEffort } from './search/effort.ts';
import { type LearnedMasks, learnMasks, type MaskStage } from './search/learn-masks.ts';
import { buildReport, heldOutFigures, type LearnReport } from './search/learn-report.ts';
import { openModelParts } from './search/model-parts.ts';
import { createTextMaker } from './search/texts.ts';
import { createWorkbench, STEP_PARTS } from './search/workbench.ts';

/* Clusters and their masks as a mask set, checked by the schema that the edge will check it by. */

/** Digits of a centroid's numbers: far below what moves a prompt to another cluster. */
const CENTROID_DIGITS = 6;

export type MaskSetParts = {
  readonly name: string;
  readonly model: MaskSet['model'];
  readonly encoder: EncoderSpec;
  readonly clusters: Clusters;
  readonly kinds: KindTable;
  /** One a cluster. */
  readonly masks: readonly Mask[];
  /** The table that the masks were learned with. */
  readonly surrogates?: SurrogatesId;
  readonly targetSparsity: number;
  readonly learned: MaskSet['learned'];
  readonly heldOut: MaskSet['heldOut'];
  readonly createdAt: Date;
};

/** @throws ZodError when the parts contradict each other. */
export function assembleMaskSet(parts: MaskSetParts): MaskSet {
  const { clusters, encoder, masks, model, surrogates } = parts;
  const total = clusters.sizes.reduce((sum, size) => sum + size, 0);
  const entries = masks.map((mask, cluster) => ({
    centroid: Array.from(
      clusters.centroids.subarray(cluster * encoder.dimensions, (cluster + 1) * encoder.dimensions),
      (value) => Number(value.toPrecision(CENTROID_DIGITS)),
    ),
    bits: maskBits(mask),
    mask: maskId(model.hash as ModelHash, withSurrogates(mask, surrogates)),
    share: clusters.sizes[cluster]! / total,
    label: clusterLabel(parts.kinds, cluster),
  }));
  return maskSetSchema.parse({
    format: 'maskroute-mask-set-v1',
    name: parts.name,
    model,
    encoder,
    clusters: entries,
    targetSparsity: parts.targetSparsity,
    reachedSparsity: entries.reduce((sum, { share }, i) => sum + share * sparsity(masks[i]!), 0),
    surrogate: surrogates !== undefined,
    ...(surrogates === undefined ? {} : { surrogates }),
    learned: parts.learned,
    heldOut: parts.heldOut,
    createdAt: parts.createdAt.toISOString(),
  });
}

/* Where a run is: results of each stage against the most that it can come to. A stage that ends early jumps ahead. */

export type LearnProgress =
  | { readonly stage: 'read' | 'embed' }
  | {
      readonly stage: MaskStage;
      readonly done: number;
      readonly total: number;
      /** The cluster that is worked on. */
      readonly cluster: number | undefined;
    };

/** Draws and counts tried after learning gates, and masks that a choice compares at most beside other clusters'. */
const GATE_RESULTS = 11;
const CHOICE_RESULTS = 6;

export function trackProgress(
  onProgress: (progress: LearnProgress) => void,
  effort: LearnEffort,
  clusterCount: number,
  budget: Budget,
) {
  const blocks = budget.blockWeights.length;
  const rounds = ({ rounds, exchanges }: LearnEffort['cluster']) => rounds * (blocks + exchanges + 1);
  const search = (one: LearnEffort['cluster']) =>
    blocks + 2 + STEP_PARTS * one.gateSteps + GATE_RESULTS + one.exchanges + rounds(one);
  const perStep: Record<MaskStage, number> = {
    'one mask': search(effort.one) + rounds(effort.one) + effort.one.greedyEvaluations + CHOICE_RESULTS,
    masks: search(effort.cluster) + effort.cluster.exchanges,
    choose: CHOICE_RESULTS + clusterCount,
    measure: 1,
  };
  let at = { stage: 'one mask' as MaskStage, cluster: undefined as number | undefined, done: 0 };
  const report = () => {
    const { stage, cluster } = at;
    const size = perStep[stage];
    const done = (cluster ?? 0) * size + Math.min(at.done, size);
    onProgress({ stage, done, total: size * (cluster === undefined ? 1 : clusterCount), cluster });
  };
  return {
    onStage(stage: MaskStage, cluster?: number) {
      at = { stage, cluster, done: 0 };
      report();
    },
    onResult() {
      at.done++;
      report();
    },
  };
}

export const MASK_SET_FILE = 'mask-set.json';
export const REPORT_FILE = 'report.json';
export const STATE_FILE = 'state.jsonl';
const METHOD = 'hard-concrete';
/** Part of the journal's key: raise it when the same inputs come to other results. */
const PIPELINE_VERSION = 4;
const SEED = 1;

export type LearnOptions = {
  readonly model: InstalledModel;
  /** Stand in for skipped blocks; holes without. */
  readonly surrogates?: Surrogates | undefined;
  readonly data: readonly string[];
  /** Rows taken from each file. */
  readonly rowsMax?: number | undefined;
  readonly clusterCount: number | 'auto';
  /** Share of the blocks, or of their time, to leave out, in (0, 1). */
  readonly sparsity: number;
  readonly cost?: BlockCost | undefined;
  /** How many blocks of a kind may be left out. */
  readonly attention?: CountRange | undefined;
  readonly ffn?: CountRange | undefined;
  readonly encoder: string;
  readonly encoderOptions: EncoderOptions;
  /** Folder for the mask set, the report, and the state of an unfinished run. */
  readonly out: string;
  /** The mask set's own name. */
  readonly name: string;
  readonly seed?: number | undefined;
  readonly effort?: LearnEffort | undefined;
  /** Where an unfinished run is kept; in `out`, and removed at the end, unless several runs share one. */
  readonly sharedState?: string | undefined;
  readonly onProgress: (progress: LearnProgress) => void;
  readonly signal?: AbortSignal | undefined;
};

export type Learned = { readonly maskSet: MaskSet; readonly report: LearnReport };

/** @throws MaskrouteError `invalid_request`, `invalid_data`, `invalid_encoder`. Rejects when `signal` aborts; the state stays. */
export async function learn(options: LearnOptions): Promise<Learned> {
  const { out, signal, onProgress } = options;
  checkName(options.name);
  onProgress({ stage: 'read' });
  const rows = distinctRows((await readData(options.data, options.rowsMax)).rows);
  await mkdir(out, { recursive: true });
  const open = await openEncoder(options.encoder, options.encoderOptions);
  try {
    onProgress({ stage: 'embed' });
    const seed = options.seed ?? SEED;
    const prompts = await groupPrompts(rows, open.encoder, options.clusterCount, seed, signal);
    const key = await journalKey(options, open.encoder.spec);
    const journal = await openRunJournal(options.sharedState ?? join(out, STATE_FILE), key);
    const { masks, budget } = await learnWith(options, prompts, journal);
    const learned = assemble(
      options,
      open.encoder.spec,
      prompts,
      masks,
      budget,
      await newestChange(options.data),
    );
    await writeWhole(join(out, REPORT_FILE), `${JSON.stringify(learned.report, null, 1)}\n`);
    await writeReportHtml(out);
    await writeWhole(join(out, MASK_SET_FILE), `${JSON.stringify(learned.maskSet)}\n`);
    if (options.sharedState === undefined) await journal.remove();
    return learned;
  } finally {
    await open.close();
  }
}

async function learnWith(
  options: LearnOptions,
  prompts: Prompts,
  journal: RunJournal,
): Promise<{ masks: LearnedMasks; budget: Budget }> {
  const { model, surrogates, signal } = options;
  const effort = options.effort ?? LEARN_EFFORT;
  const seed = options.seed ?? SEED;
  await using parts = await openModelParts(
    model,
    surrogates,
    { threads: options.encoderOptions.threads, targets: effort.targets },
    journal,
  );
  const budget = await parts.budget(options);
  const texts = createTextMaker(parts.text, model.manifest.eosTokenIds[0]!, parts.teacher, {
    seed,
    ...effort,
  });
  const progress = trackProgress(options.onProgress, effort, prompts.groups.length, budget);
  const { loss, step } = parts;
  const bench = createWorkbench({
    ...{ budget, journal, seed, signal, texts, loss, step },
    onResult: progress.onResult,
  });
  const measure = parts.measure;
  const { onStage } = progress;
  return { masks: await learnMasks({ bench, prompts, texts, effort, measure, onStage }), budget };
}

/** Before the work, not after it. */
function checkName(name: string): void {
  if (maskSetSchema.shape.name.safeParse(name).success) return;
  throw new MaskrouteError(
    'invalid_request',
    `${name} cannot name a mask set: up to 64 letters, digits, . _ -`,
  );
}

/** A set is as old as the newest of its data: the clock would make equal runs differ. */
async function newestChange(paths: readonly string[]): Promise<Date> {
  const changes = await Promise.all(paths.map(async (path) => (await stat(path)).mtimeMs));
  return new Date(Math.max(...changes));
}

/** Everything that results depend on but the clusters, which their names tell; how many threads compute them does not change a bit. */
async function journalKey(options: LearnOptions, encoder: MaskSet['encoder']): Promise<string> {
  const { manifest } = options.model;
  const inputs = {
    version: PIPELINE_VERSION,
    model: [manifest.hash, manifest.weights],
    surrogates: options.surrogates?.id ?? null,
    data: await sha256OfFiles(options.data),
    names: options.data.map((path) => basename(path)),
    rowsMax: options.rowsMax ?? null,
    budget: [options.sparsity, options.cost ?? 'blocks', options.attention ?? null, options.ffn ?? null],
    effort: options.effort ?? LEARN_EFFORT,
    seed: options.seed ?? SEED,
    encoder,
  };
  return contentKey(inputs);
}

function assemble(
  options: LearnOptions,
  encoder: MaskSet['encoder'],
  prompts: Prompts,
  masks: LearnedMasks,
  budget: Budget,
  createdAt: Date,
): Learned {
  const { manifest } = options.model;
  const { clusters, kinds, rows } = prompts;
  const effort = options.effort ?? LEARN_EFFORT;
  const cost = options.cost ?? 'blocks';
  const [attention, ffn] = budget.blockWeights as [number, number];
  const maskSet = assembleMaskSet({
    name: options.name,
    model: { name: manifest.name, hash: manifest.hash, blockCount: 2 * manifest.config.layerCount },
    ...{ encoder, clusters, createdAt },
    kinds: kinds.fit,
    masks: masks.clusters.map(({ mask }) => mask),
    ...(options.surrogates === undefined ? {} : { surrogates: options.surrogates.id }),
    targetSparsity: options.sparsity,
    learned: {
      method: METHOD,
      constants: { ...HARD_CONCRETE },
      weights: manifest.weights,
      data: options.data.map((path) => basename(path)),
      rows: rows.fit,
      heldOutRows: rows.heldOut,
      seed: options.seed ?? SEED,
      ...{ cost, blockWeights: { attention, ffn } },
      effort: effort as unknown as MaskSet['learned'][string],
      oneMask: maskBits(masks.one.mask),
    },
    heldOut: heldOutFigures(masks.heldOut, prompts),
  });
  return { maskSet, report: buildReport(maskSet, prompts, masks, budget, cost) };
}
