/**
 * Linear layers and the embedding in a graph: `MatMulNBits` with 8 or 4 bits (fast on CPUs: VNNI kernels, activations
 * quantized in blocks too), 8 bits by column (`column-products.ts`, for CPUs with AMX), or fp32 as the reference. Every matrix
 * has its own form.
 * Weights stay `[out, in]`, as in model files, so that initializers can share rows. Only codes by column are `[in, out]`, as
 * their product reads them: transposing would take as long as all the rest of opening a graph.
 */
import {
  type FloatType,
  type Graph,
  type GraphBuilder,
  MICROSOFT,
  type Value,
  withBranches,
} from '../../onnx/graph.ts';
import {
  blocksOf,
  checkForm,
  type MatrixCodes,
  type MatrixForm,
  packColumns,
  packRows,
  type QuantCodes,
  type QuantForm,
  roundRows,
} from '../quantization/quantize.ts';
import { external, slice, type WeightRange, type WeightsFile } from '../weights-file.ts';
import { type Columns, multiplyPairs, multiplyRows, type Rotation, rotated } from './column-products.ts';
import { type Matrix, rotationMatrix } from './rotation.ts';

type Shape = { readonly outputs: number; readonly inputs: number };

export type Linear = Shape & { readonly values: Value; readonly rotation?: Rotation } & (
    | { readonly kind: 'f32' }
    | (QuantForm & { readonly kind: 'nbits'; readonly scales: Value; readonly zeroPoints: Value })
    | (Columns & { readonly kind: 'q8-columns' })
  );

/** A matrix in the weights file. */
export type StoredLinear = Shape & {
  readonly values: WeightRange;
  /** The graph rotates the inputs, `size` neighbours together, by `matrix` `[size, size]`. */
  readonly rotation?: { readonly size: number; readonly matrix: WeightRange };
} & (
    | { readonly kind: 'f32' }
    | {
        readonly kind: 'q8' | 'q4';
        readonly blockSize: QuantForm['blockSize'];
        readonly scales: WeightRange;
        readonly zeroPoints: WeightRange;
      }
    | {
        readonly kind: 'q8-columns';
        readonly scales: WeightRange;
        /** The matrix is some outputs of a wider matrix, from output `from` on; `values` are those of the wider matrix. */
        readonly from: number;
        readonly width: number;
      }
  );
/** Codes in blocks. */
export type StoredCodes = Extract<StoredLinear, { readonly zeroPoints: WeightRange }>;
/** A matrix whose rows are contiguous. */
export type StoredRows = Exclude<StoredLinear, { readonly kind: 'q8-columns' }>;

export const formOf = ({ kind, blockSize }: Pick<StoredCodes, 'kind' | 'blockSize'>): QuantForm => ({
  bits: kind === 'q8' ? 8 : 4,
  blockSize,
});

/** Writes a matrix rounded to nearest; `form` undefined: fp32. */
export function storeLinear(
  file: WeightsFile,
  form: QuantForm | undefined,
  { rows, outputs, inputs }: Matrix,
): StoredRows {
  if (form === undefined) return { kind: 'f32', outputs, inputs, values: file.append(rows) };
  return storeCodes(file, roundRows(rows, outputs, inputs, form));
}

export function storeCodes(file: WeightsFile, codes: QuantCodes): StoredCodes;
export function storeCodes(file: WeightsFile, codes: MatrixCodes): StoredLinear;
export function storeCodes(file: WeightsFile, codes: MatrixCodes): StoredLinear {
  const { rows: outputs, columns: inputs } = codes;
  if (!('blockSize' in codes)) {
    const [values, scales] = [file.append(packColumns(codes)), file.append(codes.scales)];
    return { kind: 'q8-columns', outputs, inputs, values, scales, from: 0, width: outputs };
  }
  const { bits, blockSize } = codes;
  const { values, scales, zeroPoints } = packRows(codes);
  return {
    kind: bits === 8 ? 'q8' : 'q4',
    blockSize,
    outputs,
    inputs,
    values: file.append(values),
    scales: file.append(scales),
    zeroPoints: file.append(zeroPoints),
  };
}

/** For all matrices whose inputs the graph rotates so; empty when `size` is 1. */
export const storeRotation = (file: WeightsFile, size: number): Pick<StoredLinear, 'rotation'> =>
  size === 1 ? {} : { rotation: { size, matrix: file.append(rotationMatrix(size)) } };

/** Reserves room for a matrix that is written later; `form` undefined: fp32. */
export function reserveLinear(
  file: WeightsFile,
  form: MatrixForm | undefined,
  outputs: number,
  inputs: number,
): StoredLinear {
  if (form === undefined) return { kind: 'f32', outputs, inputs, values: file.reserve(4 * outputs * inputs) };
  if (form === 'columns') {
    const [values, scales] = [file.reserve(outputs * inputs), file.reserve(4 * outputs)];
    return { kind: 'q8-columns', outputs, inputs, values, scales, from: 0, width: outputs };
  }
  checkForm(inputs, form);
  const blocks = blocksOf(inputs, form);
  return {
    kind: form.bits === 8 ? 'q8' : 'q4',
    blockSize: form.blockSize,
    outputs,
    inputs,
    values: file.reserve((outputs * inputs * form.bits) / 8),
    scales: file.reserve(4 * outputs * blocks),
    zeroPoints: file.reserve(outputs * Math.ceil((blocks * form.bits) / 8)),
  };
}

/** Rows `from` to `to` of a stored matrix: another view of the same bytes. */
export function storedRows(stored: StoredLinear, from: number, to: number): StoredLinear {
  const cut = (range: WeightRange): WeightRange => {
    const row_bytes = range.bytes / stored.outputs;
    return slice(range, from * row_bytes, (to - from) * row_bytes);
  };
  const outputs = to - from;
  switch (stored.kind) {
    case 'f32':
      return { ...stored, outputs, values: cut(stored.values) };
    case 'q8-columns':
      return { ...stored, outputs, from: stored.from + from, scales: cut(stored.scales) };
    default: {
      const { values, scales, zeroPoints } = stored;
      return { ...stored, outputs, values: cut(values), scales: cut(scales), zeroPoints: cut(zeroPoints) };
    }
  }
}

/** Bytes of a stored matrix, with its scales and zero points, when floats have the type `floatType`. */
export function storedBytes(stored: StoredLinear, floatType: FloatType = 'f32'): number {
  const floats = ({ bytes }: WeightRange) => (floatType === 'f32' ? bytes : bytes / 2);
  if (stored.kind === 'f32') return floats(stored.values);
  const zeroPoints_bytes = stored.kind === 'q8-columns' ? 0 : stored.zeroPoints.bytes;
  return stored.values.bytes + floats(stored.scales) + zeroPoints_bytes;
}

/** Makes initializers of a stored matrix. */
export function linear(g: GraphBuilder, name: string, stored: StoredLinear): Linear {
  const weight = storedWeights(g, name, stored);
  if (stored.rotation === undefined) return weight;
  const { size, matrix: range } = stored.rotation;
  const matrix = g.initializer(`${name}.rotation`, 'f32', [size, size], external(range));
  return { ...weight, rotation: { size, matrix } };
}

function storedWeights(g: GraphBuilder, name: string, stored: StoredLinear): Linear {
  const { outputs, inputs } = stored;
  if (stored.kind === 'f32') {
    const values = g.initializer(name, 'f32', [outputs, inputs], external(stored.values));
    return { kind: 'f32', outputs, inputs, values };
  }
  if (stored.kind === 'q8-columns') {
    const { from, width } = stored;
    const all = g.initializer(`${name}.columns`, 'i8', [inputs, width], external(stored.values));
    // The runtime cuts once, when it opens the graph.
    const values = outputs === width ? all : outputsOf(g, all, from, from + outputs);
    const scales = g.initializer(`${name}.scales`, 'f32', [outputs], external(stored.scales));
    return { kind: stored.kind, outputs, inputs, values, scales };
  }
  const form = formOf(stored);
  const block_bytes = (form.blockSize * form.bits) / 8;
  const values: readonly number[] = [outputs, blocksOf(inputs, form), block_bytes];
  return { ...form, kind: 'nbits', outputs, inputs, ...codeTensors(g, name, stored, values, 'bytes') };
}

/** Outputs `from` to `to` of codes `[inputs, outputs]`. */
function outputsOf(g: GraphBuilder, codes: Value, from: number, to: number): Value {
  return g.op('Slice', [codes, g.ints(from), g.ints(to), g.ints(1)]);
}

/**
 * The three tensors of a matrix in blocks; `values` is the shape of its codes. Products read bytes, and gathering on a device
 * reads codes of four bits as elements. `stored-llama.ts` finds them by their names.
 */
function codeTensors(
  g: GraphBuilder,
  name: string,
  stored: StoredCodes,
  values: readonly number[],
  as: 'bytes' | 'an element a code',
) {
  const { outputs, inputs, scales, zeroPoints } = stored;
  const form = formOf(stored);
  const blocks = blocksOf(inputs, form);
  const perRow = as === 'bytes' ? Math.ceil((blocks * form.bits) / 8) : blocks;
  const type = as === 'bytes' || form.bits === 8 ? 'u8' : 'u4';
  return {
    values: g.initializer(`${name}.q`, type, values, external(stored.values)),
    scales: g.initializer(`${name}.scales`, 'f32', [outputs, blocks], external(scales)),
    zeroPoints: g.initializer(`${name}.zeros`, type, [outputs, perRow], external(zeroPoints)),
  };
}

/**
 * x `[..., inputs]` → `[..., outputs]`, named `output`; inputs · outputs multiply-adds a row. Where the weights have a rotation, x
 * is `[B, S, inputs]` and is rotated first.
 */
export function multiply(g: GraphBuilder, x: Value, weight: Linear, output = g.fresh('linear')): Value {
  const { rotation } = weight;
  const factor = rotation ? rotated(g, x, weight.inputs, rotation) : x;
  switch (weight.kind) {
    case 'f32':
      g.node('FusedMatMul', [factor, weight.values], [output], { transB: 1 }, MICROSOFT);
      return { name: output };
    case 'nbits': {
      const { inputs: K, outputs: N, bits, blockSize, values, scales, zeroPoints } = weight;
      const attributes = { K, N, bits, block_size: blockSize, accuracy_level: 4 };
      g.node('MatMulNBits', [factor, values, scales, zeroPoints], [output], attributes, MICROSOFT);
      return { name: output };
    }
    case 'q8-columns':
      return multiplyRows(g, factor, weight, output);
  }
}

/**
 * A matrix with a row for each token of the vocabulary, `[V, H]`: the head or the embedding. Stretches of rows, first rows
 * first, may have different forms.
 */
export type VocabularyMatrix<Stretch extends StoredLinear = StoredLinear> = readonly Stretch[];

/** The names of a stretch's initializers begin with this. */
export const stretchName = (matrix: 'head' | 'embedding', stretch: number): string =>
  stretch === 0 ? matrix : `${matrix}_${stretch}`;

/** x `[..., H]` → logits `[..., V]`, named `logits`. */
export function headLogits(g: GraphBuilder, x: Value, head: VocabularyMatrix): Value {
  const weights = head.map((stored, i) => linear(g, stretchName('head', i), stored));
  // With one code another token is the likeliest in 0.7 % more of the positions.
  const product = (weight: Linear, output?: string) =>
    weight.kind === 'q8-columns' ? multiplyPairs(g, x, weight, output) : multiply(g, x, weight, output);
  if (weights.length === 1) return product(weights[0]!, 'logits');
  const parts = weights.map((weight) => product(weight));
  g.node('Concat', parts, ['logits'], { axis: -1 });
  return { name: 'logits' };
}

/** The graph with products in blocks that compute in fp32, without rounding activations to 8 bits. */
export const withExactProducts = (graph: Graph): Graph => ({
  ...graph,
  nodes: graph.nodes.map((node) => {
    const attributes = withBranches(node.attributes, withExactProducts);
    return {
      ...node,
      attributes: 'accuracy_level' in attributes ? { ...attributes, accuracy_level: EXACT } : attributes,
    };
  }),
});
/** The `accuracy_level` of `MatMulNBits` that means fp32. */
const EXACT = 1;

/*
 * From token ids to the first value of the residual stream.
 *
 * Shapes: S = tokens, H = hidden, V = vocabulary.
 */

export type StoredEmbedding = {
  /** The same ranges as the head's when the two are stored once. */
  readonly rows: VocabularyMatrix<StoredRows>;
  /** fp32 `[H, H]`: turns a row from the head's basis into the stream's; undefined when they are the same. */
  readonly correction: { readonly values: WeightRange; readonly size: number } | undefined;
};

/** The first value of the residual stream, `[B, S, H]`. */
export function embed(g: GraphBuilder, tokenIds: Value, { rows, correction }: StoredEmbedding): Value {
  const embedded = vocabularyRows(g, tokenIds, rows);
  if (correction === undefined) return embedded;
  const shape = [correction.size, correction.size];
  return g.op('MatMul', [
    embedded,
    g.initializer('embedding_correction', 'f32', shape, external(correction.values)),
  ]);
}

/** One row for each token, `[B, S, H]`. */
function vocabularyRows(g: GraphBuilder, tokenIds: Value, stretches: VocabularyMatrix<StoredRows>): Value {
  const [first, ...others] = stretches;
  if (others.length === 0) return stretchRows(g, tokenIds, 'embedding', first!);
  const int = (value: number) => g.constant('i64', [], [value]);
  const lastAxis = g.ints(-1);
  // Each stretch gives a row for every token. Where it lacks the token, the row is one of its own and is not taken.
  let from = 0;
  let rows: Value | undefined;
  for (const [i, stored] of stretches.entries()) {
    const ids = i === 0 ? tokenIds : g.op('Sub', [tokenIds, int(from)]);
    const within = g.op('Clip', [ids, int(0), int(stored.outputs - 1)]);
    const own = stretchRows(g, within, stretchName('embedding', i), stored);
    const isBefore = () => g.op('Unsqueeze', [g.op('Less', [ids, int(0)]), lastAxis]);
    rows = rows === undefined ? own : g.op('Where', [isBefore(), rows, own]);
    from += stored.outputs;
  }
  return rows!;
}

/** Rows of one stretch, dequantized if it is quantized. */
function stretchRows(g: GraphBuilder, tokenIds: Value, name: string, stored: StoredRows): Value {
  const { outputs: V, inputs: H } = stored;
  if (stored.kind === 'f32') {
    return g.op('Gather', [g.initializer(name, 'f32', [V, H], external(stored.values)), tokenIds]);
  }
  const { bits, blockSize } = formOf(stored);
  const { values, scales, zeroPoints } = codeTensors(g, name, stored, [V, H], 'an element a code');
  const attributes = { gather_axis: 0, quantize_axis: 1, block_size: blockSize, bits };
  return g.op('GatherBlockQuantized', [values, tokenIds, scales, zeroPoints], attributes, MICROSOFT);
}
