/**
 * Shapes of a graph's values, as far as the rules of `rules.ts` need them: which axes a gradient must be summed
 * over where an operator broadcast its inputs, and how a saved value is declared. Free sizes keep their names.
 */
import type { Dimension, Graph, Node } from '../../onnx/graph.ts';

export type Shape = readonly Dimension[];
export type Shapes = Map<string, Shape>;

/**
 * Shapes of everything that `graph` computes, by name. `outer`: shapes of the values around a branch. Operators outside
 * the table get no shape; `shapeOf` throws when a rule needs it.
 */
export function inferShapes(graph: Graph, outer: ReadonlyMap<string, Shape> = new Map()): Shapes {
  const shapes: Shapes = new Map(outer);
  for (const { name, shape } of [...graph.inputs, ...graph.initializers]) shapes.set(name, shape);
  const constants = new Map(graph.initializers.map((item) => [item.name, item]));
  const integers = (name: string): number[] | undefined => {
    const data = constants.get(name)?.data;
    if (data?.kind !== 'inline' || constants.get(name)!.type !== 'i64') return undefined;
    return [...new BigInt64Array(data.bytes.slice().buffer)].map(Number);
  };
  for (const node of graph.nodes) inferNode(node, shapes, integers);
  return shapes;
}

/** @throws Error naming the value when its shape is unknown. */
export function shapeOf(shapes: ReadonlyMap<string, Shape>, name: string): Shape {
  const shape = shapes.get(name);
  if (shape === undefined) throw new Error(`the shape of ${name} is not known: declare it`);
  return shape;
}

function inferNode(node: Node, shapes: Shapes, integers: (name: string) => number[] | undefined): void {
  const branch = node.attributes.then_branch;
  if (typeof branch === 'object' && 'graph' in branch) {
    node.outputs.forEach((name, i) => {
      shapes.set(name, branch.graph.outputs[i]!.shape);
    });
    return;
  }
  const { product } = node;
  if (product !== undefined) {
    const of = shapes.get(product.input);
    if (of !== undefined) shapes.set(node.outputs[0]!, [...of.slice(0, -1), product.outputs]);
    return;
  }
  const inputs = node.inputs.map((name) => shapes.get(name));
  const infer = TABLE[node.op];
  if (infer === undefined || inputs[0] === undefined) return;
  const found = infer({ node, inputs, first: inputs[0], integers: (i) => integers(node.inputs[i] ?? '') });
  node.outputs.forEach((name, i) => {
    const shape = found?.[i];
    if (name !== '' && shape !== undefined) shapes.set(name, shape);
  });
}

type Facts = {
  readonly node: Node;
  readonly inputs: readonly (Shape | undefined)[];
  readonly first: Shape;
  /** A constant integer input. */
  integers(index: number): number[] | undefined;
};
type Infer = (facts: Facts) => readonly (Shape | undefined)[] | undefined;

const same: Infer = ({ first }) => [first];
const elementwise: Infer = ({ inputs }) => {
  const known = inputs.filter((shape) => shape !== undefined);
  return known.length === inputs.length ? [known.reduce(broadcast)] : undefined;
};
const matrices: Infer = ({ first, inputs: [, second], node }) => {
  if (second === undefined) return undefined;
  const { transA = 0, transB = 0 } = node.attributes;
  const rows = first.at(transA === 1 ? -1 : -2)!;
  const columns = second.at(transB === 1 ? -2 : -1)!;
  return [[...broadcast(first.slice(0, -2), second.slice(0, -2)), rows, columns]];
};

const TABLE: { readonly [op: string]: Infer } = {
  Add: elementwise,
  Sub: elementwise,
  Mul: elementwise,
  Identity: same,
  Cast: same,
  QuickGelu: same,
  FastGelu: same,
  Softmax: same,
  SimplifiedLayerNormalization: same,
  RotaryEmbedding: same,
  MatMul: matrices,
  FusedMatMul: matrices,
  MatMulNBits: ({ first, node }) => [[...first.slice(0, -1), node.attributes.N as number]],
  DynamicQuantizeMatMul: ({ first, inputs }) => [[...first.slice(0, -1), inputs[1]!.at(-1)!]],
  Transpose: ({ first, node }) => [(node.attributes.perm as readonly number[]).map((axis) => first[axis]!)],
  Gather: ({ first, inputs: [, indices], node }) => {
    const axis = axisOf((node.attributes.axis as number) ?? 0, first);
    return indices && [[...first.slice(0, axis), ...indices, ...first.slice(axis + 1)]];
  },
  GatherBlockQuantized: ({ inputs: [, indices, scales], node }) =>
    indices && scales && [[...indices, (scales.at(-1) as number) * (node.attributes.block_size as number)]],
  GroupQueryAttention: ({ first: [B, S, width], node }) => {
    const { num_heads: N, kv_num_heads: G } = node.attributes as { num_heads: number; kv_num_heads: number };
    const isPacked = node.inputs[1] === '';
    const D = (width as number) / (isPacked ? N + 2 * G : N);
    const kept = [B!, G, S!, D];
    return [[B!, S!, N * D], kept, kept, [B!, N, S!, S!]];
  },
  Where: elementwise,
  // At the end of the last axis alone; other cuts get no shape.
  Pad: ({ first, integers }) => {
    const pads = integers(1);
    const axis = integers(3)?.[0] ?? -1;
    const isLast = axisOf(axis, first) === first.length - 1 && pads?.slice(0, -1).every((n) => n === 0);
    return isLast ? [[...first.slice(0, -1), (first.at(-1) as number) + pads!.at(-1)!]] : undefined;
  },
  Slice: ({ first, integers }) => {
    const [start, end, axis] = [1, 2, 3].map((index) => integers(index)?.[0]);
    const isFirst = start === 0 && end !== undefined && axis !== undefined;
    return isFirst && axisOf(axis, first) === first.length - 1 ? [[...first.slice(0, -1), end]] : undefined;
  },
  Split: ({ first, node, integers }) => {
    const axis = axisOf((node.attributes.axis as number) ?? 0, first);
    return integers(1)?.map((size) => first.map((whole, i) => (i === axis ? size : whole)));
  },
  Reshape: ({ first, integers }) => {
    const target = integers(1);
    return target && [reshaped(first, target)];
  },
};

/** ONNX `Reshape`: 0 keeps a size, -1 takes what is left. */
function reshaped(from: Shape, target: readonly number[]): Shape {
  const left = from.filter((_, i) => target[i] !== 0);
  const fixed = target.filter((size) => size > 0).reduce((all, size) => all * size, 1);
  const numbers = left.filter((size) => typeof size === 'number').reduce((all, size) => all * size, 1);
  const names = left.filter((size) => typeof size === 'string');
  const rest = names.length === 0 ? numbers / fixed : `${[...names, numbers / fixed].join('*')}`;
  return target.map((size, i) => (size === 0 ? from[i]! : size === -1 ? rest : size));
}

/** NumPy's rule. A free dimension is compatible only with itself or 1. */
function broadcast(a: Shape, b: Shape): Shape {
  const rank = Math.max(a.length, b.length);
  return Array.from({ length: rank }, (_, i) => {
    const x = a[i - rank + a.length] ?? 1;
    const y = b[i - rank + b.length] ?? 1;
    if (x !== y && x !== 1 && y !== 1) throw new Error(`shapes [${a.join()}] and [${b.join()}] do not match`);
    return x === 1 ? y : x;
  });
}

export const axisOf = (axis: number, shape: Shape): number => (axis < 0 ? axis + shape.length : axis);
