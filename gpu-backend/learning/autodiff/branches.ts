/**
 * The gradient of `If`: a second `If` on the same condition, whose branches carry the gradient back through the
 * branches of the first. Forward values that a branch's rules need become outputs of the first `If`; the other branch
 * outputs empty tensors in their place. With `recompute`, the second `If` computes these values again instead. A branch
 * that does not run costs nothing in either direction.
 */
import type { Graph, GraphBuilder, Node, Value } from '../../onnx/graph.ts';
import { zerosLike } from './rules.ts';
import { inferShapes, type Shape, type Shapes, shapeOf } from './shapes.ts';

/** Where a walk begins: a value, and the loss's gradient by it (of the same shape). */
export type Seed = { readonly value: Value; readonly gradient: Value };

export type GradientOptions = {
  /** Shapes of values that `shapes.ts` does not infer, by name. */
  readonly shapes?: ReadonlyMap<string, Shape>;
  /** For quantized products: the function x ↦ x·W, by the name of W's values. */
  readonly transposed?: ReadonlyMap<string, (g: GraphBuilder, gradient: Value) => Value>;
  /**
   * Values inside branches are computed again for the gradient instead of being kept (gradient checkpointing, Chen et
   * al., 2016; each `If` is a segment): less memory, one more forward pass.
   */
  readonly recompute?: boolean | undefined;
};

/** One graph (the whole, or a branch of an `If`) to walk back through, and where its gradient nodes go. */
export type Walk = {
  readonly graph: Graph;
  readonly shapes: Shapes;
  readonly g: GraphBuilder;
  readonly options: GradientOptions;
  /** The value in `g` that stands for a forward value. */
  resolve(name: string): Value;
  /** Puts another node in a forward node's place. */
  replace(index: number, node: Node): void;
};

/** Gradients by name, of every value between `targets` and the seeds. */
export type Reverse = (
  walk: Walk,
  seeds: readonly Seed[],
  targets: ReadonlySet<string>,
) => Map<string, Value>;

export const isIf = (node: Node): boolean => node.op === 'If';

/** A node's inputs, and what its branches read of the graph around them. */
export function namesReadBy(node: Node): readonly string[] {
  if (!isIf(node)) return node.inputs;
  return [...node.inputs, ...BRANCHES.flatMap((key) => captured(branch(node, key)))];
}

const BRANCHES = ['then_branch', 'else_branch'] as const;

/** Gradients by the `wanted` names around the `If` at `index`, given those by its outputs (`found`). */
export function differentiateBranches(
  walk: Walk,
  index: number,
  found: ReadonlyMap<string, Value>,
  wantedNames: readonly string[],
  reverse: Reverse,
): Map<string, Value> {
  const { g, graph } = walk;
  const node = graph.nodes[index]!;
  const wanted = [...new Set(wantedNames)].filter((name) => !node.inputs.includes(name));
  const saved: Saved[] = [];
  const made = BRANCHES.map((key) =>
    g.subgraph(`back_${key}`, (b) => {
      const forward = branch(node, key);
      const seeds = forward.outputs.flatMap(({ name }, i) => {
        const gradient = found.get(node.outputs[i]!);
        return gradient === undefined ? [] : [{ value: { name }, gradient }];
      });
      const inner = branchWalk(walk, forward, node.outputs, b, key === 'then_branch' ? saved : undefined);
      const gradients = reverse(inner, seeds, new Set(wanted));
      for (const name of wanted) {
        // A branch's output must be computed in it.
        const gradient = b.op('Identity', [gradients.get(name) ?? zerosLike(b, walk.resolve(name))]);
        b.output(gradient, 'f32', shapeOf(walk.shapes, name));
      }
    }),
  );
  if (saved.length > 0) walk.replace(index, withSaved(g, node, saved));
  const outputs = g.ops('If', [walk.resolve(node.inputs[0]!)], wanted.length, {
    then_branch: { graph: made[0]! },
    else_branch: { graph: made[1]! },
  });
  return new Map(wanted.map((name, i) => [name, outputs[i]!]));
}

type Saved = { readonly inner: string; readonly outer: string; readonly shape: Shape };

/**
 * A walk over a branch. The gradient's branch declares the weights and constants again; forward values are saved or
 * recomputed.
 */
function branchWalk(
  outer: Walk,
  graph: Graph,
  outputs: readonly string[],
  b: GraphBuilder,
  saved: Saved[] | undefined,
): Walk {
  const shapes = inferShapes(graph, outer.shapes);
  const initializers = new Map(graph.initializers.map((item) => [item.name, item]));
  const computed = new Set(graph.nodes.flatMap(({ outputs }) => outputs));
  const known = new Map<string, Value>();
  const find = (name: string): Value => {
    const initializer = initializers.get(name);
    if (initializer !== undefined) {
      return b.initializer(b.fresh(name), initializer.type, initializer.shape, initializer.data);
    }
    if (!computed.has(name)) return outer.resolve(name);
    const output = graph.outputs.findIndex((info) => info.name === name);
    if (output >= 0) return outer.resolve(outputs[output]!);
    if (outer.options.recompute === true) return again(name);
    if (saved === undefined) throw new Error(`the gradient of an else branch needs its value ${name}`);
    const value = { name: b.fresh('saved') };
    saved.push({ inner: name, outer: value.name, shape: shapeOf(shapes, name) });
    return value;
  };
  const resolve = (name: string): Value => {
    const value = known.get(name) ?? find(name);
    known.set(name, value);
    return value;
  };
  /** Recomputes a value: copies its node, and the nodes that it depends on, into the gradient's branch. */
  const again = (name: string): Value => {
    const node = graph.nodes.find(({ outputs }) => outputs.includes(name))!;
    const inputs = node.inputs.map((input) => (input === '' ? undefined : resolve(input)));
    const outputs = node.outputs.map((output) => (output === '' ? '' : b.fresh(node.op)));
    b.node(node.op, inputs, outputs, node.attributes, node.domain);
    node.outputs.forEach((output, i) => {
      known.set(output, { name: outputs[i]! });
    });
    return known.get(name)!;
  };
  return {
    graph,
    shapes,
    g: b,
    options: outer.options,
    resolve,
    replace: () => {
      throw new Error('an If inside a branch of an If is not differentiated');
    },
  };
}

/** The forward node with more outputs: saved values, empty where the other branch ran. */
function withSaved(g: GraphBuilder, node: Node, saved: readonly Saved[]): Node {
  const run = branch(node, 'then_branch');
  const outputs = saved.map(({ inner, shape }) => ({ name: inner, type: 'f32' as const, shape }));
  const thenGraph = { ...run, outputs: [...run.outputs, ...outputs] };
  const elseGraph = withEmpties(g, branch(node, 'else_branch'), saved);
  return {
    ...node,
    outputs: [...node.outputs, ...saved.map(({ outer }) => outer)],
    attributes: { then_branch: { graph: thenGraph }, else_branch: { graph: elseGraph } },
  };
}

function withEmpties(g: GraphBuilder, graph: Graph, saved: readonly Saved[]): Graph {
  const result = {
    ...graph,
    nodes: [...graph.nodes],
    initializers: [...graph.initializers],
    outputs: [...graph.outputs],
  };
  for (const { shape } of saved) {
    const info = { name: g.fresh('none'), type: 'f32' as const, shape: shape.map(() => 0) };
    const constant = g.fresh('empty');
    result.initializers.push({ ...info, name: constant, data: { kind: 'inline', bytes: new Uint8Array(0) } });
    result.nodes.push({
      op: 'Identity',
      domain: '',
      inputs: [constant],
      outputs: [info.name],
      attributes: {},
    });
    result.outputs.push(info);
  }
  return result;
}

function branch(node: Node, key: (typeof BRANCHES)[number]): Graph {
  const attribute = node.attributes[key];
  if (typeof attribute !== 'object' || !('graph' in attribute)) throw new Error(`If without ${key}`);
  return attribute.graph;
}

/** Names that a branch reads but does not make. */
function captured(graph: Graph): string[] {
  const own = new Set([
    ...graph.initializers.map(({ name }) => name),
    ...graph.nodes.flatMap(({ outputs }) => outputs),
  ]);
  const read = graph.nodes.flatMap((node) => [...namesReadBy(node)]);
  return [...new Set(read)].filter((name) => name !== '' && !own.has(name));
}
