/**
 * One training step of the gates as one graph: loss, and its derivative by each of the 2L gates. All weights
 * are frozen.
 *
 * Shapes: B sequences of S tokens, H = hidden, N/G = query/KV heads, P = N/G query heads a KV head, D = head
 * width, R = scored positions, K = target tokens a position.
 *
 * h ← h + z·block(h) with a gate z a block (IG-Pruning, arXiv 2511.02213). A gate at exactly 0 skips its block
 * forward and backward, and its derivative is 0. Attention is written from primitives, since its probabilities
 * are needed twice; tokens attend within their sequence to themselves and to what is before.
 *
 * loss = mean over scored positions of -Σ_k p_k · log q(token_k), where p sums to 1 a position: next-token
 * cross-entropy with K = 1 and p = 1; KL to another model's K likeliest tokens, up to the entropy of p.
 */
import { gradients } from '../autodiff/gradients.ts';
import type { StoredLlama } from '../model/architectures/llama.ts';
import { embed } from '../model/architectures/llama.ts';
import type { LlamaConfig } from '../model/types.ts';
import type { WeightRange } from '../model/weights-file.ts';
import { external } from '../model/weights-file.ts';
import type { Graph, Value } from '../onnx/graph.ts';
import { ELEMENT_TYPES, GraphBuilder, MICROSOFT } from '../onnx/graph.ts';
import { multiplyGradient, multiplyStored, weightName } from './products.ts';
import type { HeadProducts } from './soft-target-loss.ts';
import { softTargetLoss } from './soft-target-loss.ts';
import type { LayerLinear, TrainingLinear, TrainingLinears } from './training-weights.ts';

/** What every block sees. */
type Shared = {
  readonly config: LlamaConfig;
  /** `[B, S]`. */
  readonly positions: Value;
  /** Rows of the rotary tables, `[S, D/2]`. */
  readonly cos: Value;
  readonly sin: Value;
  /** `[S, S]`: 0 where a token may look, very negative elsewhere. */
  readonly attentionMask: Value;
};

/**
 * Inputs `token_ids` `[B, S]`, `gates` `[2L]`, `scored_rows` `[R]` (numbers of positions, b·S + s),
 * `target_ids` and `target_probabilities` `[R, K]`; outputs `loss` `[]` and `gate_gradients` `[2L]`.
 */
export function gateGraph(config: LlamaConfig, stored: StoredLlama, linears: TrainingLinears): Graph {
  const g = new GraphBuilder('gates');
  const { layerCount: L, hiddenSize: H } = config;
  const tokenIds = g.input('token_ids', 'i64', ['B', 'S']);
  const gates = g.input('gates', 'f32', [2 * L]);
  const shared = sharedValues(g, config, stored, tokenIds);
  const each = g.constant('i64', [2 * L], Array<number>(2 * L).fill(1));
  const gate = g.ops('Split', [gates, each], 2 * L);
  const runs = g.ops('Split', [g.op('Cast', [gates], { to: ELEMENT_TYPES.bool }), each], 2 * L);

  let h = embed(g, tokenIds, stored.embedding);
  stored.layers.forEach((layer, index) => {
    const name = `layer_${index}`;
    const project: Project = (b, which, x) => {
      const full = `${name}.${which}`;
      return multiplyStored(b, x, full, linears.get(full)!.forward);
    };
    h = gatedBlock(g, config, runs[2 * index]!, gate[2 * index]!, h, (b, x) => {
      const normalized = normalize(b, config, `${name}.attention_norm`, layer.attentionNorm, x);
      return attention(b, shared, project, normalized);
    });
    h = gatedBlock(g, config, runs[2 * index + 1]!, gate[2 * index + 1]!, h, (b, x) => {
      const normalized = normalize(b, config, `${name}.ffn_norm`, layer.ffnNorm, x);
      return ffn(b, project, normalized);
    });
  });
  const positions = g.op('Reshape', [h, g.constant('i64', [2], [-1, H])]);
  const scored = g.op('Gather', [positions, g.input('scored_rows', 'i64', ['R'])], { axis: 0 });
  const final = normalize(g, config, 'final_norm', stored.finalNorm, scored);
  const back = backwardProducts(linears);
  const loss = softTargetLoss(g, final, headProducts(g, linears.get('head')!));
  const [gradient] = gradients(g, [{ value: final, gradient: loss.gradient }], [gates], {
    transposed: back,
    shapes: new Map([[shared.attentionMask.name, ['S', 'S']]]),
  });
  g.node('Identity', [loss.value], ['loss']);
  g.node('Identity', [gradient], ['gate_gradients']);
  g.output({ name: 'loss' }, 'f32', []);
  g.output({ name: 'gate_gradients' }, 'f32', [2 * L]);
  return g.graph;
}

type Project = (b: GraphBuilder, which: LayerLinear, x: Value) => Value;

/** Products that carry gradients back, by the name of the forward weights' values in the graph. */
function backwardProducts(linears: TrainingLinears) {
  const products = new Map<string, (g: GraphBuilder, gradient: Value) => Value>();
  for (const [name, { back }] of linears) {
    if (back === undefined) continue;
    products.set(weightName(name), (g, gradient) =>
      multiplyGradient(g, gradient, g.fresh(`${name}.back`), back),
    );
  }
  return products;
}

function headProducts(g: GraphBuilder, { forward, back }: TrainingLinear): HeadProducts {
  if (back !== undefined) {
    return {
      forward: (x) => multiplyStored(g, x, 'head', forward),
      back: (y) => multiplyStored(g, y, 'head.back', back),
    };
  }
  const { outputs, inputs, values } = forward;
  const weights = g.initializer('head', 'f32', [outputs, inputs], external(values));
  return {
    forward: (x) => g.op('FusedMatMul', [x, weights], { transB: 1 }, MICROSOFT),
    back: (y) => g.op('MatMul', [y, weights]),
  };
}

function sharedValues(g: GraphBuilder, config: LlamaConfig, stored: StoredLlama, tokenIds: Value): Shared {
  const table = [config.contextTokens, config.headSize / 2];
  const int = (...values: number[]) => g.constant('i64', [values.length], values);
  const scalar = (value: number) => g.constant('i64', [], [value]);
  const length = g.op('Squeeze', [g.op('Shape', [tokenIds], { start: 1, end: 2 })]);
  const order = g.op('Range', [scalar(0), length, scalar(1)]);
  const mayLook = g.op('LessOrEqual', [
    g.op('Unsqueeze', [order, int(0)]),
    g.op('Unsqueeze', [order, int(1)]),
  ]);
  const rows = (name: string, range: WeightRange): Value =>
    g.op('Gather', [g.initializer(name, 'f32', table, external(range)), order], { axis: 0 });
  return {
    config,
    positions: g.op('Expand', [g.op('Unsqueeze', [order, int(0)]), g.op('Shape', [tokenIds])]),
    cos: rows('rope_cos', stored.ropeCos),
    sin: rows('rope_sin', stored.ropeSin),
    attentionMask: g.op('Where', [mayLook, g.constant('f32', [], [0]), g.constant('f32', [], [-1e9])]),
  };
}

/** h + z·block(h), or h where the gate z is 0. */
function gatedBlock(
  g: GraphBuilder,
  config: LlamaConfig,
  runs: Value,
  gate: Value,
  h: Value,
  block: (b: GraphBuilder, h: Value) => Value,
): Value {
  const shape = ['B', 'S', config.hiddenSize];
  const run = g.subgraph('run', (b) =>
    b.output(b.op('Add', [h, b.op('Mul', [block(b, h), gate])]), 'f32', shape),
  );
  const skip = g.subgraph('skip', (b) => b.output(b.op('Identity', [h]), 'f32', shape));
  return g.op('If', [runs], { then_branch: { graph: run }, else_branch: { graph: skip } });
}

function normalize(g: GraphBuilder, config: LlamaConfig, name: string, stored: WeightRange, x: Value): Value {
  const weight = g.initializer(name, 'f32', [config.hiddenSize], external(stored));
  const attributes = { axis: -1, epsilon: { float: config.rmsEpsilon } };
  return g.op('SimplifiedLayerNormalization', [x, weight], attributes);
}

function attention(b: GraphBuilder, shared: Shared, project: Project, x: Value): Value {
  const { headCount: N, kvHeadCount: G, headSize: D } = shared.config;
  const rotate = (value: Value, heads: number) =>
    b.op(
      'RotaryEmbedding',
      [value, shared.positions, shared.cos, shared.sin],
      { num_heads: heads, rotary_embedding_dim: D, interleaved: 0 },
      MICROSOFT,
    );
  /** `[B, S, G·P·D]` → `[B, G, P, S, D]`, P = 1 for keys and values. */
  const byHead = (value: Value, perGroup: number) =>
    b.op('Transpose', [b.op('Reshape', [value, b.constant('i64', [5], [0, 0, G, perGroup, D])])], {
      perm: [0, 2, 3, 1, 4],
    });
  const q = byHead(rotate(project(b, 'q', x), N), N / G);
  const k = byHead(rotate(project(b, 'k', x), G), 1);
  // Rows of Q carry 1/√D.
  const scores = b.op('FusedMatMul', [q, k], { transB: 1 }, MICROSOFT);
  const masked = b.op('Add', [scores, shared.attentionMask]);
  const probabilities = b.op('Softmax', [masked], { axis: -1 });
  const attended = b.op('MatMul', [probabilities, byHead(project(b, 'v', x), 1)]);
  const together = b.op('Transpose', [attended], { perm: [0, 3, 1, 2, 4] });
  const flat = b.op('Reshape', [together, b.constant('i64', [3], [0, 0, N * D])]);
  return project(b, 'output', flat);
}

function ffn(b: GraphBuilder, project: Project, x: Value): Value {
  // QuickGelu with alpha 1 is x·sigmoid(x), SiLU.
  const activated = b.op('QuickGelu', [project(b, 'gate', x)], { alpha: { float: 1 } }, MICROSOFT);
  return project(b, 'down', b.op('Mul', [activated, project(b, 'up', x)]));
}
