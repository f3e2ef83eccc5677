/** Gradient rules of elementwise operators, sums and matrix products. y = op(x), g = ∂loss/∂y. */
import type { Value } from '../onnx/graph.ts';
import { MICROSOFT } from '../onnx/graph.ts';
import type { Rule, RuleContext } from './rule.ts';
import { only, scalar, unbroadcast, zerosLike } from './rule.ts';
import { axisOf } from './shapes.ts';

/** For an elementwise operator of two inputs: `by(index)` is the gradient before broadcasting is undone. */
const elementwise =
  (by: (context: RuleContext, index: number) => Value): Rule =>
  (context) =>
    [0, 1].map((index) =>
      context.wants(index)
        ? unbroadcast(context.g, by(context, index), context.outputShape(0), context.shape(index))
        : undefined,
    );

/** For y = f(x). */
const unary =
  (by: (context: RuleContext) => Value): Rule =>
  (context) => [by(context)];

/** g by a sum over `axes`: the same value at every summed place. */
function spread(context: RuleContext, gradient: Value): Value {
  const { g, node } = context;
  const kept = node.attributes.keepdims === 0 ? g.op('Unsqueeze', [gradient, context.input(1)]) : gradient;
  return g.op('Expand', [kept, g.op('Shape', [context.input(0)])]);
}

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

export const arithmeticRules: { readonly [op: string]: Rule } = {
  Identity: unary(only),
  Neg: unary((c) => c.g.op('Neg', [only(c)])),
  Add: elementwise(only),
  Sub: elementwise((c, index) => (index === 0 ? only(c) : c.g.op('Neg', [only(c)]))),
  Mul: elementwise((c, index) => c.g.op('Mul', [only(c), c.input(1 - index)])),
  // y = a / b: ∂a = g / b, ∂b = -g · y / b.
  Div: elementwise((c, index) => {
    const quotient = c.g.op('Div', [only(c), c.input(1)]);
    return index === 0 ? quotient : c.g.op('Neg', [c.g.op('Mul', [quotient, c.output(0)])]);
  }),
  Sqrt: unary((c) => c.g.op('Div', [only(c), c.g.op('Mul', [c.output(0), scalar(c.g, 2)])])),
  Sigmoid: unary((c) => {
    const y = c.output(0);
    return c.g.op('Mul', [only(c), c.g.op('Mul', [y, c.g.op('Sub', [scalar(c.g, 1), y])])]);
  }),
  ReduceSum: (c) => [spread(c, only(c)), undefined],
  ReduceMean: (c) => {
    const shape = c.g.op('Cast', [c.g.op('Size', [c.input(0)])], { to: 1 });
    const means = c.g.op('Cast', [c.g.op('Size', [c.output(0)])], { to: 1 });
    return [spread(c, c.g.op('Div', [only(c), c.g.op('Div', [shape, means])])), undefined];
  },
  // y = softmax(x): ∂x = y · (g - Σ g·y).
  Softmax: unary((c) => {
    const y = c.output(0);
    const gradient = only(c);
    const axis = axisOf((c.node.attributes.axis as number) ?? -1, c.outputShape(0));
    const axes = c.g.constant('i64', [1], [axis]);
    const sum = c.g.op('ReduceSum', [c.g.op('Mul', [gradient, y]), axes], { keepdims: 1 });
    return c.g.op('Mul', [y, c.g.op('Sub', [gradient, sum])]);
  }),
  // y = log softmax(x): ∂x = g - exp(y) · Σ g.
  LogSoftmax: unary((c) => {
    const gradient = only(c);
    const axis = axisOf((c.node.attributes.axis as number) ?? -1, c.outputShape(0));
    const sum = c.g.op('ReduceSum', [gradient, c.g.constant('i64', [1], [axis])], { keepdims: 1 });
    return c.g.op('Sub', [gradient, c.g.op('Mul', [c.g.op('Exp', [c.output(0)]), sum])]);
  }),
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
  GatherElements: (c) => {
    const { axis = 0 } = c.node.attributes;
    const zeros = zerosLike(c.g, c.input(0));
    return [
      c.g.op('ScatterElements', [zeros, c.input(1), only(c)], { axis: axis as number, reduction: 'add' }),
      undefined,
    ];
  },
};
