/**
 * A training step as one graph: the loss with its gradient by the 2L gates or by the tables of surrogates, or the loss
 * alone. All of the model's weights are frozen.
 *
 * h ← h + z·block(h) with a gate z a block (IG-Pruning, arXiv 2511.02213), or with surrogates
 * h ← h + z·block(h) + (1−z)·surrogate(h). A gate at exactly 0 skips its block forward and backward, one at
 * exactly 1 its surrogate.
 *
 * loss = mean over scored positions of -Σ_k p_k · log q(token_k), where p sums to 1 a position: next-token
 * cross-entropy with K = 1 and p = 1; KL to another model's K likeliest tokens, up to the entropy of p.
 */
import type { StoredLlama } from '../../model/architectures/llama.ts';
import { embed } from '../../model/architectures/projections.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import { SURROGATE_PARTS } from '../../model/surrogates.ts';
import { external } from '../../model/weights-file.ts';
import {
  type Dimension,
  ELEMENT_TYPES,
  type Graph,
  GraphBuilder,
  MICROSOFT,
  type Value,
} from '../../onnx/graph.ts';
import { gradients } from '../autodiff/gradients.ts';
import {
  type SurrogateInputs,
  type SurrogateValues,
  surrogateInputs,
  surrogateOutput,
} from '../surrogates/surrogate-graph.ts';
import {
  forward,
  type HeadProducts,
  layersForward,
  type Shared,
  scoredRows,
  sharedShapes,
  sharedValues,
  softTargetLoss,
} from './training-forward.ts';
import {
  multiplyGradient,
  multiplyStored,
  type TrainingLinear,
  type TrainingLinears,
  weightName,
} from './training-weights.ts';

type StepGraphOptions = {
  /** What the loss is differentiated by; `none` gives the loss alone, at less than half the time. */
  readonly by: 'gates' | 'surrogates' | 'none';
  /** Rank of the surrogates that stand in for what gates leave out; 0: holes, and nothing to learn by `surrogates`. */
  readonly surrogateRank: number;
  /** Target probabilities may sum to less than 1; all other tokens share the rest ({@link softTargetLoss}). */
  readonly tail: boolean;
  /** Whether values that gradients need inside a block are computed again instead of kept (gradient checkpointing). */
  readonly recompute?: boolean | undefined;
};

/**
 * The step's graph. Unless `recompute` is given, it keeps the values that gradients need if memory has room for them,
 * else it recomputes them.
 */
export function fittingStepGraph(
  config: ModelConfig,
  stored: StoredLlama,
  linears: TrainingLinears,
  options: StepGraphOptions,
): Graph {
  const graph = stepGraph(config, stored, linears, options);
  const decides = options.recompute === undefined && options.by !== 'none';
  return decides && asksForRecompute(graph)
    ? stepGraph(config, stored, linears, { ...options, recompute: true })
    : graph;
}

/**
 * Inputs `token_ids` `[B, S]`, `gates` `[2L]`, `scored_rows` `[R]` (positions b·S + s), `target_ids` and
 * `target_probabilities` `[R, K]`, and with surrogates `surrogate_a` … `surrogate_first`. Outputs `loss` `[]`, and
 * `gate_gradients` `[2L]` or `surrogate_a_gradients` … of their inputs' shapes.
 */
function stepGraph(
  config: ModelConfig,
  stored: StoredLlama,
  linears: TrainingLinears,
  { by, surrogateRank, tail, recompute }: StepGraphOptions,
): Graph {
  const g = new GraphBuilder('training_step');
  const gates = gateValues(g, 2 * config.layerCount);
  const surrogates = surrogateRank > 0 ? surrogateInputs(g, config, surrogateRank) : undefined;
  let shared: Shared | undefined;
  const model = { config, stored, isDifferentiated: by !== 'none' };
  const h = forward(g, model, linears, (index, before, block, common) => {
    shared = common;
    return gated(g, common, { gates, surrogates, index }, before, block);
  });
  const final = scoredRows(g, config, stored, h);
  const loss = softTargetLoss(g, final, headProducts(g, linears.get('head')!), tail);
  nameOutput(g, loss.value, 'loss', []);
  if (by === 'none') return g.graph;
  const targets = by === 'gates' ? [gates.all] : surrogates!.tables;
  const found = gradients(g, [{ value: final, gradient: loss.gradient() }], targets, {
    transposed: backwardProducts(linears),
    shapes: sharedShapes(shared!),
    recompute,
  });
  if (by === 'gates') nameOutput(g, found[0]!, 'gate_gradients', [2 * config.layerCount]);
  else {
    SURROGATE_PARTS.forEach((part, i) => {
      nameOutput(g, found[i]!, `surrogate_${part}_gradients`, surrogates!.shapes[part]);
    });
  }
  return g.graph;
}

/** The residual stream after a block, given its gate and, if there are any, its surrogate. */
function gated(
  g: GraphBuilder,
  shared: Shared,
  which: { readonly gates: Gates; readonly surrogates: SurrogateInputs | undefined; readonly index: number },
  before: Value,
  block: (b: GraphBuilder, h: Value) => Value,
): Value {
  const { gates, surrogates, index } = which;
  const run = gatedBlock(g, shared.config, gates, index, before, block);
  const stand = surrogates?.blocks[index];
  return stand === undefined ? run : withStandIn(g, shared, gates, index, before, run, stand);
}

type Gates = {
  /** `[2L]`. */
  readonly all: Value;
  /** z, 1 − z, z > 0 and z < 1 of every block, `[1]` each. */
  readonly open: readonly Value[];
  readonly closed: readonly Value[];
  readonly runs: readonly Value[];
  readonly isReplaced: readonly Value[];
};

function gateValues(g: GraphBuilder, count: number): Gates {
  const all = g.input('gates', 'f32', [count]);
  const each = g.ints(...Array<number>(count).fill(1));
  const one = g.constant('f32', [1], [1]);
  const pieces = (value: Value) => g.ops('Split', [value, each], count);
  return {
    all,
    open: pieces(all),
    closed: pieces(g.op('Sub', [one, all])),
    runs: pieces(g.op('Cast', [all], { to: ELEMENT_TYPES.bool })),
    isReplaced: pieces(g.op('Less', [all, one])),
  };
}

/** h + z·block(h), or h where the gate z is 0. */
function gatedBlock(
  g: GraphBuilder,
  config: ModelConfig,
  gates: Gates,
  index: number,
  h: Value,
  block: (b: GraphBuilder, h: Value) => Value,
): Value {
  const shape = ['B', 'S', config.hiddenSize];
  const run = g.subgraph('run', (b) =>
    b.output(b.op('Add', [h, b.op('Mul', [block(b, h), gates.open[index]!])]), 'f32', shape),
  );
  const skip = g.subgraph('skip', (b) => b.output(b.op('Identity', [h]), 'f32', shape));
  return g.op('If', [gates.runs[index]!], { then_branch: { graph: run }, else_branch: { graph: skip } });
}

/** `after` + (1−z)·surrogate(before), or `after` where the gate z is 1: an `If` beside the block's own. */
function withStandIn(
  g: GraphBuilder,
  shared: Shared,
  gates: Gates,
  index: number,
  before: Value,
  after: Value,
  values: SurrogateValues,
): Value {
  const shape = ['B', 'S', shared.config.hiddenSize];
  const replace = g.subgraph('replace', (b) => {
    const output = surrogateOutput(b, shared, before, values);
    b.output(b.op('Add', [after, b.op('Mul', [output, gates.closed[index]!])]), 'f32', shape);
  });
  const keep = g.subgraph('keep', (b) => b.output(b.op('Identity', [after]), 'f32', shape));
  return g.op('If', [gates.isReplaced[index]!], {
    then_branch: { graph: replace },
    else_branch: { graph: keep },
  });
}

/** Matrix products that propagate gradients, by the name of the forward weights' values in the graph. */
function backwardProducts(linears: TrainingLinears) {
  const products = new Map<string, (g: GraphBuilder, gradient: Value) => Value>();
  for (const [name, { forward, back }] of linears) {
    if (back === undefined) continue;
    products.set(weightName(name), (g, gradient) =>
      multiplyGradient(g, gradient, g.fresh(`${name}.back`), { forward, back }),
    );
  }
  return products;
}

export function headProducts(g: GraphBuilder, { forward: ahead, back }: TrainingLinear): HeadProducts {
  if (back !== undefined) {
    return {
      forward: (x) => multiplyStored(g, x, 'head', ahead),
      back: (y) => multiplyGradient(g, y, 'head.back', { forward: ahead, back }),
    };
  }
  const { outputs, inputs, values } = ahead;
  const weights = g.initializer('head', 'f32', [outputs, inputs], external(values));
  return {
    forward: (x) => g.op('FusedMatMul', [x, weights], { transB: 1 }, MICROSOFT),
    back: (y) => g.op('MatMul', [y, weights]),
  };
}

/*
 * The same step in pieces, for a model that does not fit into memory as a whole: embedding, each layer, and head
 * (`layered-session.ts`). Each piece is a graph with the same nodes as that part of the whole graph.
 */

/** Input `token_ids` `[B, S]`, output `after` `[B, S, H]`. */
export function embeddingGraph(config: ModelConfig, stored: StoredLlama): Graph {
  const g = new GraphBuilder('embedding');
  const tokenIds = g.input('token_ids', 'i64', ['B', 'S']);
  nameOutput(g, embed(g, tokenIds, stored.embedding), 'after', ['B', 'S', config.hiddenSize]);
  return g.graph;
}

/**
 * Layer `layer`. Inputs `token_ids`, `before` `[B, S, H]`, `gates` `[2]`, and its two rows of each table of surrogates;
 * output `after`. By gates there are an input `after_gradient`, and outputs `before_gradient` and `gate_gradients` `[2]`.
 */
export function layerGraph(
  config: ModelConfig,
  stored: StoredLlama,
  linears: TrainingLinears,
  layer: number,
  { by, surrogateRank }: { readonly by: 'gates' | 'none'; readonly surrogateRank: number },
): Graph {
  const g = new GraphBuilder('layer');
  const stream = ['B', 'S', config.hiddenSize];
  const model = { config, stored, isDifferentiated: by !== 'none' };
  const shared = sharedValues(g, model, g.input('token_ids', 'i64', ['B', 'S']));
  const before = g.input('before', 'f32', stream);
  const gates = gateValues(g, 2);
  const surrogates =
    surrogateRank > 0 ? surrogateInputs(g, { ...config, layerCount: 1 }, surrogateRank) : undefined;
  const stretch = { from: layer, to: layer + 1, before };
  const after = layersForward(g, shared, stored, linears, stretch, (index, h, block) =>
    gated(g, shared, { gates, surrogates, index: index - 2 * layer }, h, block),
  );
  if (by === 'none') nameOutput(g, after, 'after', stream);
  else {
    const seed = { value: after, gradient: g.input('after_gradient', 'f32', stream) };
    const [ofBefore, ofGates] = gradients(g, [seed], [before, gates.all], {
      transposed: backwardProducts(linears),
      shapes: sharedShapes(shared),
    });
    nameOutput(g, ofBefore!, 'before_gradient', stream);
    nameOutput(g, ofGates!, 'gate_gradients', [2]);
  }
  return g.graph;
}

/** Inputs `before` `[B, S, H]`, `scored_rows` and targets; output `loss`, and by gates `before_gradient`. */
export function headGraph(
  config: ModelConfig,
  stored: StoredLlama,
  linears: TrainingLinears,
  { by, tail }: { readonly by: 'gates' | 'none'; readonly tail: boolean },
): Graph {
  const g = new GraphBuilder('head');
  const stream = ['B', 'S', config.hiddenSize];
  const before = g.input('before', 'f32', stream);
  const final = scoredRows(g, config, stored, before);
  const loss = softTargetLoss(g, final, headProducts(g, linears.get('head')!), tail);
  nameOutput(g, loss.value, 'loss', []);
  if (by === 'none') return g.graph;
  const [gradient] = gradients(g, [{ value: final, gradient: loss.gradient() }], [before]);
  nameOutput(g, gradient!, 'before_gradient', stream);
  return g.graph;
}

function nameOutput(g: GraphBuilder, value: Value, name: string, shape: readonly Dimension[]): void {
  g.node('Identity', [value], [name]);
  g.output({ name }, 'f32', shape);
}

/*
 * Whether a training step recomputes the values that gradients need inside blocks instead of keeping them (gradient
 * checkpointing). Kept values grow with tokens and the model's width; recomputing needs one block's values at a time,
 * but another forward pass. The results are equal to the bit, so a run may resume on a machine that decides otherwise.
 */

/** Sizes of the graph's dimensions in the largest training step: 6 sequences of 128 tokens. */
const STEP_SIZES: Readonly<Record<string, number>> = { B: 6, S: 128 };
/**
 * Share of the available memory for kept values; the rest is for weights, which are copied when the runtime packs them.
 */
const KEPT_SHARE_MAX = 1 / 3;
const FLOAT_BYTES = 4;

/**
 * Whether the kept values of `graph`, built without `recompute`, need too much memory. `available_bytes`: memory that
 * the process may still allocate.
 */
export const asksForRecompute = (graph: Graph, available_bytes = process.availableMemory()): boolean =>
  keptBytes(graph) > KEPT_SHARE_MAX * available_bytes;

/**
 * Bytes of the branches' extra outputs: f32 values saved for gradients, and the few gradients that are not by the
 * residual stream.
 */
export function keptBytes(graph: Graph): number {
  let floats = 0;
  for (const { op, attributes } of graph.nodes) {
    const branch = attributes.then_branch;
    if (op !== 'If' || typeof branch !== 'object' || !('graph' in branch)) continue;
    // The first output is the branch's result.
    for (const { shape } of branch.graph.outputs.slice(1)) {
      floats += shape.reduce<number>(
        (all, size) => all * (typeof size === 'number' ? size : STEP_SIZES[size]!),
        1,
      );
    }
  }
  return FLOAT_BYTES * floats;
}
