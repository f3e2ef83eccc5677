/**
 * The model and its loss as training computes them: whole sequences at once, no cache. The caller decides how a block's
 * output is used (gates, surrogates, statistics).
 *
 * Shapes: B sequences of S tokens, H = hidden, D = head width, R = scored positions. A token attends to itself and to earlier
 * tokens of its sequence.
 */

import {
  type Extras,
  layerExtras,
  type RopeTable,
  type Rotary,
} from '../../model/architectures/attention-extras.ts';
import { attendByHead, type HeadLengths } from '../../model/architectures/head-attention.ts';
import {
  activate,
  behindBlocks,
  normAttributes,
  rotaryTables,
  type StoredLlama,
} from '../../model/architectures/llama.ts';
import { embed } from '../../model/architectures/projections.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import { external, type WeightRange } from '../../model/weights-file.ts';
import { ELEMENT_TYPES, type GraphBuilder, type Value } from '../../onnx/graph.ts';
import { type LayerLinear, multiplyStored, type TrainingLinears } from './training-weights.ts';

/** The output of a block for the residual stream `h` `[B, S, H]` before it; appends to `b`. */
type Block = (b: GraphBuilder, h: Value) => Value;

/** A model in a graph. */
type Model = {
  readonly config: ModelConfig;
  readonly stored: StoredLlama;
  /** Whether gradients go back through its blocks. */
  readonly isDifferentiated: boolean;
};

/** Values that all blocks share. The rotary tables have the rows of the positions alone, `[S, D/2]`. */
export type Shared = Rotary &
  Pick<Model, 'isDifferentiated'> & {
    /** `[B, S]`. */
    readonly positions: Value;
    /** All are whole: a last token has all others before it. */
    readonly lengths: HeadLengths;
    /** `[S, 1]`, bool: the first position of a sequence. */
    readonly isFirst: Value;
  };

/** The stream after block `index` (2·layer + 1 for an FFN) from the stream before it. */
type Next = (index: number, h: Value, block: Block, shared: Shared) => Value;

/** Input `token_ids` `[B, S]`. Returns the stream after the last block, `[B, S, H]`. */
export function forward(g: GraphBuilder, model: Model, linears: TrainingLinears, next: Next): Value {
  const { config, stored } = model;
  const tokenIds = g.input('token_ids', 'i64', ['B', 'S']);
  const shared = sharedValues(g, model, tokenIds);
  const before = embed(g, tokenIds, stored.embedding);
  return layersForward(g, shared, stored, linears, { from: 0, to: config.layerCount, before }, next);
}

/** Layers `from` to `to` (exclusive), and the stream before them. */
type Stretch = { readonly from: number; readonly to: number; readonly before: Value };

/** The stream after the last layer of the stretch. */
export function layersForward(
  g: GraphBuilder,
  shared: Shared,
  stored: StoredLlama,
  linears: TrainingLinears,
  { from, to, before }: Stretch,
  next: Next,
): Value {
  const { config } = shared;
  let h = before;
  for (let index = from; index < to; index++) {
    const layer = stored.layers[index]!;
    const name = `layer_${index}`;
    const project: Project = (b, which, x) => {
      const full = `${name}.${which}`;
      return multiplyStored(b, x, full, linears.get(full)!.forward);
    };
    const extras = layerExtras(g, config, index, layer);
    const behind = behindBlocks(g, config, index, layer);
    const attentionBlock: Block = (b, h) => {
      const x = normalize(b, config, `${name}.attention_norm`, layer.attentionNorm, h);
      return behind.attention(b, attention(b, shared, extras, project, x));
    };
    const ffnBlock: Block = (b, h) => {
      const x = normalize(b, config, `${name}.ffn_norm`, layer.ffnNorm, h);
      return behind.ffn(b, ffn(b, config, project, x));
    };
    h = next(2 * index, h, attentionBlock, shared);
    h = next(2 * index + 1, h, ffnBlock, shared);
  }
  return h;
}

/** Input `scored_rows` `[R]` (positions b·S + s). Returns the final norm's output there, `[R, H]`. */
export function scoredRows(g: GraphBuilder, config: ModelConfig, stored: StoredLlama, h: Value): Value {
  const positions = g.reshape(h, -1, config.hiddenSize);
  const scored = g.op('Gather', [positions, g.input('scored_rows', 'i64', ['R'])], { axis: 0 });
  return normalize(g, config, 'final_norm', stored.finalNorm, scored);
}

/** Shapes that `autodiff/shapes.ts` does not infer. */
export const sharedShapes = ({ isFirst }: Shared) => new Map([[isFirst.name, ['S', 1]]]);

/** x / √(mean x² + ε) over the last axis: the norm without its weights, the same in every basis. */
export const normalizePlainly = (g: GraphBuilder, config: ModelConfig, x: Value): Value =>
  g.op(
    'SimplifiedLayerNormalization',
    [x, g.constant('f32', [config.hiddenSize], Array<number>(config.hiddenSize).fill(1))],
    normAttributes(config),
  );

type Project = (b: GraphBuilder, which: LayerLinear, x: Value) => Value;

/** Makes the shared values from `token_ids` `[B, S]`. */
export function sharedValues(
  g: GraphBuilder,
  { config, stored, isDifferentiated }: Model,
  tokenIds: Value,
): Shared {
  const scalar = (value: number) => g.constant('i64', [], [value]);
  const i32 = (value: Value) => g.op('Cast', [value], { to: ELEMENT_TYPES.i32 });
  const [sequences, tokens] = [0, 1].map((axis) =>
    g.op('Shape', [tokenIds], { start: axis, end: axis + 1 }),
  ) as [Value, Value];
  const order = g.op('Range', [scalar(0), g.op('Squeeze', [tokens]), scalar(1)]);
  const rowsOf = (tables: Rotary['ropes']): Rotary['ropes'] => {
    const rows = (table: Value): Value => g.op('Gather', [table, order], { axis: 0 });
    const each = ({ cos, sin }: RopeTable) => ({ cos: rows(cos), sin: rows(sin) });
    return { global: each(tables.global), local: tables.local && each(tables.local) };
  };
  return {
    config,
    isDifferentiated,
    positions: g.op('Expand', [g.op('Unsqueeze', [order, g.ints(0)]), g.op('Shape', [tokenIds])]),
    lengths: { past: i32(g.op('Expand', [g.op('Sub', [tokens, g.ints(1)]), sequences])), most: i32(tokens) },
    ropes: rowsOf(rotaryTables(g, config, stored)),
    isFirst: g.op('Equal', [g.op('Unsqueeze', [order, g.ints(1)]), scalar(0)]),
  };
}

function normalize(g: GraphBuilder, config: ModelConfig, name: string, stored: WeightRange, x: Value): Value {
  const weight = g.initializer(name, 'f32', [config.hiddenSize], external(stored));
  return g.op('SimplifiedLayerNormalization', [x, weight], normAttributes(config));
}

function attention(b: GraphBuilder, shared: Shared, extras: Extras, project: Project, x: Value): Value {
  const rows = { product: project(b, 'qkv', x), positions: () => shared.positions };
  const { attended } = attendByHead(b, shared, extras, rows, undefined, shared.lengths, {
    keepsProbabilities: shared.isDifferentiated,
  });
  return extras.outputBiased(b, project(b, 'output', attended));
}

function ffn(b: GraphBuilder, config: ModelConfig, project: Project, x: Value): Value {
  const activated = activate(b, config, project(b, 'gate', x));
  return project(b, 'down', b.op('Mul', [activated, project(b, 'up', x)]));
}

export type HeadProducts = {
  /** `[R, H]` → `[R, V]`: x·Wᵀ. */
  forward(x: Value): Value;
  /** `[R, V]` → `[R, H]`: y·W. */
  back(y: Value): Value;
};

/** Lower bound of the tail's probability, which is divided by and whose logarithm is taken. */
const SHARE_MIN = 1e-6;
/** Lower bound of a target's predicted probability, whose logarithm is taken; about the smallest that fp32 has. */
const PREDICTED_MIN = 1e-37;

/**
 * Cross-entropy against a few target tokens a position, and its gradient by the head's input x `[R, H]`. Both are
 * written by hand in one place because the `[R, V]` values between them are the largest of the step, and each pass over
 * them takes time. The gradient's nodes are appended only when it is requested.
 *
 * q = softmax(x·Wᵀ), loss = mean_r Σ_k -p_rk · log q_r[id_rk];
 * ∂loss/∂x = (q - p)·W / R, where p sums to 1 in every row.
 *
 * With a tail, p may sum to P < 1, and all other tokens are one more target of probability 1 − P: with Q = Σ_k q_k the
 * loss gains -(1−P)·log(1−Q), and a token outside the targets has the gradient q·(1 − (1−P)/(1−Q)). Without it,
 * learning from another model's most likely tokens would push the probability of all others towards 0.
 */
export function softTargetLoss(
  g: GraphBuilder,
  x: Value,
  head: HeadProducts,
  hasTail: boolean,
): { value: Value; gradient: () => Value } {
  const ids = g.input('target_ids', 'i64', ['R', 'K']);
  const probabilities = g.input('target_probabilities', 'f32', ['R', 'K']);
  const predicted = g.op('Softmax', [head.forward(x)], { axis: -1 });
  const found = g.op('GatherElements', [predicted, ids], { axis: 1 });
  const seen = g.op('Max', [found, g.constant('f32', [1], [PREDICTED_MIN])]);
  const terms = g.op('Mul', [probabilities, g.op('Neg', [g.op('Log', [seen])])]);
  const rows = g.op('Cast', [g.op('Squeeze', [g.op('Shape', [ids], { start: 0, end: 1 })])], { to: 1 });
  const sum = g.op('ReduceSum', [terms], { keepdims: 0 });
  // ScatterElements waits for this, so `predicted` is read by then and the runtime writes in its place: once each, as a row's ids
  // differ.
  const ofTargets = g.op('Sub', [found, probabilities]);
  const back = (others: Value) => {
    const difference = g.op('ScatterElements', [others, ids, ofTargets], { axis: 1 });
    return g.op('Div', [head.back(difference), rows]);
  };
  if (!hasTail) return { value: g.op('Div', [sum, rows]), gradient: () => back(predicted) };
  const [rest, predictedRest] = [restOf(g, probabilities), restOf(g, found)];
  const tail = g.op('ReduceSum', [g.op('Mul', [rest, g.op('Log', [predictedRest])])], { keepdims: 0 });
  const gradient = () => {
    const share = g.op('Sub', [g.constant('f32', [1], [1]), g.op('Div', [rest, predictedRest])]);
    return back(g.op('Mul', [predicted, share]));
  };
  return { value: g.op('Div', [g.op('Sub', [sum, tail]), rows]), gradient };
}

/** 1 − the sum of each row of `[R, K]` probabilities, `[R, 1]`. */
function restOf(g: GraphBuilder, probabilities: Value): Value {
  const sum = g.op('ReduceSum', [probabilities, g.ints(-1)], { keepdims: 1 });
  return g.op('Max', [g.op('Sub', [g.constant('f32', [1], [1]), sum]), g.constant('f32', [1], [SHARE_MIN])]);
}
