/** Gradient rules of the fused operators that a language model is made of. Their weights are frozen. */
import { MICROSOFT } from '../onnx/graph.ts';
import type { Rule } from './rule.ts';
import { only, scalar } from './rule.ts';

function refuseTrained(op: string, wanted: boolean): void {
  if (wanted) throw new Error(`the weights of ${op} are frozen: no gradient by them`);
}

/**
 * RMS norm, y = w · n with n = x · r and r = (mean x² + ε)^-½ over the last axis:
 * ∂x = r · (w·g - n · mean(w·g·n)). n and r come from the same fused operator, with weights of 1.
 */
const rmsNorm: Rule = (c) => {
  const { g, node } = c;
  refuseTrained(node.op, c.wants(1));
  const last = c.shape(0).at(-1);
  if ((node.attributes.axis ?? -1) !== -1 || typeof last !== 'number')
    throw new Error(`${node.op} is differentiated over a last axis of known size`);
  const ones = g.constant('f32', [last], Array<number>(last).fill(1));
  const [normalized, inverse] = g.ops(node.op, [c.input(0), ones], 2, node.attributes);
  const weighted = g.op('Mul', [only(c), c.input(1)]);
  const axes = g.constant('i64', [1], [-1]);
  const along = g.op('ReduceMean', [g.op('Mul', [weighted, normalized!]), axes], { keepdims: 1 });
  const across = g.op('Sub', [weighted, g.op('Mul', [normalized!, along])]);
  return [g.op('Mul', [across, inverse!]), undefined];
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
  DynamicQuantizeMatMul: quantizedProduct,
};
