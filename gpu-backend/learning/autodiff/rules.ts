/**
 * The table of gradient rules: operator → nodes that carry a gradient from its outputs to its inputs. It has the
 * operators that training steps differentiate. In formulas y = op(x) and g = ∂loss/∂y.
 */
import { type GraphBuilder, MICROSOFT, type Node, type Value } from '../../onnx/graph.ts';
import { axisOf, type Shape } from './shapes.ts';

export type RuleContext = {
  /** Where gradient nodes are appended. */
  readonly g: GraphBuilder;
  readonly node: Node;
  /** An input or output of the node, as seen from where gradient nodes go. Asking for a branch's value saves it. */
  input(index: number): Value;
  output(index: number): Value;
  shape(index: number): Shape;
  outputShape(index: number): Shape;
  /** The loss's gradient by an output; undefined where the loss does not depend on it. */
  gradient(index: number): Value | undefined;
  /** Whether the gradient by this input is wanted. */
  wants(index: number): boolean;
  /** x ↦ x·W for a frozen quantized weight W `[out, in]`, by the name of its values. */
  transposed(weight: string): (g: GraphBuilder, gradient: Value) => Value;
};

/** Gradients by the node's inputs, in order; undefined where a gradient is not wanted. */
type Rule = (context: RuleContext) => readonly (Value | undefined)[];

/* Elementwise operators and matrix products. */

/** For an elementwise operator of two inputs: `by(index)` is the gradient before it is summed over broadcast axes. */
const elementwise =
  (by: (context: RuleContext, index: number) => Value): Rule =>
  (context) =>
    [0, 1].map((index) =>
      context.wants(index)
        ? unbroadcast(context.g, by(context, index), context.outputShape(0), context.shape(index))
        : undefined,
    );

/** y = α · A · B or A · Bᵀ, with broadcast batches. ∂A = α · g · Bᵀ, ∂B = α · Aᵀ · g. */
const product: Rule = (context) => {
  const { g, node } = context;
  const { transA = 0, transB = 0, transBatchA = 0, transBatchB = 0, alpha = { float: 1 } } = node.attributes;
  if (transA !== 0 || transBatchA !== 0 || transBatchB !== 0)
    throw new Error(`${node.op} is differentiated with transB alone`);
  const multiply = (a: Value, b: Value, transpose: { transA?: number; transB?: number }) =>
    g.op('FusedMatMul', [a, b], { transA: 0, transB: 0, ...transpose, alpha }, MICROSOFT);
  const batch = context.outputShape(0).slice(0, -2);
  const undo = (value: Value, index: number) => {
    const shape = context.shape(index);
    return unbroadcast(g, value, [...batch, ...shape.slice(-2)], shape);
  };
  const gradient = only(context);
  return [
    context.wants(0)
      ? undo(multiply(gradient, context.input(1), { transB: transB === 1 ? 0 : 1 }), 0)
      : undefined,
    context.wants(1)
      ? undo(
          transB === 1
            ? multiply(gradient, context.input(0), { transA: 1 })
            : multiply(context.input(0), gradient, { transA: 1 }),
          1,
        )
      : undefined,
  ];
};

const arithmeticRules: { readonly [op: string]: Rule } = {
  Identity: (c) => [only(c)],
  Add: elementwise(only),
  Sub: elementwise((c, index) => (index === 0 ? only(c) : c.g.op('Neg', [only(c)]))),
  Mul: elementwise((c, index) => c.g.op('Mul', [only(c), c.input(1 - index)])),
  Where: (c) => {
    const gradient = only(c);
    const zero = scalar(c.g, 0);
    const part = (index: number, arms: [Value, Value]) =>
      c.wants(index)
        ? unbroadcast(c.g, c.g.op('Where', [c.input(0), ...arms]), c.outputShape(0), c.shape(index))
        : undefined;
    return [undefined, part(1, [gradient, zero]), part(2, [zero, gradient])];
  },
  MatMul: product,
  FusedMatMul: product,
};

/* Operators that only move values. */

const axisAttribute = (c: RuleContext): number => axisOf((c.node.attributes.axis as number) ?? 0, c.shape(0));

const layoutRules: { readonly [op: string]: Rule } = {
  Reshape: (c) => [c.g.op('Reshape', [only(c), c.g.op('Shape', [c.input(0)])]), undefined],
  Transpose: (c) => {
    const perm = c.node.attributes.perm as readonly number[];
    return [c.g.op('Transpose', [only(c)], { perm: perm.map((_, axis) => perm.indexOf(axis)) })];
  },
  Split: (c) => {
    const parts = c.node.outputs.map((_, i) => c.gradient(i) ?? zerosLike(c.g, c.output(i)));
    return [c.g.op('Concat', parts, { axis: axisAttribute(c) }), undefined];
  },
  // Zeros behind the last axis. Of other Pads no shape is known, so asking for it refuses them.
  Pad: (c) => {
    c.outputShape(0);
    return [firstOf(c.g, only(c), c.shape(0).at(-1) as number)];
  },
  // The first of the last axis.
  Slice: (c) => {
    const missing = (c.shape(0).at(-1) as number) - (c.outputShape(0).at(-1) as number);
    return [c.g.op('Pad', [only(c), c.g.ints(0, missing), scalar(c.g, 0), c.g.ints(-1)])];
  },
  // Rows of x by index; a row that is gathered twice gets the sum of both gradients.
  Gather: (c) => {
    if (axisAttribute(c) !== 0) throw new Error('Gather is differentiated along axis 0 alone');
    const indices = c.g.op('Unsqueeze', [c.input(1), c.g.ints(-1)]);
    return [
      c.g.op('ScatterND', [zerosLike(c.g, c.input(0)), indices, only(c)], { reduction: 'add' }),
      undefined,
    ];
  },
};

/* The fused operators that a language model is made of. Their weights are frozen. */

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
  const axes = g.ints(-1);
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

/**
 * y = x · t with t = (1 + tanh u) / 2 and u = c · (x + a·x³): ∂x = g · (t + x · 2 · t · (1 - t) · c · (1 + 3a·x²)), as
 * tanh' = 1 - tanh² is 4t·(1 - t).
 */
const fastGelu: Rule = (c) => {
  const { g } = c;
  const x = c.input(0);
  const square = g.op('Mul', [x, x]);
  const along = (of: number, constant: number) =>
    g.op('Add', [g.op('Mul', [square, scalar(g, of)]), scalar(g, constant)]);
  // Twice u, as t is the logistic function of that.
  const [c2, a] = [2 * Math.sqrt(2 / Math.PI), 0.044715];
  const t = g.op('Sigmoid', [g.op('Mul', [x, along(c2 * a, c2)])]);
  const inner = g.op('Mul', [x, g.op('Mul', [g.op('Sub', [scalar(g, 1), t]), along(3 * c2 * a, c2)])]);
  const slope = g.op('Mul', [t, g.op('Add', [inner, scalar(g, 1)])]);
  return [g.op('Mul', [only(c), slope])];
};

/** A rotation is undone by the opposite angle: the same with -sin. */
const rotary: Rule = (c) => {
  const inputs = [only(c), c.input(1), c.input(2), c.g.op('Neg', [c.input(3)])];
  return [c.g.op('RotaryEmbedding', inputs, c.node.attributes, MICROSOFT)];
};

/**
 * Causal attention of whole sequences, o = P·V with P = softmax(Q·Kᵀ): ∂V = Pᵀ·∂o, ∂P = ∂o·Vᵀ, ∂S = P · (∂P - Σ ∂P·P),
 * ∂Q = ∂S·K, ∂K = ∂Sᵀ·Q, where Σ ∂P·P over keys is Σ ∂o·o over a head (FlashAttention, Dao et al., 2022). With a window P is 0
 * outside of it. The node keeps K, V and P by head. The query heads of a KV head are one matrix here, `[B, G, S·N/G, …]`.
 */
const attention: Rule = (c) => {
  const { g, node } = c;
  const { num_heads: N, kv_num_heads: G, scale, do_rotary } = node.attributes;
  if (typeof N !== 'number' || typeof G !== 'number' || (scale as { float: number }).float !== 1)
    throw new Error(`${node.op} is differentiated with scale 1 alone`);
  const width = c.outputShape(1).at(-1) as number;
  const isPacked = node.inputs[1] === '';
  const sin = do_rotary === 1 ? c.input(8) : undefined;
  const turned = (value: Value, heads: number, by: Value | undefined) =>
    by === undefined ? value : turnedHeads(c, value, heads, width, by);
  const grouped = (value: Value) => g.reshape(value, 0, G, -1, 0);
  const multiply = (a: Value, b: Value, transpose: { transA?: number; transB?: number } = {}) =>
    g.op('FusedMatMul', [a, b], transpose, MICROSOFT);

  const unturned = isPacked ? firstOf(g, c.input(0), N * width) : c.input(0);
  const queries = grouped(turned(byHead(g, unturned, N), N, sin));
  const [keys, values, probabilities] = [c.output(1), c.output(2), grouped(c.output(3))];
  const ofOutput = grouped(byHead(g, only(c), N));
  const ofProbabilities = multiply(ofOutput, values, { transB: 1 });
  const sums = grouped(dotsByHead(g, only(c), c.output(0), N));
  const ofScores = g.op('Mul', [probabilities, g.op('Sub', [ofProbabilities, sums])]);
  const ofQueries = g.reshape(multiply(ofScores, keys), 0, N, -1, width);
  const ofKeys = multiply(ofScores, queries, { transA: 1 });
  const ofValues = multiply(probabilities, ofOutput, { transA: 1 });

  const back = sin && g.op('Neg', [sin]);
  const parts = [turned(ofQueries, N, back), turned(ofKeys, G, back), ofValues];
  return isPacked ? [inRows(g, g.op('Concat', parts, { axis: 1 }))] : parts.map((part) => inRows(g, part));
};

/** `[B, S, heads·D]` → `[B, heads, S, D]`. */
const byHead = (g: GraphBuilder, value: Value, heads: number): Value =>
  g.op('Transpose', [g.reshape(value, 0, 0, heads, -1)], { perm: [0, 2, 1, 3] });

/** Σ a·b over each head of `[B, S, heads·D]`, `[B, heads, S, 1]`. */
function dotsByHead(g: GraphBuilder, a: Value, b: Value, heads: number): Value {
  const products = g.reshape(g.op('Mul', [a, b]), 0, 0, heads, -1);
  const sums = g.op('ReduceSum', [products, g.ints(-1)], { keepdims: 1 });
  return g.op('Transpose', [sums], { perm: [0, 2, 1, 3] });
}

/** `[B, heads, S, D]` → `[B, S, heads·D]`. */
const inRows = (g: GraphBuilder, value: Value): Value =>
  g.reshape(g.op('Transpose', [value], { perm: [0, 2, 1, 3] }), 0, 0, -1);

/** Rotary embedding of `[B, heads, S, D]`, as `GroupQueryAttention` applies it to whole sequences. */
const turnedHeads = (
  { g, input }: RuleContext,
  value: Value,
  heads: number,
  width: number,
  sin: Value,
): Value =>
  g.op(
    'RotaryEmbedding',
    [value, g.ints(0), input(7), sin],
    { num_heads: heads, rotary_embedding_dim: width },
    MICROSOFT,
  );

/** y = x · Wᵀ with W quantized: ∂x = g · W, from a second copy of W that is quantized along its other axis. */
const quantizedProduct: Rule = (c) => [c.transposed(c.node.inputs[1]!)(c.g, only(c))];

const modelRules: { readonly [op: string]: Rule } = {
  SimplifiedLayerNormalization: rmsNorm,
  QuickGelu: quickGelu,
  FastGelu: fastGelu,
  RotaryEmbedding: rotary,
  GroupQueryAttention: attention,
  MatMulNBits: quantizedProduct,
  DynamicQuantizeMatMul: quantizedProduct,
};

export const RULES: { readonly [op: string]: Rule } = { ...arithmeticRules, ...layoutRules, ...modelRules };

/* What rules share. */

/** The gradient by the node's only output. */
function only(context: RuleContext): Value {
  const gradient = context.gradient(0);
  if (gradient === undefined) throw new Error(`no gradient arrives at ${context.node.outputs[0]}`);
  return gradient;
}

/** Sums a gradient of shape `from` over the axes along which an input of shape `to` was broadcast. */
function unbroadcast(g: GraphBuilder, gradient: Value, from: Shape, to: Shape): Value {
  const lead = from.length - to.length;
  const axes = from.flatMap((size, i) => (i < lead || (to[i - lead] === 1 && size !== 1) ? [i] : []));
  if (axes.length === 0) return gradient;
  const summed = g.op('ReduceSum', [gradient, g.ints(...axes)], { keepdims: 1 });
  if (lead === 0) return summed;
  const leading = Array.from({ length: lead }, (_, i) => i);
  return g.op('Squeeze', [summed, g.ints(...leading)]);
}

/** The first `count` along the last axis. */
const firstOf = (g: GraphBuilder, value: Value, count: number): Value =>
  g.op('Slice', [value, g.ints(0), g.ints(count), g.ints(-1)]);

const scalar = (g: GraphBuilder, value: number): Value => g.constant('f32', [], [value]);

export const zerosLike = (g: GraphBuilder, value: Value): Value =>
  g.op('ConstantOfShape', [g.op('Shape', [value])]);
