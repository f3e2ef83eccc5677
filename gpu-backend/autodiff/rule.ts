/** What a gradient rule sees of a node, and small pieces that rules share. */
import type { GraphBuilder, Node, Value } from '../onnx/graph.ts';
import type { Shape } from './shapes.ts';

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

/** Gradients by the node's inputs, in their order; undefined for those not wanted. */
export type Rule = (context: RuleContext) => readonly (Value | undefined)[];

/** The gradient by the node's only output. */
export function only(context: RuleContext): Value {
  const gradient = context.gradient(0);
  if (gradient === undefined) throw new Error(`no gradient arrives at ${context.node.outputs[0]}`);
  return gradient;
}

/** Sums a gradient of shape `from` over the axes along which an input of shape `to` was broadcast. */
export function unbroadcast(g: GraphBuilder, gradient: Value, from: Shape, to: Shape): Value {
  const lead = from.length - to.length;
  const axes = from.flatMap((size, i) => (i < lead || (to[i - lead] === 1 && size !== 1) ? [i] : []));
  if (axes.length === 0) return gradient;
  const summed = g.op('ReduceSum', [gradient, g.constant('i64', [axes.length], axes)], { keepdims: 1 });
  if (lead === 0) return summed;
  const leading = Array.from({ length: lead }, (_, i) => i);
  return g.op('Squeeze', [summed, g.constant('i64', [lead], leading)]);
}

export const scalar = (g: GraphBuilder, value: number): Value => g.constant('f32', [], [value]);

export const zerosLike = (g: GraphBuilder, value: Value): Value =>
  g.op('ConstantOfShape', [g.op('Shape', [value])]);
