/** One graph (the whole, or a branch of an `If`) to walk back through, and where its gradient nodes go. */
import type { Graph, GraphBuilder, Node, Value } from '../onnx/graph.ts';
import type { Shape, Shapes } from './shapes.ts';

/** Where a walk begins: a value, and the loss's gradient by it (of the same shape). */
export type Seed = { readonly value: Value; readonly gradient: Value };

export type GradientOptions = {
  /** Shapes of values that `shapes.ts` does not infer, by name. */
  readonly shapes?: ReadonlyMap<string, Shape>;
  /** For quantized products: x ↦ x·W by the name of W's values. */
  readonly transposed?: ReadonlyMap<string, (g: GraphBuilder, gradient: Value) => Value>;
  /**
   * Branches' own values are computed once more for the gradient instead of being kept until then (gradient
   * checkpointing, Chen et al., 2016; each `If` is a segment): less memory, one more forward pass.
   */
  readonly recompute?: boolean | undefined;
};

export type Walk = {
  readonly graph: Graph;
  readonly shapes: Shapes;
  readonly g: GraphBuilder;
  readonly options: GradientOptions;
  /** A forward value as it is seen from `g`. */
  resolve(name: string): Value;
  /** Puts another node in a forward node's place. */
  replace(index: number, node: Node): void;
};

/** Gradients of everything that depends on `targets` and that a seed depends on, by name. */
export type Reverse = (
  walk: Walk,
  seeds: readonly Seed[],
  targets: ReadonlySet<string>,
) => Map<string, Value>;
