/**
 * `maskroute learn`: makes a mask set from calibration files. It reads, embeds and clusters prompts, learns one mask
 * for everybody and masks for groups of clusters, assigns masks to clusters, measures and writes. Killed and started
 * again with the same inputs, it resumes and ends with the same bytes.
 */
import { access, constants, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import {
  type Mask,
  type ModelHash,
  maskBits,
  maskId,
  sparsity,
  withSurrogates,
} from '../../shared/mask/mask.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { EncoderOptions } from '../encoder/full-encoder.ts';
import { makeFolder, tryLock, writeWhole } from '../files.ts';
import { type InstalledModel, sha256OfFiles } from '../model/store.ts';
import type { Surrogates } from '../model/surrogates.ts';
import { type Device, deviceName } from '../onnx/device.ts';
import { clusterLabel } from './data/clusters.ts';
import { checkEncoder, openEncoder } from './data/encoders.ts';
import { groupPrompts, type Prompts } from './data/prompt-groups.ts';
import { readData, requireFiles } from './data/read-data.ts';
import { distinctRows, scoredPositions, tryTemplate } from './data/samples.ts';
import { HARD_CONCRETE } from './gates/hard-concrete.ts';
import { LOSS_BATCH_TOKENS } from './gates/step-memory.ts';
import { LEARNING_RATE } from './gates/train-mask.ts';
import { contentKey, modelKey, openRunJournal, type RunJournal } from './journal.ts';
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
/** Beside the state: two runs that write it would mix their results. */
const LOCK_FILE = '.lock';
const METHOD = 'hard-concrete';
/** Part of the journal's key: raise it when the same inputs give other results. */
const PIPELINE_VERSION = 10;
/** Significant digits of a centroid's numbers: rounding is too small to move prompts to another cluster. */
const CENTROID_DIGITS = 6;

export type LearnOptions = BudgetRequest & {
  readonly model: InstalledModel;
  /** Stand-ins for skipped blocks; without, skipped blocks add nothing. */
  readonly surrogates?: Surrogates | undefined;
  readonly data: readonly string[];
  /** Rows taken from each file. */
  readonly rowsMax?: number | undefined;
  readonly clusterCount: number | 'auto';
  /** Most masks that clusters share; undefined: as many as pay off. */
  readonly maskCount?: number | undefined;
  /** Device that runs and times masks; the CPU unless given. */
  readonly device?: Device | undefined;
  readonly encoder: string;
  readonly encoderOptions: EncoderOptions;
  /** Folder for the mask set, the report, and the state of an unfinished run. */
  readonly out: string;
  /** Name of the mask set. */
  readonly name: string;
  readonly seed: number;
  readonly effort: LearnEffort;
  /** An earlier set for this model and budget, whose masks the run begins with instead of searching. */
  readonly earlier?: MaskSet | undefined;
  /** Journal file that several runs share; undefined: the journal is in `out`, and removed at the end. */
  readonly sharedState?: string | undefined;
  /** Memory that the work in this process may use; all that is available unless given. */
  readonly memory_bytes?: number | undefined;
  /** Who computes the run's units; this process unless given. */
  readonly openUnits?: OpenUnits | undefined;
  readonly onProgress: (progress: LearnProgress) => void;
  readonly signal?: AbortSignal | undefined;
};
type Settings = LearnOptions & { readonly known: EarlierMasks | undefined };

export type Learned = { readonly maskSet: MaskSet; readonly report: LearnReport };

/**
 * @throws MaskrouteError as {@link checkRun}, and `conflict` while another run learns in the folder. Rejects when `signal`
 * aborts; the state stays.
 */
export async function learn(options: LearnOptions): Promise<Learned> {
  const { earlier } = options;
  const settings: Settings = {
    ...options,
    effort: earlier === undefined ? options.effort : withoutSearch(options.effort),
    known: earlier && earlierMasks(earlier, options),
  };
  await checkRun(options);
  const state = options.sharedState ?? join(options.out, STATE_FILE);
  const folder = dirname(state);
  const unlock = tryLock(join(folder, LOCK_FILE));
  if (unlock === undefined) {
    const message = `Another run learns in ${folder}: wait for its end, or name another folder with --out.`;
    throw new MaskrouteError('conflict', message);
  }
  try {
    return await learnAlone(settings, state);
  } finally {
    unlock();
  }
}

/** `state`: the file of the run's journal. */
async function learnAlone(settings: Settings, state: string): Promise<Learned> {
  const { out, signal, onProgress, ...options } = settings;
  const groups = options.maskCount === 1 || options.clusterCount === 1 ? 1 : 2;
  onProgress({ stage: 'read', at: firstStage(1, settings.effort, groups) });
  const rows = distinctRows(await readData(options.data, options.rowsMax));
  const open = await openEncoder(options.encoder, options.encoderOptions);
  try {
    onProgress({ stage: 'embed', at: firstStage(2, settings.effort, groups) });
    const { spec } = open.encoder;
    const prompts = await groupPrompts(rows, open.encoder, options.clusterCount, settings.seed, signal);
    const { log } = settings.encoderOptions.hooks;
    const journal = await openRunJournal(state, await journalKey(settings, spec), log);
    const { masks, budget, effort } = await learnWith(settings, prompts, journal);
    const maskSet = await assemble({ ...settings, effort }, spec, prompts, masks, budget);
    const report = buildReport(maskSet, prompts, masks, budget, settings.cost);
    // Loaded lazily: the chart library loads slowly, and a run without a report does not need it.
    const { LEARN_REPORT_FILE, writeReportHtml } = await import('./report/write-report.ts');
    await writeWhole(join(out, LEARN_REPORT_FILE), `${JSON.stringify(report, null, 1)}\n`);
    await writeReportHtml(out);
    await writeWhole(join(out, MASK_SET_FILE), `${JSON.stringify(maskSet)}\n`);
    if (options.sharedState === undefined) await journal.remove();
    return { maskSet, report };
  } finally {
    await open.close();
  }
}

async function learnWith(
  settings: Settings,
  prompts: Prompts,
  journal: RunJournal,
): Promise<{ masks: LearnedMasks; budget: Budget; effort: LearnEffort }> {
  const { model, surrogates, device, encoderOptions, seed, signal, maskCount } = settings;
  const { threads } = encoderOptions;
  await using units = await (settings.openUnits ?? openLocalUnits)({
    model,
    surrogates,
    threads,
    device,
    signal,
    memory_bytes: settings.memory_bytes,
  });
  const asked = { model, surrogates, threads, device, targets: settings.effort.targets };
  const parts = await openModelParts(asked, units, journal);
  tryTemplate(prompts.clusterOf.keys(), parts.text);
  const budget = await parts.budget({ ...settings, weights: settings.known?.weights });
  const known = settings.known && masksWithin(settings.known, budget);
  const texts = createTextMaker(parts.text, model.manifest.eosTokenIds[0]!, { seed, ...settings.effort });
  const { effort, plan } = planRun(settings, prompts, texts, budget.blockWeights.length);
  const track = trackProgress(settings.onProgress, plan, () => journal.size);
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

/** The effort that the amount of text justifies, and the stages of the run. */
function planRun(
  { effort: wanted, maskCount, known: earlier }: Settings,
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
    known: earlier?.masks.length ?? 0,
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
  const { name, data, encoder, earlier, out } = options;
  checkName(name);
  await requireFiles(data);
  if (earlier !== undefined) earlierMasks(earlier, options);
  await checkEncoder(encoder);
  await makeFolder(out);
  try {
    await access(out, constants.W_OK);
  } catch (cause) {
    const message = `Nothing can be written to ${out}: ${(cause as Error).message}`;
    throw new MaskrouteError('storage_failed', message, { cause });
  }
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
async function journalKey(settings: Settings, encoder: MaskSet['encoder']): Promise<string> {
  const { model, surrogates, data, rowsMax, sparsity, cost, context, attention, ffn, effort, seed } =
    settings;
  return contentKey({
    version: PIPELINE_VERSION,
    model: modelKey(model.manifest),
    surrogates: surrogates?.id ?? null,
    data: await sha256OfFiles(data),
    names: data.map((path) => basename(path)),
    rowsMax: rowsMax ?? null,
    budget: [sparsity, cost, context ?? null, attention ?? null, ffn ?? null],
    effort,
    seed,
    encoder,
    ...(settings.known && { from: settings.known.version }),
    ...(settings.device?.kind === 'webgpu' && { device: deviceName(settings.device) }),
  });
}

/** The mask set, checked by the schema that the edge uses. @throws ZodError when the parts contradict each other. */
async function assemble(
  settings: Settings,
  encoder: MaskSet['encoder'],
  prompts: Prompts,
  masks: LearnedMasks,
  budget: Budget,
): Promise<MaskSet> {
  const { data, effort, name, surrogates, seed, cost, known } = settings;
  const { manifest } = settings.model;
  const [attention, ffn] = budget.blockWeights as [number, number];
  const clusters = clusterEntries(settings, prompts, masks);
  return maskSetSchema.parse({
    format: 'maskroute-mask-set-v1',
    name,
    model: { name: manifest.name, hash: manifest.hash, blockCount: 2 * manifest.config.layerCount },
    encoder,
    clusters,
    targetSparsity: settings.sparsity,
    reachedSparsity: clusters.reduce((sum, { share }, i) => sum + share * sparsity(maskOf(masks, i)), 0),
    surrogate: surrogates !== undefined,
    ...(surrogates === undefined ? {} : { surrogates: surrogates.id }),
    learned: {
      method: METHOD,
      constants: { ...HARD_CONCRETE, learningRate: LEARNING_RATE },
      weights: manifest.weights,
      data: data.map((path) => basename(path)),
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
    createdAt: (await newestChange(data)).toISOString(),
  });
}

function clusterEntries({ model, surrogates }: Settings, { clusters, kinds }: Prompts, masks: LearnedMasks) {
  const { centroids, dimensions, sizes } = clusters;
  const total = sizes.reduce((sum, size) => sum + size, 0);
  return masks.clusters.map((_, cluster) => ({
    centroid: Array.from(centroids.subarray(cluster * dimensions, (cluster + 1) * dimensions), (value) =>
      Number(value.toPrecision(CENTROID_DIGITS)),
    ),
    bits: maskBits(maskOf(masks, cluster)),
    mask: maskId(model.manifest.hash as ModelHash, withSurrogates(maskOf(masks, cluster), surrogates?.id)),
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
