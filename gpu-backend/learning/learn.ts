/**
 * `maskroute learn`: makes a mask set from calibration files. It reads, embeds and clusters prompts, learns one mask
 * for everybody and masks for groups of clusters, assigns masks to clusters, measures and writes. Killed and started
 * again with the same inputs, it resumes and ends with the same bytes.
 */
import { stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { type Mask, maskBits, maskId, sparsity, withSurrogates } from '../../shared/mask/mask.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { makeOutFolder, writeWhole } from '../files.ts';
import { sumOf } from '../measure.ts';
import type { ImportHooks } from '../model/model-source.ts';
import { type InstalledModel, sha256OfFiles } from '../model/store.ts';
import type { Surrogates } from '../model/surrogates.ts';
import { type Device, deviceName } from '../onnx/device.ts';
import { clusterLabel } from './data/clusters.ts';
import { checkEncoder, openEncoder } from './data/encoders.ts';
import { groupPrompts, type Prompts } from './data/prompt-groups.ts';
import { type DataFiles, readDistinct, requireFiles } from './data/read-data.ts';
import { scoredPositions, tryTemplate } from './data/samples.ts';
import { HARD_CONCRETE } from './gates/hard-concrete.ts';
import { fastestRounding, ROUNDINGS, type Rounding } from './gates/rounding.ts';
import { LOSS_BATCH_TOKENS } from './gates/step-memory.ts';
import { LEARNING_RATE } from './gates/train-mask.ts';
import { contentKey, modelKey, openRunJournal, type RunJournal, resultIn, withOutput } from './journal.ts';
import type { Budget, BudgetRequest } from './search/budget.ts';
import { type EarlierMasks, earlierMasks, masksWithin } from './search/earlier-set.ts';
import { effortFor, fullText, type LearnEffort, withoutSearch } from './search/effort.ts';
import { type LearnedMasks, learnMasks } from './search/learn-masks.ts';
import { buildReport, heldOutFigures, type LearnReport } from './search/learn-report.ts';
import { openModelParts } from './search/model-parts.ts';
import { firstStage, type LearnProgress, planStages, trackProgress } from './search/progress.ts';
import { createTextMaker, type TextMaker } from './search/texts.ts';
import { createWorkbench } from './search/workbench.ts';
import { openLocalUnits } from './units/unit-computer.ts';
import type { OpenUnits } from './units/units.ts';

export type { LearnProgress } from './search/progress.ts';

export const MASK_SET_FILE = 'mask-set.json';
export const STATE_FILE = 'state.jsonl';
const METHOD = 'hard-concrete';
/** Part of the journal's key: raise it when the same inputs give other results. */
const PIPELINE_VERSION = 12;
/** Significant digits of a centroid's numbers: rounding is too small to move prompts to another cluster. */
const CENTROID_DIGITS = 6;

export type LearnOptions = {
  readonly model: InstalledModel;
  /** Surrogates of skipped blocks; without, skipped blocks add nothing. */
  readonly surrogates?: Surrogates | undefined;
  readonly data: DataFiles;
  /** Name of what embeds prompts, as {@link openEncoder} takes it. */
  readonly encoder: string;
  readonly clusterCount: number | 'auto';
  readonly budget: BudgetRequest;
  readonly search: SearchOptions;
  readonly machine: Machine;
  readonly output: Output;
  readonly seed: number;
  readonly hooks: LearnHooks;
};

type SearchOptions = {
  readonly effort: LearnEffort;
  /** Most masks that clusters share; undefined: as many as pay off. */
  readonly maskCount?: number | undefined;
  /** An earlier set for this model and budget, whose masks the run begins with instead of searching. */
  readonly earlier?: MaskSet | undefined;
};

/** Where the run computes. */
type Machine = {
  /** Home folder, which keeps downloaded encoders. */
  readonly home: string;
  readonly threads: number;
  /** Device that runs and times masks; the CPU unless given. */
  readonly device?: Device | undefined;
  /** Memory that the work in this process may use; all that is available unless given. */
  readonly memory_bytes?: number | undefined;
  /** Who computes the run's units; this process unless given. */
  readonly openUnits?: OpenUnits | undefined;
};

type Output = {
  /** For the mask set, the report, and the state of an unfinished run. */
  readonly folder: string;
  /** Name of the mask set. */
  readonly name: string;
};

type LearnHooks = {
  readonly onProgress: (progress: LearnProgress) => void;
  readonly onDownload: ImportHooks['onProgress'];
  /** Gets lines for the user. */
  readonly log: (line: string) => void;
  readonly signal?: AbortSignal | undefined;
};

type Settings = LearnOptions & { readonly known: EarlierMasks | undefined };

export type Learned = { readonly maskSet: MaskSet; readonly report: LearnReport };

/**
 * @param sharedState journal file that several runs share, one after the other; without, the journal is in the output
 * folder, and removed at the end.
 * @throws MaskrouteError as {@link checkRun}, and `conflict` while another run writes the folder. Rejects when the
 * hooks' `signal` aborts; the state stays.
 */
export async function learn(options: LearnOptions, sharedState?: string): Promise<Learned> {
  const known = knownMasks(options);
  const { effort } = options.search;
  const search = { ...options.search, effort: known === undefined ? effort : withoutSearch(effort) };
  await checkRun(options);
  const { folder } = options.output;
  const journal = { path: sharedState ?? join(folder, STATE_FILE), isShared: sharedState !== undefined };
  return await withOutput(folder, () => learnAlone({ ...options, search, known }, journal));
}

async function learnAlone(
  settings: Settings,
  { path, isShared }: { readonly path: string; readonly isShared: boolean },
): Promise<Learned> {
  const { data, encoder, clusterCount, seed, machine } = settings;
  const { folder } = settings.output;
  const { onProgress, onDownload, log, signal } = settings.hooks;
  const { effort, maskCount } = settings.search;
  const groups = maskCount === 1 || clusterCount === 1 ? 1 : 2;
  onProgress({ stage: 'read', at: firstStage(1, effort, groups) });
  const rows = await readDistinct(data, { log, signal });
  const dataHash = await sha256OfFiles(data.files);
  const { home, threads } = machine;
  const open = await openEncoder(encoder, { home, threads, hooks: { onProgress: onDownload, log, signal } });
  try {
    onProgress({ stage: 'embed', at: firstStage(2, effort, groups) });
    const { spec } = open.encoder;
    const prompts = await groupPrompts(rows, open.encoder, clusterCount, seed, signal);
    const journal = await openRunJournal(path, await journalKey(settings, spec, dataHash), log);
    const found = await learnWith(settings, prompts, journal);
    const maskSet = await assemble(settings, spec, dataHash, prompts, found);
    const report = buildReport(maskSet, prompts, found.masks, found.budget, settings.budget.cost);
    // Loaded lazily: the chart library loads slowly, and a run without a report does not need it.
    const { LEARN_REPORT_FILE, writeLearnPage } = await import('./report/write-report.ts');
    await writeWhole(join(folder, LEARN_REPORT_FILE), `${JSON.stringify(report, null, 1)}\n`);
    await writeLearnPage(folder, report);
    await writeWhole(join(folder, MASK_SET_FILE), `${JSON.stringify(maskSet)}\n`);
    if (!isShared) await journal.remove();
    return { maskSet, report };
  } finally {
    await open.close();
  }
}

/** `effort`: what the amount of text justified. */
type Found = { readonly masks: LearnedMasks; readonly budget: Budget; readonly effort: LearnEffort };

async function learnWith(settings: Settings, prompts: Prompts, journal: RunJournal): Promise<Found> {
  const { model, surrogates, seed } = settings;
  const { maskCount, effort: wanted } = settings.search;
  const { signal, onProgress } = settings.hooks;
  const { threads, device, memory_bytes, openUnits = openLocalUnits } = settings.machine;
  const rounding = await roundingOf(journal);
  await using units = await openUnits({ model, surrogates, threads, rounding, device, memory_bytes, signal });
  const asked = { model, surrogates, threads, device, targets: wanted.targets };
  const parts = await openModelParts(asked, units, journal);
  tryTemplate(prompts.clusterOf.keys(), parts.text);
  const budget = await parts.budget(settings.budget, settings.known?.weights);
  const known = settings.known && masksWithin(settings.known, budget);
  const { contextTokens } = model.manifest.config;
  const sampling = { seed, contextTokens, ...wanted };
  const texts = createTextMaker(parts.text, model.manifest.eosTokenIds[0]!, sampling);
  const { effort, plan } = planRun(settings, prompts, texts, budget.blockWeights.length);
  const track = trackProgress(onProgress, plan, () => journal.size);
  const { loss, step } = parts;
  const { onResult } = track;
  const bench = createWorkbench({ budget, journal, seed, signal, texts, loss, step, onResult });
  const score: typeof parts.score = (sample, masks) => {
    signal?.throwIfAborted();
    return parts.score(sample, masks);
  };
  const masks = await learnMasks({
    bench,
    prompts,
    texts,
    effort,
    known,
    maskCount,
    score,
    track,
    atOnce: units.atOnce,
  });
  return { masks, budget, effort };
}

const ROUNDING = 'rounding';

/** How the run rounds: fastest on the machine that began it, and the same on each that goes on with it. */
async function roundingOf(journal: RunJournal): Promise<Rounding> {
  const [index] = await journal.result(ROUNDING, async () => [ROUNDINGS.indexOf(await fastestRounding())]);
  return ROUNDINGS[index!]!;
}

/** How a run into `folder` will round, if it goes on with what is there. */
export async function roundingIn(folder: string): Promise<Rounding> {
  const [index] = (await resultIn(join(folder, STATE_FILE), ROUNDING)) ?? [];
  return index === undefined ? await fastestRounding() : ROUNDINGS[index]!;
}

/** The effort that the amount of text justifies, and the stages of the run. */
function planRun(
  { search: { effort: wanted, maskCount }, known }: Settings,
  { everybody, clusters }: Prompts,
  texts: TextMaker,
  blocks: number,
) {
  const found = texts.draw('effort', everybody.search, fullText(wanted));
  const positions = found.reduce((sum, { sample }) => sum + scoredPositions(sample), 0);
  const tokens = found.reduce((sum, { sample }) => sum + sample.tokenIds.length, 0);
  const effort = effortFor(wanted, positions);
  const plan = planStages(effort, {
    blocks,
    groups: Math.min(maskCount ?? effort.masksMax, clusters.sizes.length),
    known: known?.masks.length ?? 0,
    batchTokens: Math.min(LOSS_BATCH_TOKENS, tokens),
    shareRows: texts.draw('share', everybody.choice, effort.sharePositions).length,
    composeRows: texts.draw('compose', everybody.search, effort.compose.positions).length,
    heldOutRows: texts.draw('held-out', everybody.heldOut, effort.heldOutPositions).length,
    rowTokens: tokens / Math.max(1, found.length),
  });
  return { effort, plan };
}

/**
 * Checks a run's inputs and its output folder before the work begins.
 * @throws MaskrouteError `invalid_request`, `invalid_data`, `invalid_argument`, `invalid_encoder`, `storage_failed`.
 */
export async function checkRun(options: Omit<LearnOptions, 'clusterCount'>): Promise<void> {
  const { folder, name } = options.output;
  checkName(name);
  await requireFiles(options.data.files);
  knownMasks(options);
  await checkEncoder(options.encoder);
  await makeOutFolder(folder);
}

/** The masks to begin with, if any. @throws MaskrouteError `invalid_request`. */
function knownMasks({ model, surrogates, budget, search }: Omit<LearnOptions, 'clusterCount'>) {
  const { earlier } = search;
  return earlier && earlierMasks(earlier, { model, surrogates, cost: budget.cost });
}

function checkName(name: string): void {
  if (maskSetSchema.shape.name.safeParse(name).success) return;
  throw new MaskrouteError(
    'invalid_request',
    `${name} cannot name a mask set: up to 64 letters, digits, . _ -`,
  );
}

/**
 * Everything that results depend on except the clusters, which are part of the results' names. The number of threads
 * changes no bit.
 */
async function journalKey(
  settings: Settings,
  encoder: MaskSet['encoder'],
  dataHash: string,
): Promise<string> {
  const { model, surrogates, data, seed, known } = settings;
  const { sparsity, cost, context, attention, ffn } = settings.budget;
  const { effort } = settings.search;
  const { device } = settings.machine;
  return contentKey({
    version: PIPELINE_VERSION,
    model: modelKey(model.manifest),
    surrogates: surrogates?.id ?? null,
    data: dataHash,
    names: data.files.map((path) => basename(path)),
    rowsMax: data.rowsMax ?? null,
    budget: [sparsity, cost, context ?? null, attention ?? null, ffn ?? null],
    effort,
    seed,
    encoder,
    ...(known && { from: known.version }),
    ...(device?.kind === 'webgpu' && { device: deviceName(device) }),
  });
}

/** The mask set, checked by the schema that the edge uses. @throws ZodError when the parts contradict each other. */
async function assemble(
  settings: Settings,
  encoder: MaskSet['encoder'],
  dataHash: string,
  prompts: Prompts,
  { masks, budget, effort }: Found,
): Promise<MaskSet> {
  const { surrogates, seed, known } = settings;
  const { files } = settings.data;
  const { sparsity: targetSparsity, cost } = settings.budget;
  const { manifest } = settings.model;
  const [attention, ffn] = budget.blockWeights as [number, number];
  const clusters = clusterEntries(settings, prompts, masks);
  return maskSetSchema.parse({
    format: 'maskroute-mask-set-v1',
    name: settings.output.name,
    model: { name: manifest.name, hash: manifest.hash, blockCount: 2 * manifest.config.layerCount },
    encoder,
    clusters,
    targetSparsity,
    reachedSparsity: clusters.reduce((sum, { share }, i) => sum + share * sparsity(maskOf(masks, i)), 0),
    surrogate: surrogates !== undefined,
    ...(surrogates === undefined ? {} : { surrogates: surrogates.id }),
    learned: {
      method: METHOD,
      constants: { ...HARD_CONCRETE, learningRate: LEARNING_RATE },
      weights: manifest.weights,
      data: files.map((path) => basename(path)),
      dataHash,
      rows: prompts.rows.fit,
      heldOutRows: prompts.rows.heldOut,
      seed,
      cost,
      blockWeights: { attention, ffn },
      effort,
      oneMask: maskBits(masks.masks[0]!.mask),
      ...(known && { from: known.version }),
      ...routingRecord(masks),
    },
    heldOut: heldOutFigures(masks, prompts),
    createdAt: (await newestChange(files)).toISOString(),
  });
}

function clusterEntries({ model, surrogates }: Settings, { clusters, kinds }: Prompts, masks: LearnedMasks) {
  const { centroids, dimensions, sizes } = clusters;
  const total = sumOf(sizes);
  return masks.clusters.map((_, cluster) => ({
    centroid: Array.from(centroids.subarray(cluster * dimensions, (cluster + 1) * dimensions), (value) =>
      Number(value.toPrecision(CENTROID_DIGITS)),
    ),
    bits: maskBits(maskOf(masks, cluster)),
    mask: maskId(model.manifest.hash, withSurrogates(maskOf(masks, cluster), surrogates?.id)),
    share: sizes[cluster]! / total,
    label: clusterLabel(kinds.fit, cluster),
  }));
}

const maskOf = ({ masks, clusters }: LearnedMasks, cluster: number): Mask => masks[clusters[cluster]!]!.mask;

/**
 * The routing part of a set's record: how many masks the clusters share, why there is only one, and the lighter masks
 * that let `evaluate` express routing's gain in blocks.
 */
function routingRecord({ masks, sharing, lighter }: LearnedMasks) {
  if (sharing === undefined) return {};
  return {
    masks: masks.length,
    ...(sharing.reason === null ? {} : { oneMaskReason: sharing.reason }),
    ...(lighter.length === 0 ? {} : { lighterMasks: lighter.map(maskBits) }),
  };
}

/** The newest modification time of the data is the set's date: the clock would make equal runs differ. */
async function newestChange(paths: readonly string[]): Promise<Date> {
  const changes = await Promise.all(paths.map(async (path) => (await stat(path)).mtimeMs));
  return new Date(Math.max(...changes));
}
