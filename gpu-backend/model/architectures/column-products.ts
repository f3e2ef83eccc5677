/**
 * Products with signed codes of 8 bits and one scale an output. CPUs with AMX multiply whole matrices of such codes seven
 * times as fast as codes in blocks; other CPUs multiply them, too, to the same bits (`onnx/signed-codes.ts`).
 *
 * Activations are rounded in one of three ways. In the first two a row's result does not depend on the rows beside it:
 * - `multiplyRows`, in layers: one code with a scale for each row, whose values are of similar size once they are rotated
 *   (`rotation.ts`). Gradients have it, too.
 * - `multiplyPairs`, for the head and in training steps: two codes; the second rounds what the first leaves, in steps 126 times as
 *   fine. So no precision is lost although all rows share one scale. That scale needs a bound of the activations: a row whose mean
 *   square is at most 1 has no value above √inputs.
 * - `multiplyTensor`, in training steps alone: one code, and all rows share the scale of the largest value.
 *
 * Limits: the weights are read once, a byte each, and pairs multiply them twice. With AMX the nodes around a product cost more
 * than the product: about 5 µs each for a single token.
 */
import { type GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import { rotationMatrix } from './rotation.ts';

export type Columns = {
  readonly outputs: number;
  readonly inputs: number;
  /** i8 `[inputs, outputs]`, a constant of the outer graph. */
  readonly values: Value;
  /** `[outputs]`. */
  readonly scales: Value;
};

/** The code of 0, and how far from it the code of a row's largest value is. */
const [ROW_ZERO, ROW_STEPS] = [128, 127];
/** No step is near half of this. */
const HUGE = 1e30;

/**
 * x `[..., inputs]` → `[..., outputs]`, named `output`. A row of zeros has a step of 0, so whatever its codes are, its product is
 * 0. A single token pays for each node, so there are few.
 */
export function multiplyRows(g: GraphBuilder, x: Value, columns: Columns, output = g.fresh('rows')): Value {
  const { inputs, values, scales } = columns;
  const last = g.ints(-1);
  const most = g.op('ReduceMax', [g.op('Abs', [x]), last], { keepdims: 1 });
  const steps = g.op('Div', [most, g.constant('f32', [1], [ROW_STEPS])]);
  // If x has no rows, the runtime's reductions keep its shape.
  const step = g.op('Slice', [steps, g.ints(0), g.ints(1), g.ints(-1)]);
  const [one, zero] = [g.constant('f32', [], [1]), g.constant('u8', [], [ROW_ZERO])];
  // The code of 0 for each row, in one node.
  const zeros = g.op('QuantizeLinear', [step, g.constant('f32', [], [HUGE]), zero]);
  // One block a row: by `axis` of the rows, the runtime starts its threads anew for each of them.
  const codes = g.op('QuantizeLinear', [x, step, zeros], { axis: -1, block_size: inputs });
  const product = g.op('MatMulIntegerToFloat', [codes, values, one, scales, zero], {}, MICROSOFT);
  g.node('Mul', [product, step], [output]);
  return { name: output };
}

/** `size` neighbours of a row are rotated together (`rotation.ts`); `matrix` `[size, size]`. */
export type Rotation = { readonly size: number; readonly matrix: Value };

/** The rotation of `size` neighbours with its matrix in the graph; `storeRotation` has it in the weights file. */
export const constantRotation = (g: GraphBuilder, size: number): Rotation => ({
  size,
  matrix: g.constant('f32', [size, size], [...rotationMatrix(size)]),
});

/** x `[B, S, width]`, or with another number of leading axes, rotated: `size` multiply-adds a value. */
export function rotated(
  g: GraphBuilder,
  x: Value,
  width: number,
  { size, matrix }: Rotation,
  leadingAxes = 2,
): Value {
  const leading = Array<number>(leadingAxes).fill(0);
  const apart = g.reshape(x, ...leading, width / size, size);
  return g.reshape(g.op('MatMul', [apart, matrix]), ...leading, width);
}

/** x `[..., inputs]` → `[..., outputs]`. */
export const multiplyTensor = (
  g: GraphBuilder,
  x: Value,
  { values, scales }: Omit<Columns, 'inputs' | 'outputs'>,
): Value => g.op('DynamicQuantizeMatMul', [x, values, scales], {}, MICROSOFT);

/** Codes of pairs are 1 to 127, and this is 0's. */
const PAIR_ZERO = 64;
const STEPS = 63;
/** The second code's steps in one of the first. */
const FINER = 2 * STEPS;

/** Weights of a matrix that stays in a core's cache between two products: 2 MB. */
const CACHED_WEIGHTS_MAX = 2 ** 21;

/**
 * x `[rows, ..., inputs]`, whose rows have a mean square of at most 1 → `[rows, ..., outputs]`, named `output`. With hundreds of
 * rows, `manyRows`, copies of the activations and results cost more than reading the weights twice.
 */
export function multiplyPairs(
  g: GraphBuilder,
  x: Value,
  columns: Columns,
  output = g.fresh('pairs'),
  manyRows = false,
): Value {
  const { inputs, outputs, values, scales } = columns;
  const scalar = (size: number) => g.constant('f32', [], [size]);
  const zero = g.constant('u8', [], [PAIR_ZERO]);
  const coarse = Math.sqrt(inputs) / STEPS;
  const [step, fineStep] = [scalar(coarse), scalar(coarse / FINER)];
  const first = g.op('QuantizeLinear', [x, step, zero]);
  const left = g.op('Sub', [x, g.op('DequantizeLinear', [first, step, zero])]);
  const second = g.op('QuantizeLinear', [left, fineStep, zero]);
  const product = (codes: Value, size: Value) =>
    g.op('MatMulIntegerToFloat', [codes, values, size, scales, zero], {}, MICROSOFT);
  const both = (): readonly (Value | undefined)[] => {
    if (manyRows || inputs * outputs <= CACHED_WEIGHTS_MAX)
      return [product(first, step), product(second, fineStep)];
    // One product of both reads the weights once, and needs three nodes more.
    const codes = g.op('Concat', [first, second], { axis: 0 });
    const [large, small] = g.ops('Split', [product(codes, step)], 2, { axis: 0, num_outputs: 2 });
    return [large, g.op('Mul', [small, scalar(1 / FINER)])];
  };
  g.node('Add', both(), [output]);
  return { name: output };
}

/** Far below the mean square of any row that matters; rows of zeros stay zeros. */
const ROW_EPSILON = 1e-30;

/**
 * x `[..., inputs]` with each row divided by its root mean square, and the inverses of these, `[..., 1]`. Columns are multiplied by
 * `scales` `[inputs]` in the same pass, if they are given.
 */
export function withEvenRows(
  g: GraphBuilder,
  x: Value,
  inputs: number,
  scales?: Value,
): { even: Value; inverse: Value } {
  const weights = scales ?? g.constant('f32', [inputs], Array<number>(inputs).fill(1));
  const attributes = { axis: -1, epsilon: { float: ROW_EPSILON } };
  const [even, inverse] = g.ops('SimplifiedLayerNormalization', [x, weights], 2, attributes);
  return { even: even!, inverse: inverse! };
}
