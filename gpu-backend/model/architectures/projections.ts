/**
 * A projection's weight in the graph, in one of the three kinds that the store keeps: MatMulNBits with 8 or
 * 4 bits (fast on CPU: VNNI kernels, activations quantized by blocks too), or fp32 as the reference.
 * Weights stay `[out, in]`, as files have them, so rows can be shared between initializers.
 */
import { type GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import type { WeightKind } from '../model-source.ts';
import { QUANT_BLOCK, quantizeRows } from '../quantize.ts';
import { external, slice, type WeightRange, type WeightsFile } from '../weights-file.ts';

export type Linear =
  | {
      readonly kind: 'nbits';
      readonly bits: 4 | 8;
      readonly outputs: number;
      readonly inputs: number;
      readonly values: Value;
      readonly scales: Value;
      readonly zeroPoints: Value | undefined;
    }
  | { readonly kind: 'f32'; readonly outputs: number; readonly inputs: number; readonly values: Value };

/** A matrix as it lies in the weights file, before it has a name in a graph. */
export type StoredLinear = {
  readonly kind: WeightKind;
  readonly outputs: number;
  readonly inputs: number;
  readonly values: WeightRange;
  readonly scales: WeightRange | undefined;
  readonly zeroPoints: WeightRange | undefined;
};

const BITS = { q8: 8, q4: 4 } as const;

/** Quantizes if the kind says so, and writes. `weights` is row-major `[outputs, inputs]`. */
export function storeLinear(
  file: WeightsFile,
  kind: WeightKind,
  weights: Float32Array,
  outputs: number,
  inputs: number,
): StoredLinear {
  const shape = { kind, outputs, inputs };
  if (kind === 'f32') {
    return { ...shape, values: file.append(weights), scales: undefined, zeroPoints: undefined };
  }
  const { values, scales, zeroPoints } = quantizeRows(weights, outputs, inputs, BITS[kind]);
  return {
    ...shape,
    values: file.append(values),
    scales: file.append(scales),
    zeroPoints: zeroPoints && file.append(zeroPoints),
  };
}

/** Rows `from` to `to` of a stored matrix: another view of the same bytes. */
export function storedRows(stored: StoredLinear, from: number, to: number): StoredLinear {
  const cut = (range: WeightRange): WeightRange => {
    const row_bytes = range.bytes / stored.outputs;
    return slice(range, from * row_bytes, (to - from) * row_bytes);
  };
  return {
    kind: stored.kind,
    outputs: to - from,
    inputs: stored.inputs,
    values: cut(stored.values),
    scales: stored.scales && cut(stored.scales),
    zeroPoints: stored.zeroPoints && cut(stored.zeroPoints),
  };
}

/** Names a stored matrix in the graph. */
export function linear(g: GraphBuilder, name: string, stored: StoredLinear): Linear {
  const { outputs, inputs } = stored;
  if (stored.kind === 'f32') {
    return {
      kind: 'f32',
      outputs,
      inputs,
      values: g.initializer(name, 'f32', [outputs, inputs], external(stored.values)),
    };
  }
  const bits = BITS[stored.kind];
  const blocks = [outputs, inputs / QUANT_BLOCK];
  const values = g.initializer(
    `${name}.q`,
    'u8',
    [...blocks, (QUANT_BLOCK * bits) / 8],
    external(stored.values),
  );
  const scales = g.initializer(`${name}.scales`, 'f32', blocks, external(stored.scales!));
  const zeroPoints =
    stored.zeroPoints && g.initializer(`${name}.zeros`, 'u8', blocks, external(stored.zeroPoints));
  return { kind: 'nbits', bits, outputs, inputs, values, scales, zeroPoints };
}

/** x `[..., inputs]` → `[..., outputs]`, named `output`: inputs · outputs multiply-adds a row. */
export function multiply(g: GraphBuilder, x: Value, weight: Linear, output = g.fresh('linear')): Value {
  if (weight.kind === 'f32') {
    g.node('FusedMatMul', [x, weight.values], [output], { transB: 1 }, MICROSOFT);
  } else {
    const { inputs: K, outputs: N, bits } = weight;
    const attributes = { K, N, bits, block_size: QUANT_BLOCK, accuracy_level: 4 };
    g.node(
      'MatMulNBits',
      [x, weight.values, weight.scales, weight.zeroPoints],
      [output],
      attributes,
      MICROSOFT,
    );
  }
  return { name: output };
}

/*
 * From token ids to the first value of the residual stream.
 *
 * Shapes: S = tokens, H = hidden, V = vocabulary.
 */

export type StoredEmbedding = {
  /** `[V, H]`; the same ranges as the head when the embeddings are tied. */
  readonly rows: StoredLinear;
  /** fp32 `[H, H]` that a row is multiplied by, where the head's basis differs from the stream's. */
  readonly correction: { readonly values: WeightRange; readonly size: number } | undefined;
};

/** The first value of the residual stream, `[B, S, H]`. */
export function embed(g: GraphBuilder, tokenIds: Value, { rows, correction }: StoredEmbedding): Value {
  const embedded = embeddingRows(g, tokenIds, rows);
  if (correction === undefined) return embedded;
  const shape = [correction.size, correction.size];
  return g.op('MatMul', [
    embedded,
    g.initializer('embedding_correction', 'f32', shape, external(correction.values)),
  ]);
}

/** One row a token: dequantized from the 8 or 4 bits that the head multiplies by. */
function embeddingRows(g: GraphBuilder, tokenIds: Value, stored: StoredLinear): Value {
  const { outputs: V, inputs: H } = stored;
  if (stored.kind === 'f32') {
    return g.op('Gather', [g.initializer('embedding', 'f32', [V, H], external(stored.values)), tokenIds]);
  }
  const bits = stored.kind === 'q8' ? 8 : 4;
  const blocks = [V, H / QUANT_BLOCK];
  const values = g.initializer('embedding.q', 'u8', [V, (H * bits) / 8], external(stored.values));
  const scales = g.initializer('embedding.scales', 'f32', blocks, external(stored.scales!));
  const zeroPoints =
    stored.zeroPoints && g.initializer('embedding.zeros', 'u8', blocks, external(stored.zeroPoints));
  const attributes = { gather_axis: 0, quantize_axis: 1, block_size: QUANT_BLOCK, bits };
  return g.op('GatherBlockQuantized', [values, tokenIds, scales, zeroPoints], attributes, MICROSOFT);
}
