/**
 * A projection's weight in the graph, in one of the three kinds that the store keeps: MatMulNBits with 8 or
 * 4 bits (fast on CPU: VNNI kernels, activations quantized by blocks too), or fp32 as the reference.
 * Weights stay `[out, in]`, as files have them, so rows can be shared between initializers.
 */
import type { GraphBuilder, Value } from '../onnx/graph.ts';
import { MICROSOFT } from '../onnx/graph.ts';
import { quantBlock, quantizeRows } from './quantize.ts';
import type { WeightKind } from './types.ts';
import type { WeightRange, WeightsFile } from './weights-file.ts';
import { external, slice } from './weights-file.ts';

export type Linear =
  | {
      readonly kind: 'nbits';
      readonly bits: 4 | 8;
      readonly outputs: number;
      readonly inputs: number;
      readonly values: Value;
      readonly scales: Value;
    }
  | { readonly kind: 'f32'; readonly outputs: number; readonly inputs: number; readonly values: Value };

/** A matrix as it lies in the weights file, before it has a name in a graph. */
export type StoredLinear = {
  readonly kind: WeightKind;
  readonly outputs: number;
  readonly inputs: number;
  readonly values: WeightRange;
  readonly scales: WeightRange | undefined;
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
  if (kind === 'f32') return { kind, outputs, inputs, values: file.append(weights), scales: undefined };
  const { values, scales } = quantizeRows(weights, outputs, inputs, BITS[kind]);
  return { kind, outputs, inputs, values: file.append(values), scales: file.append(scales) };
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
  const block = quantBlock(bits, inputs);
  const shape = [outputs, inputs / block, (block * bits) / 8];
  return {
    kind: 'nbits',
    bits,
    outputs,
    inputs,
    values: g.initializer(`${name}.q`, 'u8', shape, external(stored.values)),
    scales: g.initializer(`${name}.scales`, 'f32', [outputs, inputs / block], external(stored.scales!)),
  };
}

/** x `[..., inputs]` → `[..., outputs]`, named `output`: inputs · outputs multiply-adds a row. */
export function multiply(g: GraphBuilder, x: Value, weight: Linear, output = g.fresh('linear')): Value {
  if (weight.kind === 'f32') {
    g.node('FusedMatMul', [x, weight.values], [output], { transB: 1 }, MICROSOFT);
  } else {
    const { inputs: K, outputs: N, bits } = weight;
    const attributes = { K, N, bits, block_size: quantBlock(bits, K), accuracy_level: 4 };
    g.node('MatMulNBits', [x, weight.values, weight.scales], [output], attributes, MICROSOFT);
  }
  return { name: output };
}
