/**
 * The matrices of a training step, each in a form for the forward and a form for the backward product. Quantized
 * weights work in one direction only, so there are second copies, made once and stored in one file beside the model.
 * fp32 weights work in both directions and need no copy.
 *
 * Products with the normalized residual stream, or with a gradient by it, have channels of similar size
 * (`model/architectures/rotation.ts`), so these matrices are stored as `columns`: one scale for each column, and one
 * for the whole activation tensor; two to ten times as fast as blocks of 32, as the CPU is. All others keep blocks: with
 * the gradients of gate and up as columns too, the cosine of a step's gate gradients with fp32 falls from 0.995 to 0.991.
 */
import { type FileHandle, open, readdir, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { namingFile, partOf, readOwnJson, removeOldParts, sizeOf, writeWhole } from '../../files.ts';
import { withEvenRows } from '../../model/architectures/column-products.ts';
import type { StoredLlama } from '../../model/architectures/llama.ts';
import {
  formOf,
  linear,
  multiply,
  type StoredLinear,
  storedRows,
  storeLinear,
} from '../../model/architectures/projections.ts';
import { transpose } from '../../model/architectures/rotation.ts';
import { WEIGHTS_FILE } from '../../model/emit.ts';
import type { ModelConfig, WeightKind } from '../../model/model-source.ts';
import { corruptModel } from '../../model/model-source.ts';
import {
  dequantize,
  PLAIN_8_BITS,
  QUANT_BLOCK,
  unpackColumns,
  unpackRows,
} from '../../model/quantization/quantize.ts';
import { external, type WeightRange, WeightsFile } from '../../model/weights-file.ts';
import { encodeModel } from '../../onnx/encode.ts';
import { GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import { createSession, floats, tensor } from '../../onnx/session.ts';

/** Raised whenever the copies' layout changes. */
const VERSION = 4;
/** Types of columns' codes. Each has its own files, since machines may share a folder. */
const CODE_TYPES = ['i8', 'u8'] as const;
export type CodeType = (typeof CODE_TYPES)[number];
const copiesFile = (codes: CodeType) => `training-v${VERSION}-${codes}.bin`;
const indexFile = (codes: CodeType) => `training-v${VERSION}-${codes}.json`;

/** Where the graph `name` over these copies is: ONNX Runtime looks for weights beside the graph's file. */
export const trainingGraphFile = (folder: string, name: string, codes: CodeType): string =>
  join(folder, `training-${name}-${codes}.onnx`);

/**
 * The matrices of one layer, multiplied separately: splitting the result of a joint product costs more than the joint
 * product saves.
 */
const LAYER_LINEARS = ['q', 'k', 'v', 'output', 'gate', 'up', 'down'] as const;
export type LayerLinear = (typeof LAYER_LINEARS)[number];
/** Matrices whose input is not the normalized residual stream. */
const INNER: ReadonlySet<string> = new Set<LayerLinear>(['output', 'down']);
/** Their form in the forward pass: the model's own, unless the rules of gradients do not know its products. */
export const innerKind = (kind: WeightKind): Exclude<WeightKind, 'q8-columns'> =>
  kind === 'q8-columns' ? 'q8' : kind;

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

/** Reads the copies of the model in `folder` that have such codes, or makes them. @throws MaskrouteError `corrupt_model`. */
export async function trainingLinears(
  folder: string,
  config: ModelConfig,
  stored: StoredLlama,
  codes: CodeType,
): Promise<TrainingLinears> {
  const linears = namedLinears(config, stored);
  if (stored.head[0]!.kind === 'f32')
    return new Map([...linears].map(([name, [forward]]) => [name, { forward: forward!, back: undefined }]));
  const copies = (await readIndex(folder, codes)) ?? (await writeCopies(folder, codes, linears));
  return new Map(
    [...linears].map(([name, [linear]]) => {
      const { forward, back } = copies.get(name)!;
      return [name, { forward: forward ?? linear!, back }];
    }),
  );
}

/** Each in stretches of rows; only the head has several. */
function namedLinears(config: ModelConfig, stored: StoredLlama): Map<string, readonly StoredLinear[]> {
  const { headCount: N, kvHeadCount: G, headSize: D, ffnSize: F } = config;
  const named = new Map<string, readonly StoredLinear[]>([['head', stored.head]]);
  for (const [index, { qkv, output, gateUp, down }] of stored.layers.entries()) {
    const layer: Record<LayerLinear, StoredLinear> = {
      q: storedRows(qkv, 0, N * D),
      k: storedRows(qkv, N * D, (N + G) * D),
      v: storedRows(qkv, (N + G) * D, (N + 2 * G) * D),
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
  file: z.enum(CODE_TYPES.map(copiesFile)),
  offset: z.int(),
  bytes: z.int(),
});
const sizes = { outputs: z.int(), inputs: z.int(), values: rangeSchema, scales: rangeSchema };
const blockSize = z.literal(QUANT_BLOCK);
const productSchema = z.discriminatedUnion('kind', [
  z.strictObject({ kind: z.literal('q8'), blockSize, ...sizes, zeroPoints: rangeSchema }),
  z.strictObject({ kind: z.literal('columns'), codes: z.enum(CODE_TYPES), ...sizes }),
]);
/** `forward` is missing where the model's own weights are used. */
const copiesSchema = z.strictObject({ forward: productSchema.optional(), back: productSchema });
const indexSchema = z.record(z.string(), copiesSchema);
type Copies = Map<string, { forward?: StoredProduct | undefined; back: StoredProduct }>;

/** The index is written last. Undefined unless it exists and the file of the copies ends with the last of them. */
async function readIndex(folder: string, codes: CodeType): Promise<Copies | undefined> {
  const index = await readOwnJson(join(folder, indexFile(codes)), indexSchema);
  const copies = new Map(Object.entries(index ?? {}));
  const products = [...copies.values()].flatMap(({ forward, back }) => [back, ...(forward ? [forward] : [])]);
  const ends_bytes = products.map((product) => {
    const last = product.kind === 'q8' ? product.zeroPoints : product.scales;
    return last.offset + last.bytes;
  });
  return (await sizeOf(join(folder, copiesFile(codes)))) === Math.max(...ends_bytes) ? copies : undefined;
}

async function writeCopies(
  folder: string,
  codes: CodeType,
  linears: ReadonlyMap<string, readonly StoredLinear[]>,
): Promise<Copies> {
  await removeOldVersions(folder);
  const whole = join(folder, copiesFile(codes));
  await removeOldParts(whole);
  const part = partOf(whole);
  try {
    const copies = await fillCopies(folder, part, codes, linears);
    await rename(part, whole);
    await writeWhole(join(folder, indexFile(codes)), JSON.stringify(Object.fromEntries(copies)));
    return copies;
  } catch (error) {
    throw namingFile(whole, error);
  } finally {
    await rm(part, { force: true });
  }
}

/** Writes the copies to `part`. */
async function fillCopies(
  folder: string,
  part: string,
  codes: CodeType,
  linears: ReadonlyMap<string, readonly StoredLinear[]>,
): Promise<Copies> {
  const weights = await open(join(folder, WEIGHTS_FILE), 'r');
  try {
    const file = new WeightsFile(part, copiesFile(codes));
    try {
      const copies: Copies = new Map();
      for (const [name, stretches] of linears) {
        const outputs = stretches.reduce((sum, stretch) => sum + stretch.outputs, 0);
        const [{ kind, inputs }] = stretches as [StoredLinear];
        const rows = new Float32Array(outputs * inputs);
        let at = 0;
        for (const stretch of stretches) {
          rows.set(await dequantizeLinear(weights, stretch), at);
          at += stretch.outputs * inputs;
        }
        copies.set(name, storeCopies(file, codes, name, { kind, outputs, inputs }, rows));
      }
      return copies;
    } finally {
      file.close();
    }
  } finally {
    await weights.close();
  }
}

/** `rows`: the matrix in fp32, `[outputs, inputs]`. */
function storeCopies(
  file: WeightsFile,
  codes: CodeType,
  name: string,
  { kind, outputs, inputs }: Pick<StoredLinear, 'kind' | 'outputs' | 'inputs'>,
  rows: Float32Array,
) {
  if (INNER.has(name.slice(name.indexOf('.') + 1))) {
    const back = storeColumns(file, codes, rows, outputs, inputs);
    return innerKind(kind) === kind
      ? { back }
      : { forward: storeLinear(file, PLAIN_8_BITS, { rows, outputs, inputs }), back };
  }
  const columns = transpose(rows, outputs, inputs);
  const forward = storeColumns(file, codes, columns, inputs, outputs);
  const whole = QUANT_BLOCK * Math.ceil(outputs / QUANT_BLOCK);
  const filled = whole === outputs ? columns : widened(columns, inputs, outputs, whole);
  return { forward, back: storeLinear(file, PLAIN_8_BITS, { rows: filled, outputs: inputs, inputs: whole }) };
}

/** Row-major `[rows, columns]` with zeros behind each row, `[rows, wide]`. */
function widened(values: Float32Array, rows: number, columns: number, wide: number): Float32Array {
  const filled = new Float32Array(rows * wide);
  for (let row = 0; row < rows; row++)
    filled.set(values.subarray(row * columns, (row + 1) * columns), row * wide);
  return filled;
}

async function removeOldVersions(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    const version = /^training-v(\d+)(?:-[iu]8)?\.(?:bin|json)$/.exec(name)?.[1];
    if (version !== undefined && version !== String(VERSION)) await rm(join(folder, name), { force: true });
  }
}

/*
 * Products in the two quantized forms of a training step: blocks of 32 (`model/architectures/projections.ts`), and
 * columns with one scale each (DynamicQuantizeMatMul), whose activations share one scale a tensor.
 */

type StoredColumns = {
  readonly kind: 'columns';
  readonly codes: CodeType;
  readonly outputs: number;
  readonly inputs: number;
  /** `[inputs, outputs]`. */
  readonly values: WeightRange;
  /** `[outputs]`. */
  readonly scales: WeightRange;
};
type StoredProduct = StoredLinear | StoredColumns;

const CODE_MAX = 127;
/** The code of weight 0. */
const ZERO_CODE: Readonly<Record<CodeType, number>> = { i8: 0, u8: 128 };

/**
 * Signed codes wherever this machine multiplies them exactly; both types give the same bits then. Only signed codes use AMX, with
 * seven times the multiply-adds a second; VNNI computes both alike (`mlas/lib/platform.cpp`). CPUs with AVX2 and without VNNI
 * add up products of signed codes in 16 bits, which overflow: the gradients' cosine falls by 0.01.
 */
export const fastestCodes = async (): Promise<CodeType> => {
  signedAreExact ??= multipliesSignedExactly();
  return (await signedAreExact) ? 'i8' : 'u8';
};
let signedAreExact: Promise<boolean> | undefined;

/** Multiplies the largest codes that there are: if anything overflows, they do. */
async function multipliesSignedExactly(): Promise<boolean> {
  const [rows, inputs, outputs] = [8, 64, 16];
  const [activation, weight] = [255, CODE_MAX];
  const g = new GraphBuilder('signed_codes');
  const x = g.input('x', 'f32', [rows, inputs]);
  const bytes = new Uint8Array(inputs * outputs).fill(weight);
  const values = g.initializer('w', 'i8', [inputs, outputs], { kind: 'inline', bytes });
  const y = multiplyColumns(g, x, { codes: 'i8', values, scales: g.constant('f32', [1], [1]) });
  g.output(y, 'f32', [rows, outputs]);
  const session = await createSession(encodeModel(g.graph), { threads: 1, spinning: false });
  try {
    // Their least value is 0, so the runtime's scale is 1 and their code 255.
    const activations = new Float32Array(rows * inputs).fill(activation);
    const found = await session.run({ x: tensor('f32', activations, [rows, inputs]) }, [y.name]);
    return floats(found[y.name]!).every((value) => value === inputs * activation * weight);
  } finally {
    await session.release();
  }
}

/**
 * `weights`: row-major `[inputs, outputs]`. Symmetric quantization: a column's largest weight is 127 codes away from
 * the zero point.
 */
function storeColumns(
  file: WeightsFile,
  codes: CodeType,
  weights: Float32Array,
  inputs: number,
  outputs: number,
): StoredColumns {
  const scales = new Float32Array(outputs);
  for (let i = 0; i < weights.length; i++) {
    const size = Math.abs(weights[i]!);
    if (size > scales[i % outputs]!) scales[i % outputs] = size;
  }
  for (let column = 0; column < outputs; column++) scales[column]! /= CODE_MAX;
  const bytes = new Uint8Array(weights.length);
  for (let i = 0; i < bytes.length; i++) {
    const scale = scales[i % outputs]!;
    bytes[i] = ZERO_CODE[codes] + (scale === 0 ? 0 : Math.round(weights[i]! / scale));
  }
  const values = file.append(bytes);
  return { kind: 'columns', codes, outputs, inputs, values, scales: file.append(scales) };
}

/** The graph's name of the quantized values of the weights `name`; gradient rules look weights up by it. */
export const weightName = (name: string): string => `${name}.q`;

/**
 * Multiplies a gradient by a product's result with `back`, which gives the gradient by the product's input. Gradients of
 * different positions differ by orders of magnitude, so with columns each row is normalized before quantization with one
 * scale, and scaled back afterwards.
 */
export function multiplyGradient(
  g: GraphBuilder,
  gradient: Value,
  name: string,
  { forward, back: stored }: TrainingLinear & { readonly back: StoredProduct },
): Value {
  const { inputs } = stored;
  if (stored.kind !== 'columns') {
    const whole = withZeros(g, gradient, inputs - forward.outputs);
    return multiplyStored(g, whole, name, stored);
  }
  const { even, inverse } = withEvenRows(g, gradient, inputs);
  return g.op('Div', [multiplyStored(g, even, name, stored), inverse]);
}

/** x `[..., n]` → `[..., n + count]`. */
function withZeros(g: GraphBuilder, x: Value, count: number): Value {
  if (count === 0) return x;
  const [pads, zero, axes] = [
    g.constant('i64', [2], [0, count]),
    g.constant('f32', [], [0]),
    g.constant('i64', [1], [-1]),
  ];
  return g.op('Pad', [x, pads, zero, axes]);
}

/** x `[..., inputs]` → `[..., outputs]`. */
export function multiplyStored(g: GraphBuilder, x: Value, name: string, stored: StoredProduct): Value {
  if (stored.kind !== 'columns') return multiply(g, x, linear(g, name, stored));
  const { codes, inputs, outputs } = stored;
  const values = g.initializer(weightName(name), codes, [inputs, outputs], external(stored.values));
  const scales = g.initializer(`${name}.scales`, 'f32', [outputs], external(stored.scales));
  return multiplyColumns(g, x, { codes, values, scales });
}

type Columns = { readonly codes: CodeType; readonly values: Value; readonly scales: Value };

/** x `[..., inputs]` times codes `[inputs, outputs]` with a scale for each output. */
export function multiplyColumns(g: GraphBuilder, x: Value, { codes, values, scales }: Columns): Value {
  const zero = codes === 'u8' ? g.constant(codes, [1], [ZERO_CODE[codes]]) : undefined;
  return g.op('DynamicQuantizeMatMul', [x, values, scales, zero], {}, MICROSOFT);
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
