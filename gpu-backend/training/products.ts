/**
 * Products by frozen matrices in the two quantized forms of a training step: blocks of 32 (`model/linear.ts`), and
 * columns with one scale each (DynamicQuantizeMatMul), whose activations share one scale a tensor.
 */
import type { StoredLinear } from '../model/linear.ts';
import { linear, multiply } from '../model/linear.ts';
import type { WeightRange, WeightsFile } from '../model/weights-file.ts';
import { external } from '../model/weights-file.ts';
import type { GraphBuilder, Value } from '../onnx/graph.ts';
import { MICROSOFT } from '../onnx/graph.ts';

export type StoredColumns = {
  readonly kind: 'columns';
  readonly outputs: number;
  readonly inputs: number;
  /** i8, `[inputs, outputs]`. */
  readonly values: WeightRange;
  /** `[outputs]`. */
  readonly scales: WeightRange;
};
export type StoredProduct = StoredLinear | StoredColumns;

const CODE_MAX = 127;
/** Far below the mean square of any gradient row that matters; rows of zeros stay zeros. */
const ROW_EPSILON = 1e-30;

/** `weights`: row-major `[inputs, outputs]`. Symmetric; a column's largest weight takes the code ±127. */
export function storeColumns(
  file: WeightsFile,
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
  const codes = new Int8Array(weights.length);
  for (let i = 0; i < codes.length; i++) {
    const scale = scales[i % outputs]!;
    codes[i] = scale === 0 ? 0 : Math.round(weights[i]! / scale);
  }
  const values = file.append(new Uint8Array(codes.buffer));
  return { kind: 'columns', outputs, inputs, values, scales: file.append(scales) };
}

/** The name by which a gradient rule knows the weights that `multiplyStored` calls `name`. */
export const weightName = (name: string): string => `${name}.q`;

/**
 * A gradient `[..., inputs]` → `[..., outputs]`. Gradients of different positions differ in size by orders of
 * magnitude; before they share one scale, each row is brought to the same size, and back afterwards.
 */
export function multiplyGradient(
  g: GraphBuilder,
  gradient: Value,
  name: string,
  stored: StoredProduct,
): Value {
  if (stored.kind !== 'columns') return multiplyStored(g, gradient, name, stored);
  const { inputs } = stored;
  const ones = g.constant('f32', [inputs], Array<number>(inputs).fill(1));
  const attributes = { axis: -1, epsilon: { float: ROW_EPSILON } };
  const [even, inverse] = g.ops('SimplifiedLayerNormalization', [gradient, ones], 2, attributes);
  return g.op('Div', [multiplyStored(g, even!, name, stored), inverse!]);
}

/** x `[..., inputs]` → `[..., outputs]`. */
export function multiplyStored(g: GraphBuilder, x: Value, name: string, stored: StoredProduct): Value {
  if (stored.kind !== 'columns') return multiply(g, x, linear(g, name, stored));
  const { inputs, outputs } = stored;
  const values = g.initializer(weightName(name), 'i8', [inputs, outputs], external(stored.values));
  const scales = g.initializer(`${name}.scales`, 'f32', [outputs], external(stored.scales));
  return g.op('DynamicQuantizeMatMul', [x, values, scales], {}, MICROSOFT);
}
