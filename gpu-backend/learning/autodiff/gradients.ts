/**
 * Reverse-mode automatic differentiation of graphs: `gradients` appends the nodes that compute the derivatives of a
 * loss. It walks once from the last node to the first, over the nodes between a target and the loss; the table in
 * `rules.ts` has the rule of each operator (the form of tinygrad's gradient.py).
 *
 * Forward values that the rules need stay in memory until the backward pass; `recompute` frees those inside branches.
 */
import type { Graph, GraphBuilder, Node, Value } from '../../onnx/graph.ts';
import type { GradientOptions, Reverse, Seed, Walk } from './branches.ts';
import { differentiateBranches, isIf, namesReadBy } from './branches.ts';
import type { RuleContext } from './rules.ts';
import { RULES } from './rules.ts';
import { inferShapes, shapeOf } from './shapes.ts';

/**
 * The gradients of the loss by `targets`, in the same order and shapes.
 * @throws Error naming an operator that has no rule, or a target that the loss does not depend on.
 */
export function gradients(
  g: GraphBuilder,
  seeds: readonly Seed[],
  targets: readonly Value[],
  options: GradientOptions = {},
): Value[] {
  const walk: Walk = {
    graph: { ...g.graph, nodes: [...g.graph.nodes] },
    shapes: inferShapes(g.graph, options.shapes),
    g,
    options,
    resolve: (name) => ({ name }),
    replace: (index, node) => {
      g.graph.nodes[index] = node;
    },
  };
  const found = reverse(walk, seeds, new Set(targets.map(({ name }) => name)));
  return targets.map(({ name }) => {
    const gradient = found.get(name);
    if (gradient === undefined) throw new Error(`the loss does not depend on ${name}`);
    return gradient;
  });
}

const reverse: Reverse = (walk, seeds, targets) => {
  const { graph, g } = walk;
  const depends = dependents(graph, targets);
  const throughWeights = (weights: string) => {
    const multiply = walk.options.transposed?.get(weights);
    if (multiply === undefined) throw new Error(`no transposed copy of the quantized weights ${weights}`);
    return multiply;
  };
  const found = new Map<string, Value>();
  const add = (name: string, gradient: Value): void => {
    const before = found.get(name);
    found.set(name, before === undefined ? gradient : g.op('Add', [before, gradient]));
  };
  for (const { value, gradient } of seeds) add(value.name, gradient);
  for (let index = graph.nodes.length - 1; index >= 0; index--) {
    const node = graph.nodes[index]!;
    const names = namesReadBy(node);
    if (!names.some((name) => depends.has(name)) || !node.outputs.some((name) => found.has(name))) continue;
    if (isIf(node)) {
      const wanted = names.filter((name) => depends.has(name));
      for (const [name, gradient] of differentiateBranches(walk, index, found, wanted, reverse)) {
        add(name, gradient);
      }
      continue;
    }
    const { product } = node;
    if (product !== undefined) {
      add(product.input, throughWeights(product.weights)(g, found.get(node.outputs[0]!)!));
      continue;
    }
    const rule = RULES[node.op];
    if (rule === undefined) throw new Error(`no gradient rule for ${node.op} (it gives ${node.outputs[0]})`);
    const wants = (i: number) => depends.has(node.inputs[i] ?? '');
    rule(contextOf(walk, node, found, { wants, transposed: throughWeights })).forEach((gradient, i) => {
      if (gradient !== undefined && wants(i)) add(node.inputs[i]!, gradient);
    });
  }
  return found;
};

function contextOf(
  { g, resolve, shapes }: Walk,
  node: Node,
  found: ReadonlyMap<string, Value>,
  { wants, transposed }: Pick<RuleContext, 'wants' | 'transposed'>,
): RuleContext {
  return {
    g,
    node,
    wants,
    input: (i) => resolve(node.inputs[i]!),
    output: (i) => resolve(node.outputs[i]!),
    shape: (i) => shapeOf(shapes, node.inputs[i]!),
    outputShape: (i) => shapeOf(shapes, node.outputs[i]!),
    gradient: (i) => found.get(node.outputs[i]!),
    transposed,
  };
}

/** Names whose value changes with a target's. */
function dependents(graph: Graph, targets: ReadonlySet<string>): Set<string> {
  const depends = new Set(targets);
  for (const node of graph.nodes) {
    if (!namesReadBy(node).some((name) => depends.has(name))) continue;
    for (const name of node.outputs) if (name !== '') depends.add(name);
  }
  return depends;
}
