/**
 * Products with signed codes of 8 bits and one scale an output. CPUs with AMX multiply whole matrices of such codes seven
 * times as fast as codes in blocks; other CPUs multiply them, too, to the same bits.
 *
 * An activation is rounded to two codes: the second rounds what the first leaves, in steps 126 times as fine. So no precision
 * is lost although all rows share one scale, and a row's result does not depend on the rows beside it. That scale needs
 * a bound of the activations: a row whose mean square is at most 1 has no value above √inputs.
 *
 * Codes of activations have 7 bits. CPUs with AVX2 and without VNNI add pairs of products in 16 bits, and two products of 127
 * and 127 are the most that fits.
 *
 * Limits: the weights are read once, a byte each, and multiplied twice. With AMX the nodes around a product cost more than
 * the product: about 5 µs each for a single token.
 */
import { type GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';

export type Columns = {
  readonly outputs: number;
  readonly inputs: number;
  /** i8 `[inputs, outputs]`, a constant of the outer graph. */
  readonly values: Value;
  /** `[outputs]`. */
  readonly scales: Value;
};

/** Codes of activations are 1 to 127, and this is 0's. */
const ZERO_CODE = 64;
const STEPS = 63;
/** The second code's steps in one of the first. */
const FINER = 2 * STEPS;

/** Weights of a matrix that stays in a core's cache between two products: 2 MB. */
const CACHED_WEIGHTS_MAX = 2 ** 21;

/**
 * x `[rows, ..., inputs]`, whose rows have a mean square of at most 1 → `[rows, ..., outputs]`, named `output`. With hundreds of
 * rows, `manyRows`, copies of the activations and results cost more than reading the weights twice.
 */
export function multiplyByColumn(
  g: GraphBuilder,
  x: Value,
  columns: Columns,
  output: string,
  manyRows = false,
): Value {
  const { inputs, outputs, values, scales } = columns;
  const scalar = (size: number) => g.constant('f32', [], [size]);
  const zero = g.constant('u8', [], [ZERO_CODE]);
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
