/**
 * `model pull`, `list`, `show` and `surrogates` as plain functions. `pull` also installs the project's surrogates into the
 * default model.
 */
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { unreadable } from '../files.ts';
import {
  describeLocal,
  findImported,
  importModel,
  isHeldSo,
  type LocalModel,
  type Weights,
} from '../model/import-model.ts';
import { type ImportHooks, isCalibrated, type WeightKind } from '../model/model-source.ts';
import {
  DEFAULT_MODEL,
  DEFAULT_MODEL_HASH,
  fetchModel,
  nameOfSpec,
  parseModelSpec,
  remoteSourceOf,
} from '../model/sources/resolve.ts';
import {
  type InstalledModel,
  listInstalled,
  openInstalled,
  recoverStore,
  sha256OfFiles,
  verifyInstalled,
  withScratch,
  withStoreLock,
} from '../model/store.ts';
import { installSurrogates, surrogatesIdOf } from '../model/surrogates.ts';

type PullOptions = ImportHooks & {
  readonly home: string;
  readonly weights: WeightKind;
  /** Imports even when the model is installed already, or another one has its name. */
  readonly force?: boolean;
  /** Files of calibration text; without them the model writes its own text. */
  readonly data?: readonly string[];
};

/** Hooks of functions that may wait for another import. */
type WaitHooks = Pick<ImportHooks, 'log' | 'signal'>;

/**
 * Installs a model. With `q8` it has the plain name; others are named `<name>-q4`, `<name>-q8-columns` and `<name>-f32`.
 * Does nothing when the same model is installed already, and replaces an older one from the same place. A name that belongs
 * to a model from elsewhere is refused before a download.
 * @throws MaskrouteError `download_failed`, `corrupt_model`, `unsupported_model`, `not_found`, `invalid_request`,
 * `conflict` when the name belongs to a model from elsewhere, `storage_failed`, `cancelled`.
 */
export async function pullModel(specText: string, options: PullOptions): Promise<InstalledModel> {
  try {
    return await pull(specText, options);
  } catch (error) {
    if (options.signal?.aborted && !(error instanceof MaskrouteError)) {
      throw new MaskrouteError('cancelled', 'Stopped; nothing was installed.', { cause: error });
    }
    throw refusedByDisk('The import failed at the disk', error);
  }
}

const DISK_ERRORS = new Set(['ENOSPC', 'EDQUOT', 'EFBIG', 'EACCES', 'EPERM', 'EROFS', 'EIO', 'ENOTDIR']);

/** An error of the disk as `storage_failed`; any other error as it is. `what`: what failed, as the begin of the message. */
function refusedByDisk(what: string, error: unknown): unknown {
  const { code, message } = error as NodeJS.ErrnoException;
  if (code === undefined || !DISK_ERRORS.has(code)) return error;
  return new MaskrouteError('storage_failed', `${what}: ${message}`, { cause: error });
}

async function pull(specText: string, options: PullOptions): Promise<InstalledModel> {
  const { home, weights, force = false, data = [] } = options;
  if (data.length > 0 && !isCalibrated(weights)) {
    const message = 'Only q4 and q8-columns are calibrated on text: --data needs one of them as --weights.';
    throw new MaskrouteError('invalid_request', message);
  }
  const spec = await parseModelSpec(specText);
  const plainName = nameOfSpec(spec);
  const name = weights === 'q8' ? plainName : `${plainName}-${weights}`;
  const given = isCalibrated(weights) ? await originOf(data) : undefined;
  const asWanted = (model: InstalledModel | undefined, origin: string | undefined) =>
    model && !force && isHeldSo(model.manifest, weights, origin) ? model : undefined;
  // Every start asks for the default model: when it is installed, from whichever source, neither the network nor the
  // lock is needed.
  const present = async () =>
    spec.kind === 'default'
      ? asWanted(await openInstalled(home, name).catch(() => undefined), given)
      : undefined;
  const imported = async () => {
    const remote = force ? undefined : remoteSourceOf(spec);
    if (remote !== undefined) await requireOwnName(home, name, remote);
    const local = await fetchModel(spec, home, options);
    const isPlain =
      isCalibrated(weights) &&
      data.length === 0 &&
      (await describeLocal(local)).weightCount > BY_TEXT_WEIGHTS_MAX;
    const origin = isPlain ? PLAIN_ORIGIN : given;
    const same = asWanted(await findImported(local, { ...options, name }), origin);
    if (same !== undefined) return same;
    if (spec.kind !== 'default' && !force) await requireOwnName(home, name, local.source);
    if (isPlain) options.log(PLAIN_HINT);
    const held = await heldAs(local, plainName, origin, options);
    return importModel(local, { ...options, name, weights: held });
  };
  const model =
    (await present()) ?? (await locked(home, options, async () => (await present()) ?? imported()));
  return withPresetSurrogates(home, model, options);
}

/**
 * Repositories of several owners may have one name, and so may a file. Only an import from the same place replaces a model.
 * @throws MaskrouteError `conflict`.
 */
async function requireOwnName(home: string, name: string, source: string): Promise<void> {
  const installed = await openInstalled(home, name).catch(() => undefined);
  if (installed === undefined || placeOf(installed.manifest.source) === placeOf(source)) return;
  const message = `The name ${name} belongs to an installed model from ${installed.manifest.source}, and this one is from ${source}. With --force it replaces that model; to keep both, pull this one with another MASKROUTE_HOME.`;
  throw new MaskrouteError('conflict', message);
}

/**
 * The repository or package of a source, in any version and whichever of its files; this machine's files are one place. The
 * hub and PyPI tell no names apart by case.
 */
const placeOf = (source: string): string =>
  /^(file|folder):/.test(source) ? 'here' : source.replace(/(@[0-9a-f]{40}|==).*/, '').toLowerCase();

/* The calibration text of q4 and q8-columns. */

const OWN_TEXT_SEED = 1;
/**
 * Larger models are rounded to nearest unless there is data: rounding costs them little, and calibration takes hours and a
 * byte of memory a weight.
 */
const BY_TEXT_WEIGHTS_MAX = 1e9;
const PLAIN_ORIGIN = 'none: rounded plainly';
const PLAIN_HINT =
  'The model is large, so its weights are rounded to nearest. With --data FILE they are calibrated on your text, which takes hours.';

/** The manifest's name of the calibration text. @throws MaskrouteError `invalid_argument` when a file cannot be read. */
async function originOf(data: readonly string[]): Promise<string> {
  if (data.length === 0) {
    const { PASSAGES_FILE } = await import('../learning/data/calibration-text.ts');
    return `own text, seed ${OWN_TEXT_SEED}, passages ${await sha256OfFiles([PASSAGES_FILE])}`;
  }
  const hash = await sha256OfFiles(data).catch((error: NodeJS.ErrnoException) => {
    throw unreadable(error.path ?? 'The data', error);
  });
  return `data ${hash}`;
}

/** The format of the weights, with the calibration text: from `data`, or written by the model at eight bits. */
async function heldAs(
  local: LocalModel,
  plainName: string,
  origin: string | undefined,
  options: PullOptions,
): Promise<Weights> {
  const { weights, home, data = [], signal } = options;
  if (!isCalibrated(weights)) return { kind: weights };
  if (origin === PLAIN_ORIGIN) return { kind: weights, origin, text: undefined };
  const { readCalibrationText, writeOwnText } = await import('../learning/data/calibration-text.ts');
  const threads = availableParallelism();
  const text = await withEightBits(local, plainName, home, options, (model) => {
    if (data.length > 0) return readCalibrationText(model, data, OWN_TEXT_SEED);
    const onProgress = (done: number, total: number) =>
      options.onProgress({ phase: 'write', done: (100 * done) / total, total: 100, unit: 'percent' });
    return writeOwnText(model, { threads, seed: OWN_TEXT_SEED, signal, onProgress });
  });
  return { kind: weights, origin: origin!, text, threads };
}

/** Calls `use` with the model at eight bits: the installed model, or a temporary import. */
async function withEightBits<T>(
  local: LocalModel,
  plainName: string,
  home: string,
  hooks: ImportHooks,
  use: (model: InstalledModel) => Promise<T>,
): Promise<T> {
  const installed = await findImported(local, { ...hooks, home, name: plainName });
  if (installed && isHeldSo(installed.manifest, 'q8', undefined)) return use(installed);
  hooks.log('The weights are calibrated on text, for which the model is first imported with eight bits.');
  return withScratch(home, async (scratch) =>
    use(await importModel(local, { ...hooks, home: scratch, name: plainName, weights: { kind: 'q8' } })),
  );
}

/** Runs `work` under the store's lock, after repairing what a killed import left. */
function locked<T>(home: string, { log, signal }: WaitHooks, work: () => Promise<T>): Promise<T> {
  const onWait = () => log('Another import is running; waiting for it to end.');
  return withStoreLock(home, { onWait, signal }, async () => {
    await recoverStore(home);
    return work();
  });
}

type ModelRow = {
  readonly name: string;
  readonly weights: WeightKind | undefined;
  readonly bytes: number;
  readonly source: string;
  /** Why the model cannot be used; undefined when it can. */
  readonly problem: string | undefined;
};

export async function listModels(home: string): Promise<ModelRow[]> {
  return (await listInstalled(home)).map((entry) => {
    if ('problem' in entry) {
      return { name: entry.name, weights: undefined, bytes: 0, source: '', problem: entry.problem };
    }
    const { name, weights, source, files } = entry.manifest;
    const bytes = Object.values(files).reduce((sum, file) => sum + file.bytes, 0);
    return { name, weights, bytes, source, problem: undefined };
  });
}

/** `verify`: read every file and compare hashes. @throws MaskrouteError `model_not_found`, `corrupt_model`. */
export async function showModel(
  home: string,
  name: string,
  options: { readonly verify?: boolean } = {},
): Promise<InstalledModel> {
  const model = await openInstalled(home, name);
  if (options.verify === true) await verifyInstalled(model);
  return model;
}

/**
 * Installs the table in `file`, made by the user unless it is the `preset`. When that fails, the model is as before.
 * @throws MaskrouteError `model_not_found`, `surrogates_mismatch` for another model's table, `invalid_request`,
 * `storage_failed`.
 */
export async function installTable(
  home: string,
  name: string,
  file: string,
  hooks: WaitHooks,
  preset = false,
): Promise<InstalledModel> {
  try {
    return await locked(home, hooks, () => installSurrogates(home, name, file, { preset }));
  } catch (error) {
    const what = `${file} was not installed in ${name}. It needs a second copy of the model, which failed`;
    throw refusedByDisk(what, error);
  }
}

const PRESET_FILE = fileURLToPath(
  new URL(`../presets/${DEFAULT_MODEL}/surrogates.safetensors`, import.meta.url),
);

/**
 * Installs the project's surrogates into the default model. Returns the model unchanged when its weights are from another
 * file, or when the user installed surrogates of their own. Takes the store's lock only when there is something to do.
 */
export async function withPresetSurrogates(
  home: string,
  model: InstalledModel,
  hooks: WaitHooks,
): Promise<InstalledModel> {
  const { manifest } = model;
  if (manifest.hash !== DEFAULT_MODEL_HASH || manifest.surrogates?.preset === false) return model;
  const id = surrogatesIdOf(await sha256OfFiles([PRESET_FILE]));
  if (manifest.surrogates?.id === id) return model;
  hooks.log(`Installing the surrogates of ${manifest.name}`);
  return installTable(home, manifest.name, PRESET_FILE, hooks, true);
}
