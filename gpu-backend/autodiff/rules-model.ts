/** Gradient rules of the fused operators that a language model is made of. Their weights are frozen. */
import { MICROSOFT } from '../onnx/graph.ts';
import type { Rule } from './rule.ts';
import { only, scalar } from './rule.ts';

function refuseTrained(op: string, wanted: boolean): void {
  if (wanted) throw new Error(`the weights of ${op} are frozen: no gradient by them`);
}

/**
 * RMS norm, y = w · x · r with r = (mean x² + ε)^-½ over the last axis of size H:
 * ∂x = r · (w·g - x · r² · Σ(w·g·x) / H).
 */
const rmsNorm: Rule = (c) => {
  const { g, node } = c;
  refuseTrained(node.op, c.wants(1));
  const last = c.shape(0).at(-1);
  const { axis = -1, epsilon = { float: 1e-5 } } = node.attributes;
  if (axis !== -1 || typeof last !== 'number')
    throw new Error(`${node.op} is differentiated over a last axis`);
  const x = c.input(0);
  const axes = g.constant('i64', [1], [-1]);
  const weighted = g.op('Mul', [only(c), c.input(1)]);
  const meanSquare = g.op('Div', [g.op('ReduceSumSquare', [x, axes], { keepdims: 1 }), scalar(g, last)]);
  const inverse = g.op('Reciprocal', [
    g.op('Sqrt', [g.op('Add', [meanSquare, scalar(g, (epsilon as { float: number }).float)])]),
  ]);
  const sum = g.op('ReduceSum', [g.op('Mul', [weighted, x]), axes], { keepdims: 1 });
  const squared = g.op('Mul', [inverse, inverse]);
  const along = g.op('Div', [g.op('Mul', [sum, squared]), scalar(g, last)]);
  return [g.op('Mul', [inverse, g.op('Sub', [weighted, g.op('Mul', [x, along])])]), undefined];
};

/** y = x · σ(αx): ∂x = g · (σ + α · y · (1 - σ)). */
const quickGelu: Rule = (c) => {
  const { g } = c;
  const alpha = (c.node.attributes.alpha as { float: number } | undefined)?.float ?? 1.702;
  const x = c.input(0);
  const sigmoid = g.op('Sigmoid', [alpha === 1 ? x : g.op('Mul', [x, scalar(g, alpha)])]);
  const y = alpha === 1 ? c.output(0) : g.op('Mul', [c.output(0), scalar(g, alpha)]);
  const slope = g.op('Add', [sigmoid, g.op('Mul', [y, g.op('Sub', [scalar(g, 1), sigmoid])])]);
  return [g.op('Mul', [only(c), slope])];
};

/** A rotation is undone by the opposite angle: the same with -sin. */
const rotary: Rule = (c) => {
  const inputs = [only(c), c.input(1), c.input(2), c.g.op('Neg', [c.input(3)])];
  return [c.g.op('RotaryEmbedding', inputs, c.node.attributes, MICROSOFT)];
};

/** y = x · Wᵀ with W quantized: ∂x = g · W, from a second copy of W that is quantized along its other axis. */
const quantizedProduct: Rule = (c) => [c.transposed(c.node.inputs[1]!)(c.g, only(c))];

export const modelRules: { readonly [op: string]: Rule } = {
  SimplifiedLayerNormalization: rmsNorm,
  QuickGelu: quickGelu,
  RotaryEmbedding: rotary,
  MatMulNBits: quantizedProduct,
};
