/**
 * Imports a model from files on this machine. Everything is checked and written in a hidden folder first; a rename installs
 * the model, and a failure leaves nothing behind.
 */
import { stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { ModelHash } from '../../shared/mask/mask.ts';
import { BATCHED_MODEL_FILE, emitModel, type Holding, MODEL_FILE, WEIGHTS_FILE } from './emit.ts';
import { decoderTensors } from './families.ts';
import { bytesOf, elementsOf, tensorType } from './formats/dequantize.ts';
import { openGguf } from './formats/gguf.ts';
import { openSafetensorsFolder } from './formats/hf-folder.ts';
import {
  type CalibratedKind,
  calibrationIn,
  type ImportHooks,
  isCalibrated,
  MANIFEST_FORMAT,
  type ModelManifest,
  type OpenModelFile,
  type WeightKind,
} from './model-source.ts';
import type { TextOptions } from './quantization/calibration.ts';
import { COLUMNS_VERSION } from './quantization/columns.ts';
import { FOUR_BITS_VERSION } from './quantization/four-bits.ts';
import { describeFiles, type InstalledModel, install, openInstalled, sha256OfFiles } from './store.ts';
import { type ImportedTokenizer, tokenizerFromGguf } from './tokenizer/gguf-tokenizer.ts';
import { tokenizerFromFolder } from './tokenizer/hf-tokenizer.ts';
import { tryModelText } from './tokenizer/model-text.ts';
import { TOKENIZER_CONFIG_FILE, TOKENIZER_FILE } from './tokenizer/tokenizer.ts';

export type LocalModel = {
  readonly kind: 'gguf' | 'folder';
  readonly path: string;
  /** The model's origin, for the manifest. */
  readonly source: string;
};

/** The format of the weights. A calibrated kind has its text and a name of it; without text it is rounded to nearest. */
export type Weights =
  | { readonly kind: Exclude<WeightKind, CalibratedKind> }
  | { readonly kind: CalibratedKind; readonly origin: string; readonly text: undefined }
  | (TextOptions & { readonly kind: CalibratedKind; readonly origin: string });

type ImportOptions = ImportHooks & {
  readonly home: string;
  readonly name: string;
  readonly weights: Weights;
};

/** Imports and installs a model; the caller holds the store's lock. @throws MaskrouteError `corrupt_model`, `unsupported_model`. */
export async function importModel(local: LocalModel, options: ImportOptions): Promise<InstalledModel> {
  const opened = await openLocal(local);
  try {
    return await install(options.home, options.name, (folder) => convert(local, opened, options, folder));
  } finally {
    await opened.weights.close();
  }
}

/** The installed model of this name, if it came from the same files. The caller checks the format of its weights. */
export async function findImported(
  local: LocalModel,
  { home, name, ...hooks }: ImportHooks & { readonly home: string; readonly name: string },
): Promise<InstalledModel | undefined> {
  const installed = await openInstalled(home, name).catch(() => undefined);
  if (installed === undefined) return undefined;
  const { weights } = await openLocal(local);
  try {
    return installed.manifest.hash === (await hashWeights(weights.weightFiles, hooks))
      ? installed
      : undefined;
  } finally {
    await weights.close();
  }
}

/** Sizes of a model's files and tensors, without reading weights. @throws MaskrouteError as {@link importModel}. */
export async function describeLocal(local: LocalModel) {
  const { weights } = await openLocal(local);
  await weights.close();
  const sizes = decoderTensors(weights.config).map(({ name, shape }) => {
    const elements = elementsOf(shape);
    return { elements, bytes: bytesOf(tensorType(weights.place(name).type)!, elements) };
  });
  return {
    files: weights.weightFiles,
    weightCount: sizes.reduce((sum, { elements }) => sum + elements, 0),
    /** In the file's format. */
    largestTensor_bytes: Math.max(...sizes.map(({ bytes }) => bytes)),
  };
}

type OpenedModel = { weights: OpenModelFile; tokenizer: ImportedTokenizer };

async function openLocal({ kind, path }: LocalModel): Promise<OpenedModel> {
  switch (kind) {
    case 'gguf': {
      const weights = await openGguf(path);
      return withTokenizer(weights, async () =>
        tokenizerFromGguf(weights.metadata, weights.config.vocabularySize),
      );
    }
    case 'folder': {
      const weights = await openSafetensorsFolder(path);
      return withTokenizer(weights, () => tokenizerFromFolder(path, weights.config.vocabularySize));
    }
  }
}

async function withTokenizer(
  weights: OpenModelFile,
  read: () => Promise<ImportedTokenizer>,
): Promise<OpenedModel> {
  try {
    return { weights, tokenizer: await read() };
  } catch (error) {
    await weights.close();
    throw error;
  }
}

async function hashWeights(
  paths: readonly string[],
  { onProgress, signal }: Pick<ImportHooks, 'onProgress' | 'signal'>,
): Promise<string> {
  const sizes = await Promise.all(paths.map(async (path) => (await stat(path)).size));
  const total = sizes.reduce((sum, size) => sum + size, 0);
  let done = 0;
  const onBytes = (bytes: number) => {
    done += bytes;
    onProgress({ phase: 'verify', done, total, unit: 'bytes' });
  };
  return sha256OfFiles(paths, signal, onBytes);
}

/** Whether a model's weights have this format. `origin`: the name of the text of a calibrated kind. */
export function isHeldSo(
  { weights, ...calibrated }: Pick<ModelManifest, 'weights' | 'fourBits' | 'columns'>,
  kind: WeightKind,
  origin: string | undefined,
): boolean {
  if (weights !== kind) return false;
  if (!isCalibrated(kind)) return true;
  const own = calibrationIn(calibrated);
  return own?.version === CALIBRATIONS[kind].version && own.text === origin;
}

/** The manifest's field with the calibration of each kind, and the version of its codes. */
const CALIBRATIONS = {
  q4: { field: 'fourBits', version: FOUR_BITS_VERSION },
  'q8-columns': { field: 'columns', version: COLUMNS_VERSION },
} as const;

const holdingOf = (weights: Weights): Holding =>
  'text' in weights && weights.text !== undefined ? weights : weights.kind;

function calibrationOf({ kind, origin }: Extract<Weights, { readonly origin: string }>) {
  const { field, version } = CALIBRATIONS[kind];
  return { [field]: { version, text: origin } };
}

/** Writes the files of an installed model into `folder`, and returns its manifest. */
async function convert(
  { source }: LocalModel,
  { weights, tokenizer }: OpenedModel,
  { name, weights: held, onProgress, signal }: ImportOptions,
  folder: string,
): Promise<ModelManifest> {
  const { tokenizerJson, tokenizerConfig, ...text } = tokenizer;
  await writeFile(join(folder, TOKENIZER_FILE), JSON.stringify(tokenizerJson), { flush: true });
  await writeFile(join(folder, TOKENIZER_CONFIG_FILE), JSON.stringify(tokenizerConfig), { flush: true });
  // Quick checks before the long work.
  await tryModelText(folder, text);
  // The files are hashed at the same time, so that each byte is read from disk once.
  const ended = new AbortController();
  const either = signal ? AbortSignal.any([signal, ended.signal]) : ended.signal;
  const hashing = hashWeights(weights.weightFiles, { onProgress: () => {}, signal: either });
  hashing.catch(() => {});
  const emitting = emitModel(weights, holdingOf(held), folder, (fraction) => {
    // Emission has no signal of its own: an exception here ends it between two slices.
    signal?.throwIfAborted();
    onProgress({ phase: 'convert', done: 100 * fraction, total: 100, unit: 'percent' });
  });
  await emitting.catch((error) => {
    ended.abort();
    throw error;
  });
  const hash = await hashing;
  const names = [MODEL_FILE, BATCHED_MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE];
  const files = await describeFiles(folder, names, signal);
  signal?.throwIfAborted();
  return {
    format: MANIFEST_FORMAT,
    name,
    hash: hash as ModelHash,
    source,
    weights: held.kind,
    config: weights.config,
    ...('origin' in held ? calibrationOf(held) : {}),
    ...text,
    files,
    importedAt: new Date().toISOString(),
  };
}
