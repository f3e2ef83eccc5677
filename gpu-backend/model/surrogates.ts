/**
 * Surrogates: for every block, an affine map of low rank that replaces the block's output when it is skipped,
 *
 *   y = x̂·A·B + bias,   and y = first at a sequence's first position (an attention sink, far from the rest),
 *
 * where x̂ = x / √(mean x² + ε) is the residual stream before the block, normalized without weights. A table belongs to one
 * model and serves every mask. It is stored in the basis of the model's own file, so that it does not depend on the format
 * of the weights; an installed model may have a rotated basis (`rotation.ts`).
 *
 * On disk: safetensors in half precision, tensors `a` `[2L, H, r]`, `b` `[2L, r, H]`, `bias` and `first`
 * `[2L, H]`. The id is the hash of the file.
 */
import { constants, copyFile, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { MODEL_HASH_PATTERN, type ModelHash, type SurrogatesId } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { unreadable, writeWhole } from '../files.ts';
import type { StoredLayer, StoredLlama } from './architectures/llama.ts';
import { storeLinear } from './architectures/projections.ts';
import { rotateRows, streamBlock, transpose, unrotateRows } from './architectures/rotation.ts';
import type { StoredSurrogate } from './architectures/surrogate.ts';
import { BATCHED_MODEL_FILE, MODEL_FILE, writeGraphs } from './emit.ts';
import { encodeHalfTensors, openSafetensors, type SafetensorsFile } from './formats/safetensors.ts';
import type { ModelConfig, ModelManifest, WeightKind } from './model-source.ts';
import { PLAIN_8_BITS, QUANT_BLOCK } from './quantization/quantize.ts';
import {
  describeFiles,
  type InstalledModel,
  install,
  MANIFEST_FILE,
  openInstalled,
  sha256OfFiles,
} from './store.ts';
import { readStoredLlama } from './stored-llama.ts';
import { WeightsFile } from './weights-file.ts';

/** The tensors of a table. */
export const SURROGATE_PARTS = ['a', 'b', 'bias', 'first'] as const;
export type SurrogatePart = (typeof SURROGATE_PARTS)[number];

export const eachPart = <T>(make: (part: SurrogatePart) => T): Record<SurrogatePart, T> =>
  Object.fromEntries(SURROGATE_PARTS.map((part) => [part, make(part)])) as Record<SurrogatePart, T>;

type TableSizes = { readonly blockCount: number; readonly hiddenSize: number; readonly rank: number };

export const surrogateShapes = ({
  blockCount,
  hiddenSize: H,
  rank,
}: TableSizes): Record<SurrogatePart, number[]> => ({
  a: [blockCount, H, rank],
  b: [blockCount, rank, H],
  bias: [blockCount, H],
  first: [blockCount, H],
});

export type SurrogateTable = TableSizes & Readonly<Record<SurrogatePart, Float32Array>>;

export type Surrogates = {
  readonly id: SurrogatesId;
  readonly model: ModelHash;
  /** In the basis of the model's file. */
  readonly table: SurrogateTable;
  /** A short text about how the table was made. */
  readonly fitted: string;
};

const FORMAT = 'maskroute-surrogates-v1';
const RANK_MAX = 1024;

/** @throws MaskrouteError `corrupt_model`, `invalid_request` for a file that is no such table, `invalid_data` when unreadable. */
export async function readSurrogates(path: string): Promise<Surrogates> {
  const invalid = (why: string) =>
    new MaskrouteError('invalid_request', `${path} is no table of surrogates: ${why}.`);
  const file = await openTable(path);
  try {
    const { format, model = '', fitted = '' } = file.metadata;
    if (format !== FORMAT) throw invalid('its metadata do not say so');
    if (!MODEL_HASH_PATTERN.test(model)) throw invalid('it names no model');
    for (const part of SURROGATE_PARTS) if (!file.has(part)) throw invalid(`it has no tensor ${part}`);
    const [blockCount = 0, hiddenSize = 0, rank = 0] = file.shape('a');
    const sizes = { blockCount, hiddenSize, rank };
    const shapes = surrogateShapes(sizes);
    if (SURROGATE_PARTS.some((part) => file.shape(part).join() !== shapes[part].join()))
      throw invalid('its shapes do not fit each other');
    checkRank(rank);
    const table = {
      ...sizes,
      a: await file.read('a'),
      b: await file.read('b'),
      bias: await file.read('bias'),
      first: await file.read('first'),
    };
    const hash = await sha256OfFiles([path]);
    return { id: surrogatesIdOf(hash), model: model as ModelHash, table, fitted };
  } finally {
    await file.close();
  }
}

/** The table that an installed model serves with, if any. @throws MaskrouteError `corrupt_model`. */
export async function installedSurrogates({
  folder,
  manifest,
}: InstalledModel): Promise<Surrogates | undefined> {
  return manifest.surrogates && (await readSurrogates(installedTableFile(folder)));
}

/** The file of the table that an installed model with surrogates serves with. */
export const installedTableFile = (folder: string): string => join(folder, SURROGATES_FILE);

/** Opens the file, and replaces errors that speak of a model file by errors about the table. */
async function openTable(path: string): Promise<SafetensorsFile> {
  try {
    return await openSafetensors(path);
  } catch (error) {
    const refusal = unreadable(path, error);
    if (refusal.code === 'invalid_argument') throw refusal;
    const message = `${path} is no table of surrogates, or a damaged one.`;
    throw new MaskrouteError(refusal.code, message, { cause: error });
  }
}

/** The id of a table. `hash`: SHA-256 of its file, in hex. */
export const surrogatesIdOf = (hash: string): SurrogatesId => `s_${hash.slice(0, 24)}` as SurrogatesId;

/** @throws MaskrouteError `invalid_request` for a rank that quantized products do not support. */
export function checkRank(rank: number): void {
  if (Number.isInteger(rank) && rank > 0 && rank <= RANK_MAX && rank % QUANT_BLOCK === 0) return;
  const message = `The rank of surrogates must be a multiple of ${QUANT_BLOCK} up to ${RANK_MAX}, not ${rank}.`;
  throw new MaskrouteError('invalid_request', message);
}

/** Writes a table, in the basis of the model's file, to `path`, atomically. */
export async function writeSurrogates(
  path: string,
  { model, table, fitted }: Omit<Surrogates, 'id'>,
): Promise<void> {
  const shapes = surrogateShapes(table);
  const tensors = SURROGATE_PARTS.map((name) => ({ name, shape: shapes[name], data: table[name] }));
  await writeWhole(path, encodeHalfTensors(tensors, { format: FORMAT, model, fitted }));
}

/** @throws MaskrouteError `surrogates_mismatch` when the table is for another model. */
export function checkSurrogatesModel(
  { model, table }: Surrogates,
  { hash, config }: { readonly hash: string; readonly config: ModelConfig },
): void {
  const { layerCount, hiddenSize } = config;
  if (model === hash && table.blockCount === 2 * layerCount && table.hiddenSize === hiddenSize) return;
  throw new MaskrouteError('surrogates_mismatch', 'These surrogates are for another model.');
}

/** Whether an installed model with these weights has the rotated basis, where the stream x becomes x·Q. */
const isRotated = (kind: WeightKind): boolean => kind !== 'f32';

/** Converts a table from the file's basis to the installed model's: A becomes QᵀA, B becomes B·Q. */
export const toInstalledBasis = (table: SurrogateTable, { config, weights }: Installed): SurrogateTable =>
  isRotated(weights) ? inBasis(table, streamBlock(config), rotateRows) : table;

/** The inverse of {@link toInstalledBasis}. */
export const toFileBasis = (table: SurrogateTable, { config, weights }: Installed): SurrogateTable =>
  isRotated(weights) ? inBasis(table, streamBlock(config), unrotateRows) : table;

type Installed = Pick<ModelManifest, 'config' | 'weights'>;

function inBasis(
  table: SurrogateTable,
  block: number,
  rotate: (rows: Float32Array, width: number) => void,
): SurrogateTable {
  const { blockCount, hiddenSize: H, rank } = table;
  const rows = (values: Float32Array): Float32Array => {
    const copy = values.slice();
    rotate(copy, block);
    return copy;
  };
  const a = new Float32Array(table.a.length);
  const size = H * rank;
  for (let at = 0; at < blockCount * size; at += size) {
    const columns = rows(transpose(table.a.subarray(at, at + size), H, rank));
    a.set(transpose(columns, rank, H), at);
  }
  return { ...table, a, b: rows(table.b), bias: rows(table.bias), first: rows(table.first) };
}

/*
 * Installs a table of surrogates into a model: writes its matrices beside the weights, and graphs that use them for skipped
 * blocks. A new folder has copies of the other files and replaces the old folder by a rename, so an engine that has the old
 * folder open keeps running.
 */

/** A copy of the table, and its matrices in the format of the graph. */
const SURROGATES_FILE = 'surrogates.safetensors';
const SURROGATE_WEIGHTS_FILE = 'surrogates.bin';
const REPLACED: ReadonlySet<string> = new Set([
  MODEL_FILE,
  BATCHED_MODEL_FILE,
  MANIFEST_FILE,
  SURROGATES_FILE,
  SURROGATE_WEIGHTS_FILE,
]);

/**
 * Installs the table in the file `path` into the model `name`; installing the same table again changes nothing. The caller
 * holds the store's lock.
 * @throws MaskrouteError `surrogates_mismatch` when the table is for another model, `invalid_request`.
 */
export async function installSurrogates(
  home: string,
  name: string,
  path: string,
  { preset }: { readonly preset: boolean },
): Promise<InstalledModel> {
  const installed = await openInstalled(home, name);
  const { manifest } = installed;
  const surrogates = await readSurrogates(path);
  checkSurrogatesModel(surrogates, manifest);
  if (manifest.surrogates?.id === surrogates.id) return installed;
  return await install(home, name, async (folder) => {
    await copyUnchanged(installed.folder, folder);
    await copyFile(path, join(folder, SURROGATES_FILE));
    await writeSurrogateGraph(installed.folder, folder, manifest, surrogates.table);
    const { id, table, fitted } = surrogates;
    const written = await describeFiles(folder, [
      MODEL_FILE,
      BATCHED_MODEL_FILE,
      SURROGATES_FILE,
      SURROGATE_WEIGHTS_FILE,
    ]);
    return {
      ...manifest,
      surrogates: { id, rank: table.rank, fitted, preset },
      files: { ...manifest.files, ...written },
    };
  });
}

/**
 * Copies all files that do not change into the new folder, where the file system can without writing their data again. No
 * hard links: ONNX Runtime refuses weights that have a second name, so nobody could open the model meanwhile, and after a
 * kill nobody ever.
 */
async function copyUnchanged(from: string, to: string): Promise<void> {
  for (const entry of await readdir(from, { withFileTypes: true })) {
    if (!entry.isFile() || entry.name.startsWith('.') || REPLACED.has(entry.name)) continue;
    await copyFile(join(from, entry.name), join(to, entry.name), constants.COPYFILE_FICLONE);
  }
}

/** Writes the surrogates' matrices, and the graphs of the model in `from` with surrogates, into `folder`. */
export async function writeSurrogateGraph(
  from: string,
  folder: string,
  model: Installed,
  table: SurrogateTable,
): Promise<void> {
  const { config } = model;
  const stored = await readStoredLlama(from, config);
  const layers = storeSurrogates(join(folder, SURROGATE_WEIGHTS_FILE), stored, model, table);
  writeGraphs(folder, config, { ...stored, layers });
}

function storeSurrogates(
  path: string,
  stored: StoredLlama,
  model: Installed,
  table: SurrogateTable,
): StoredLayer[] {
  const { a, b, bias, first, hiddenSize: H, rank } = toInstalledBasis(table, model);
  // Surrogates are small, so four bits would save little and cost accuracy.
  const form = model.weights === 'f32' ? undefined : PLAIN_8_BITS;
  const file = new WeightsFile(path, SURROGATE_WEIGHTS_FILE);
  const store = (block: number): StoredSurrogate => {
    const matrix = (values: Float32Array) => values.subarray(block * H * rank, (block + 1) * H * rank);
    const vector = (values: Float32Array) => file.append(values.subarray(block * H, (block + 1) * H));
    return {
      down: storeLinear(file, form, { rows: transpose(matrix(a), H, rank), outputs: rank, inputs: H }),
      up: storeLinear(file, form, { rows: transpose(matrix(b), rank, H), outputs: H, inputs: rank }),
      bias: vector(bias),
      first: vector(first),
    };
  };
  try {
    return stored.layers.map((layer, index) => ({
      ...layer,
      surrogates: { attention: store(2 * index), ffn: store(2 * index + 1) },
    }));
  } finally {
    file.close();
  }
}
