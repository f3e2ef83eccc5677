/**
 * The matrices of a training step, each in a form for the forward and a form for the backward product. Quantized
 * weights work in one direction only, so there are second copies, made once and stored in one file beside the model.
 * fp32 weights work in both directions and need no copy.
 *
 * Products with the normalized residual stream, or with a gradient by it, have channels of similar size
 * (`model/architectures/rotation.ts`), so these matrices are stored as `columns`: one scale for each column, and one
 * for the whole activation tensor; two to ten times as fast as blocks of 32, as the CPU is. All others keep blocks: with
 * the gradients of gate and up as columns too, the cosine of a step's gate gradients with fp32 falls from 0.995 to 0.991.
 *
 * A run that begins on a machine with AMX has all codes by column instead. A step takes half the time there; elsewhere it takes
 * a fifth less, but a loss a fifth more, and a search computes far more losses than steps. Forward products have `pairs`, two
 * codes an activation (`model/architectures/column-products.ts`), which makes up for the precision that weights by column lose.
 * Gradients have `rows`, one code an activation and a scale for each row, and are no less exact than with pairs; as rows, the
 * forward product with down would take the cosine from 0.995 to 0.990. In both forms and directions a scale of the weights
 * belongs to the channel that is not the stream's: the rotation makes the stream's channels even, and those of an FFN differ by
 * up to nine times. The head has columns forward and pairs back, with a scale for each channel of the stream and none for
 * tokens that are hardly ever likely.
 */
import { type FileHandle, open, readdir, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { namingFile, partOf, readOwnJson, removeOldParts, sizeOf, writeWhole } from '../../files.ts';
import { average } from '../../measure.ts';
import {
  type Columns as ByColumn,
  multiplyPairs,
  multiplyRows,
  multiplyTensor,
  withEvenRows,
} from '../../model/architectures/column-products.ts';
import type { StoredLlama } from '../../model/architectures/llama.ts';
import {
  formOf,
  linear,
  multiply,
  type StoredLinear,
  storedRows,
  storeLinear,
} from '../../model/architectures/projections.ts';
import { type Matrix, rotateInputs, transpose } from '../../model/architectures/rotation.ts';
import { WEIGHTS_FILE } from '../../model/emit.ts';
import type { ModelConfig, WeightKind } from '../../model/model-source.ts';
import { corruptModel } from '../../model/model-source.ts';
import {
  dequantize,
  PLAIN_8_BITS,
  packColumns,
  QUANT_BLOCK,
  roundColumns,
  unpackColumns,
  unpackRows,
} from '../../model/quantization/quantize.ts';
import { external, type WeightRange, WeightsFile } from '../../model/weights-file.ts';
import type { GraphBuilder, Value } from '../../onnx/graph.ts';
import { ROUNDINGS, type Rounding } from './rounding.ts';

/** Raised whenever the copies' layout or the names of their files change. */
const VERSION = 8;
const copiesFile = (rounding: Rounding) => `training-v${VERSION}-${rounding}.bin`;
const indexFile = (rounding: Rounding) => `training-v${VERSION}-${rounding}.json`;

/**
 * The matrices of one layer. Attention takes the product with Q, K and V as a whole; that with gate and up would be split, which
 * costs more than a joint product saves.
 */
const LAYER_LINEARS = ['qkv', 'output', 'gate', 'up', 'down'] as const;
export type LayerLinear = (typeof LAYER_LINEARS)[number];
/** Matrices whose input is not the normalized residual stream. */
const INNER: ReadonlySet<string> = new Set<LayerLinear>(['output', 'down']);
/**
 * Their form in the forward pass: eight bits in blocks, which are the model's own or a copy. The rules of gradients know neither
 * codes by column nor inputs that the graph rotates, as those of a down with four bits are.
 */
export const innerKind = (kind: WeightKind): 'f32' | 'q8' => (kind === 'f32' ? kind : 'q8');

export type TrainingLinear = {
  readonly forward: StoredProduct;
  /**
   * Undefined for fp32: the forward weights are used. In blocks, its inputs are filled up with zeros to whole blocks: a
   * vocabulary has any size.
   */
  readonly back: StoredProduct | undefined;
};
/** By the names `head` and `layer_<i>.<LayerLinear>`. */
export type TrainingLinears = ReadonlyMap<string, TrainingLinear>;

/**
 * Reads the copies of the model in `folder` that are rounded so, or makes them.
 * @throws MaskrouteError `corrupt_model`, and `storage_failed` where they cannot be written.
 */
export async function trainingLinears(
  folder: string,
  config: ModelConfig,
  stored: StoredLlama,
  rounding: Rounding,
): Promise<TrainingLinears> {
  const linears = namedLinears(config, stored);
  if (stored.head[0]!.kind === 'f32') {
    await removeOldVersions(folder);
    return new Map([...linears].map(([name, [forward]]) => [name, { forward: forward!, back: undefined }]));
  }
  const copies = (await readIndex(folder, rounding)) ?? (await writeCopies(folder, rounding, linears));
  return new Map(
    [...linears].map(([name, [linear]]) => {
      const { forward, back } = copies.get(name)!;
      return [name, { forward: forward ?? linear!, back }];
    }),
  );
}

/** Each in stretches of rows; only the head has several. */
function namedLinears(config: ModelConfig, stored: StoredLlama): Map<string, readonly StoredLinear[]> {
  const { ffnSize: F } = config;
  const named = new Map<string, readonly StoredLinear[]>([['head', stored.head]]);
  for (const [index, { qkv, output, gateUp, down }] of stored.layers.entries()) {
    const layer: Record<LayerLinear, StoredLinear> = {
      qkv,
      output,
      gate: storedRows(gateUp, 0, F),
      up: storedRows(gateUp, F, 2 * F),
      down,
    };
    for (const name of LAYER_LINEARS) named.set(`layer_${index}.${name}`, [layer[name]]);
  }
  return named;
}

const rangeSchema = z.strictObject({
  file: z.enum(ROUNDINGS.map(copiesFile)),
  offset: z.int(),
  bytes: z.int(),
});
const sizes = { outputs: z.int(), inputs: z.int(), values: rangeSchema, scales: rangeSchema };
const blockSize = z.literal(QUANT_BLOCK);
const inputScales = rangeSchema.optional();
const productSchema = z.discriminatedUnion('kind', [
  z.strictObject({ kind: z.literal('q8'), blockSize, ...sizes, zeroPoints: rangeSchema }),
  z.strictObject({ kind: z.literal('columns'), ...sizes }),
  z.strictObject({ kind: z.literal('pairs'), ...sizes, inputScales }),
  z.strictObject({ kind: z.literal('rows'), ...sizes, inputScales }),
]);
/** `forward` is missing where the model's own weights are used. */
const copiesSchema = z.strictObject({ forward: productSchema.optional(), back: productSchema });
const indexSchema = z.record(z.string(), copiesSchema);
type MatrixCopies = { readonly forward?: StoredProduct | undefined; readonly back: StoredProduct };
type Copies = Map<string, MatrixCopies>;

/** The index is written last. Undefined unless it exists and the file of the copies ends with the last of them. */
async function readIndex(folder: string, rounding: Rounding): Promise<Copies | undefined> {
  const index = await readOwnJson(join(folder, indexFile(rounding)), indexSchema);
  const copies = new Map(Object.entries(index ?? {}));
  const products = [...copies.values()].flatMap(({ forward, back }) => [back, ...(forward ? [forward] : [])]);
  const ends_bytes = products.map((product) => {
    const last = product.kind === 'q8' ? product.zeroPoints : product.scales;
    return last.offset + last.bytes;
  });
  return (await sizeOf(join(folder, copiesFile(rounding)))) === Math.max(...ends_bytes) ? copies : undefined;
}

async function writeCopies(
  folder: string,
  rounding: Rounding,
  linears: ReadonlyMap<string, readonly StoredLinear[]>,
): Promise<Copies> {
  await removeOldVersions(folder);
  const whole = join(folder, copiesFile(rounding));
  await removeOldParts(whole);
  const part = partOf(whole);
  try {
    const copies = await fillCopies(folder, part, rounding, linears);
    await rename(part, whole);
    await writeWhole(join(folder, indexFile(rounding)), JSON.stringify(Object.fromEntries(copies)));
    return copies;
  } catch (cause) {
    if (!(cause instanceof Error && 'syscall' in cause)) throw cause;
    const { message } = namingFile(whole, cause) as Error;
    const what = 'Learning needs copies of the weights beside the model, which cannot be written';
    throw new MaskrouteError('storage_failed', `${what}: ${message}`, { cause });
  } finally {
    await rm(part, { force: true });
  }
}

/** Writes the copies to `part`. */
async function fillCopies(
  folder: string,
  part: string,
  rounding: Rounding,
  linears: ReadonlyMap<string, readonly StoredLinear[]>,
): Promise<Copies> {
  const weights = await open(join(folder, WEIGHTS_FILE), 'r');
  try {
    const file = new WeightsFile(part, copiesFile(rounding));
    try {
      const copies: Copies = new Map();
      for (const [name, stretches] of linears) {
        const matrix = await wholeMatrix(weights, stretches);
        copies.set(name, storeCopies(file, rounding, name, matrix, isForward(stretches[0]!)));
      }
      return copies;
    } finally {
      file.close();
    }
  } finally {
    await weights.close();
  }
}

/** Whether training steps in blocks multiply by the model's own matrix, of {@link INNER}, as it is. */
const isForward = ({ kind, rotation }: StoredLinear): boolean =>
  kind === innerKind(kind) && rotation === undefined;

/** `ownForward`: {@link isForward}. */
function storeCopies(
  file: WeightsFile,
  rounding: Rounding,
  name: string,
  matrix: Matrix,
  ownForward: boolean,
): MatrixCopies {
  const isInner = INNER.has(name.slice(name.indexOf('.') + 1));
  const inColumns = (whole: Matrix): StoredProduct => ({ kind: 'columns', ...storeByOutput(file, whole) });
  if (rounding === 'blocks') {
    const inBlocks = (whole: Matrix) => storeLinear(file, PLAIN_8_BITS, whole);
    if (!isInner) return { forward: inColumns(matrix), back: inBlocks(inWholeBlocks(transposed(matrix))) };
    const back = inColumns(transposed(matrix));
    return ownForward ? { back } : { forward: inBlocks(matrix), back };
  }
  if (name === 'head') return { forward: inColumns(matrix), back: storeHeadBack(file, matrix) };
  if (!isInner)
    return {
      forward: { kind: 'pairs', ...storeByOutput(file, matrix) },
      back: { kind: 'rows', ...storeByInput(file, matrix) },
    };
  const turned = transposed(matrix);
  return {
    forward: { kind: 'pairs', ...storeByInput(file, turned) },
    back: { kind: 'rows', ...storeByOutput(file, turned) },
  };
}

const storeHeadBack = (file: WeightsFile, matrix: Matrix): StoredPairs => ({
  kind: 'pairs',
  inputScales: file.append(new Float32Array(matrix.outputs).fill(1)),
  ...storeByOutput(file, withoutMeans(transposed(matrix))),
});

const transposed = ({ rows, outputs, inputs }: Matrix): Matrix => ({
  rows: transpose(rows, outputs, inputs),
  outputs: inputs,
  inputs: outputs,
});

/**
 * Each row minus its mean, in place: a channel of the stream, for all tokens. The gradient by a row's logits sums to 0, so its
 * product with a constant is 0, too. But tokens of tiny probability lose their codes, thousands of them, and most tokens' vectors
 * point where their mean does: without this the cosine of a step's gate gradients with fp32 falls to 0.97.
 */
function withoutMeans(matrix: Matrix): Matrix {
  const { rows, inputs } = matrix;
  for (let start = 0; start < rows.length; start += inputs) {
    const row = rows.subarray(start, start + inputs);
    const mean = average(row);
    for (let i = 0; i < inputs; i++) row[i]! -= mean;
  }
  return matrix;
}

/** With zeros behind each row, up to whole blocks. */
function inWholeBlocks(matrix: Matrix): Matrix {
  const { rows, outputs, inputs } = matrix;
  const whole = QUANT_BLOCK * Math.ceil(inputs / QUANT_BLOCK);
  // A head would be in memory once more.
  if (whole === inputs) return matrix;
  const filled = new Float32Array(outputs * whole);
  for (let row = 0; row < outputs; row++)
    filled.set(rows.subarray(row * inputs, (row + 1) * inputs), row * whole);
  return { rows: filled, outputs, inputs: whole };
}

/** What earlier versions left: copies, their indexes and graphs. They stay where nothing can be written. */
async function removeOldVersions(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    const isOld = name.startsWith('training-') && !name.startsWith(`training-v${VERSION}-`);
    if (isOld) await rm(join(folder, name), { force: true }).catch(() => {});
  }
}

/*
 * Products in the quantized forms of a training step: blocks of 32 (`model/architectures/projections.ts`), and codes by column
 * with one scale each. Activations of `columns` share one scale a tensor (DynamicQuantizeMatMul), those of `rows` have one a row,
 * and those of `pairs` have two codes.
 */

type StoredCodes = {
  readonly outputs: number;
  readonly inputs: number;
  /** i8 `[inputs, outputs]`. */
  readonly values: WeightRange;
  /** `[outputs]`. */
  readonly scales: WeightRange;
};
type StoredColumns = StoredCodes & { readonly kind: 'columns' };
type StoredPairs = StoredCodes & {
  readonly kind: 'pairs';
  /** `[inputs]`, at most 1; undefined where rows are normalized already, and their channels even. */
  readonly inputScales?: WeightRange | undefined;
};
type StoredRows = StoredCodes & {
  readonly kind: 'rows';
  /** `[inputs]`, at most 1; undefined where channels are even. */
  readonly inputScales?: WeightRange | undefined;
};
type StoredProduct = StoredLinear | StoredColumns | StoredPairs | StoredRows;

/** Symmetric quantization: an output's largest weight is 127 codes away from the zero point. */
function storeByOutput(file: WeightsFile, { rows, outputs, inputs }: Matrix): StoredCodes {
  const rounded = roundColumns(rows, outputs, inputs);
  const values = file.append(packColumns(rounded));
  return { outputs, inputs, values, scales: file.append(rounded.scales) };
}

/** As {@link storeByOutput}, from the matrix transposed, but an input's largest weight is 127 codes away. */
function storeByInput(
  file: WeightsFile,
  { rows, outputs: inputs, inputs: outputs }: Matrix,
): StoredCodes & { readonly inputScales: WeightRange } {
  const rounded = roundColumns(rows, inputs, outputs);
  const { scales } = rounded;
  const largest = scales.reduce((most, scale) => Math.max(most, scale), 0);
  return {
    outputs,
    inputs,
    values: file.append(rounded.codes),
    inputScales: file.append(scales.map((scale) => (largest === 0 ? 0 : scale / largest))),
    scales: file.append(new Float32Array(outputs).fill(largest)),
  };
}

/** The graph's name of the quantized values of the weights `name`; gradient rules look weights up by it. */
export const weightName = (name: string): string => `${name}.q`;

/**
 * Multiplies a gradient by a product's result with `back`, which gives the gradient by the product's input. Gradients of
 * different positions differ by orders of magnitude, so no two share a scale: columns, whose activations do, get each row
 * normalized, and it is scaled back afterwards.
 */
export function multiplyGradient(
  g: GraphBuilder,
  gradient: Value,
  name: string,
  { forward, back: stored }: TrainingLinear & { readonly back: StoredProduct },
): Value {
  const { inputs } = stored;
  if (stored.kind === 'rows' || stored.kind === 'pairs') return multiplyStored(g, gradient, name, stored);
  if (stored.kind === 'columns') {
    const { even, inverse } = withEvenRows(g, gradient, inputs);
    return g.op('Div', [multiplyStored(g, even, name, stored), inverse]);
  }
  const whole = withZeros(g, gradient, inputs - forward.outputs);
  return multiplyStored(g, whole, name, stored);
}

/** x `[..., n]` → `[..., n + count]`. */
function withZeros(g: GraphBuilder, x: Value, count: number): Value {
  if (count === 0) return x;
  const [pads, zero, axes] = [g.ints(0, count), g.constant('f32', [], [0]), g.ints(-1)];
  return g.op('Pad', [x, pads, zero, axes]);
}

/** x `[..., inputs]` → `[..., outputs]`. */
export function multiplyStored(g: GraphBuilder, x: Value, name: string, stored: StoredProduct): Value {
  if (stored.kind !== 'columns' && stored.kind !== 'rows' && stored.kind !== 'pairs')
    return multiply(g, x, linear(g, name, stored));
  const { inputs, outputs } = stored;
  const scalesOf = (what: string, count: number, range: WeightRange) =>
    g.initializer(`${name}.${what}`, 'f32', [count], external(range));
  const values = g.initializer(weightName(name), 'i8', [inputs, outputs], external(stored.values));
  const columns = { inputs, outputs, values, scales: scalesOf('scales', outputs, stored.scales) };
  if (stored.kind === 'columns') return multiplyTensor(g, x, columns);
  const inputScales = stored.inputScales && scalesOf('input_scales', inputs, stored.inputScales);
  if (stored.kind === 'rows')
    return multiplyRows(g, inputScales ? g.op('Mul', [x, inputScales]) : x, columns);
  const product = pairsProduct(g, x, columns, inputScales);
  g.endProduct({ input: x.name, weights: values.name, outputs });
  return product;
}

/** As {@link multiplyStored}; the last node gives the result. */
function pairsProduct(g: GraphBuilder, x: Value, columns: ByColumn, inputScales: Value | undefined): Value {
  const ofMany = (rows: Value) => multiplyPairs(g, rows, columns, undefined, true);
  if (inputScales === undefined) return ofMany(x);
  const { even, inverse } = withEvenRows(g, x, columns.inputs, inputScales);
  return g.op('Div', [ofMany(even), inverse]);
}

/** Stretches of rows as one matrix, in fp32. @throws MaskrouteError `corrupt_model` when the file ends early. */
async function wholeMatrix(weights: FileHandle, stretches: readonly StoredLinear[]): Promise<Matrix> {
  const outputs = stretches.reduce((sum, stretch) => sum + stretch.outputs, 0);
  const { inputs } = stretches[0]!;
  const rows = new Float32Array(outputs * inputs);
  let at = 0;
  for (const stretch of stretches) {
    rows.set(await plainMatrix(weights, stretch), at);
    at += stretch.outputs * inputs;
  }
  return { rows, outputs, inputs };
}

/** The matrix of inputs that are not rotated. @throws MaskrouteError `corrupt_model` when the file ends early. */
async function plainMatrix(weights: FileHandle, linear: StoredLinear): Promise<Float32Array> {
  const rows = await dequantizeLinear(weights, linear);
  if (linear.rotation) rotateInputs(rows, linear.rotation.size);
  return rows;
}

/** The matrix in fp32, `[outputs, inputs]`. @throws MaskrouteError `corrupt_model` when the file ends early. */
async function dequantizeLinear(weights: FileHandle, linear: StoredLinear): Promise<Float32Array> {
  const { outputs, inputs } = linear;
  if (linear.kind === 'f32') return new Float32Array((await readRange(weights, linear.values)).buffer);
  const values = await readRange(weights, linear.values);
  const scales = new Float32Array((await readRange(weights, linear.scales)).buffer);
  if (linear.kind === 'q8-columns') {
    const codes = unpackColumns(new Int8Array(values.buffer), inputs, linear.from, outputs);
    return dequantize({ rows: outputs, columns: inputs, codes, scales });
  }
  const zeroPoints = await readRange(weights, linear.zeroPoints);
  return dequantize(unpackRows({ values, scales, zeroPoints }, outputs, inputs, formOf(linear)));
}

async function readRange(file: FileHandle, { offset, bytes: length }: WeightRange): Promise<Uint8Array> {
  const bytes = new Uint8Array(length);
  for (let done = 0; done < length; ) {
    const { bytesRead } = await file.read(bytes, done, length - done, offset + done);
    if (bytesRead === 0) throw corruptModel('its weights file ends early');
    done += bytesRead;
  }
  return bytes;
}
