/**
 * The Llama decoder as a graph that takes one mask a run, any mask.
 *
 * Shapes: B = sequences, S = new tokens of each, W = new tokens whose K and V a layer writes, T = capacity of the cache,
 * R = rows whose logits are returned; the others as in `llama.ts`.
 *
 * Every block is in an `If` on its bit of `runs`. A skipped FFN costs one copy of a zero tensor. A skipped attention
 * computes K and V of its new tokens only, or nothing when `kv_rows` is 0. With surrogates in the graph, `surrogate_rows`
 * says whether they replace skipped blocks: see `surrogate.ts`.
 *
 * The graph is built for one of two layouts of K and V. Head by head, it takes one token each of B answers, or S tokens of
 * one sequence (`head-attention.ts`); this layout serves in fp32. As rows of all heads, it takes S tokens of one sequence.
 * Then new K and V are outputs that are bound to the buffers which are also the inputs `past_k` and `past_v`
 * (`engine/kv-cache.ts`), so the graph must write them before attention reads them. In fp32, attention takes Q from the
 * second of the two `Split`s that write K and V, which gives that order. A cache of halves is cast when written and when
 * read, and `afterWrites` gives the order.
 *
 * Limits, per decoded token: every weight of a running block is read once. With weights in blocks an attention has 3 nodes, an
 * FFN 5; with the nodes around them, they take a third of the products' time at the default model's size. A product by column
 * has seven to ten nodes instead of one, and a rotation inside of an FFN has three more. A norm behind a block has one node, and
 * three more where the graph rotates behind it.
 */
import type { Graph, Value } from '../../onnx/graph.ts';
import { GraphBuilder, giveNothingBack } from '../../onnx/graph.ts';
import type { KvType, ModelConfig } from '../model-source.ts';
import {
  type Extras,
  type KeysValues,
  keysValues,
  queriesKeysValues,
  type Rotary,
  windowMask,
} from './attention-extras.ts';
import {
  attendByHead,
  type HeadLengths,
  headInputs,
  headLengths,
  nothingGrown,
  outputGrown,
} from './head-attention.ts';
import {
  type AttentionParts,
  asKept,
  asRead,
  type FfnParts,
  feedForward,
  outputLogits,
  rotaryTables,
  type StoredLlama,
  throughLayers,
} from './llama.ts';
import { embed, multiply } from './projections.ts';
import { type Skipping, skippedOutput, skipping } from './surrogate.ts';

/** The layout of K and V: head by head in fp32, or rows of all heads in this type. */
type KvForm = 'heads' | KvType;

/** Values that every block sees. */
type Shared = Rotary & {
  readonly kvType: KvType;
  readonly positions: Value;
  readonly skipping: Skipping;
  readonly runs: readonly Value[];
  /** The number of new tokens whose K and V a skipped attention writes: S, or 0 with `kv: elide`. */
  readonly kvRows: Value;
  /** Positions of those tokens, `[B, E]`, E = `kv_rows`. */
  readonly kvPositions: Value;
  readonly reach: Reach;
};

/** The lengths of the sequences, by the layout of K and V. */
type Reach =
  | { readonly kind: 'heads'; readonly lengths: HeadLengths }
  | { readonly kind: 'rows'; readonly keyCount: Value };

export function llamaGraph(config: ModelConfig, stored: StoredLlama, form: KvForm = 'heads'): Graph {
  const g = new GraphBuilder('llama');
  const tokenIds = g.input('token_ids', 'i64', ['B', 'S']);
  const logitRows = g.input('logit_rows', 'i64', ['R']);
  giveNothingBack(g, tokenIds, 'i64');
  const embedded = embed(g, tokenIds, stored.embedding);
  const shared = sharedValues(g, config, form, stored, embedded);
  const stream = throughLayers(g, config, stored, embedded, {
    attention: (parts) => attention(g, shared, parts),
    ffn: (parts) => ffn(g, shared, parts),
  });
  const last = g.op('Gather', [stream, logitRows], { axis: 1 });
  outputLogits(g, config, stored, last, ['B', 'R']);
  return g.graph;
}

function sharedValues(
  g: GraphBuilder,
  config: ModelConfig,
  form: KvForm,
  stored: StoredLlama,
  embedded: Value,
): Shared {
  const { layerCount: L } = config;
  const positions = g.input('positions', 'i64', ['B', 'S']);
  const hasSurrogates = stored.layers.some(({ surrogates }) => surrogates !== undefined);
  return {
    config,
    kvType: form === 'heads' ? 'f32' : form,
    positions,
    reach:
      form === 'heads'
        ? { kind: 'heads', lengths: headLengths(g) }
        : { kind: 'rows', keyCount: g.input('key_count', 'i64', [1]) },
    ropes: rotaryTables(g, config, stored),
    skipping: skipping(g, embedded, positions, hasSurrogates),
    runs: g.split(g.input('runs', 'bool', [2 * L]), Array<number>(2 * L).fill(1)),
    kvRows: g.input('kv_rows', 'i64', [1]),
    kvPositions: g.input('kv_positions', 'i64', ['B', 'E']),
  };
}

function attention(g: GraphBuilder, shared: Shared, parts: AttentionParts): Value {
  const { config, kvType } = shared;
  const { index } = parts;
  const width = config.kvHeadCount * config.headSize;
  const isHeads = shared.reach.kind === 'heads';
  const rows = (name: string) => g.input(`past_${name}_${index}`, kvType, [1, 'T', width]);
  const past = isHeads ? headInputs(g, config, `${index}`) : { k: rows('k'), v: rows('v') };
  const run = g.subgraph(`attention_${index}`, (b) => runAttention(b, shared, parts, past));
  const out = skippedOutput(g, shared.skipping, parts);
  const skip = g.subgraph(`skip_attention_${index}`, (b) => skipAttention(b, shared, parts, out));
  const fresh = { k: { name: `new_k_${index}` }, v: { name: `new_v_${index}` } };
  const grown = isHeads ? [{ name: `grown_k_${index}` }, { name: `grown_v_${index}` }] : [];
  const attended = { name: g.fresh('attention') };
  g.node(
    'If',
    [shared.runs[2 * index]],
    [attended, fresh.k, fresh.v, ...grown].map(({ name }) => name),
    {
      then_branch: { graph: run },
      else_branch: { graph: skip },
    },
  );
  g.output(fresh.k, kvType, ['written_sequences', 'W', width]);
  g.output(fresh.v, kvType, ['written_sequences', 'W', width]);
  const [k, v] = grown;
  if (k && v) outputGrown(g, { k, v });
  return attended;
}

/** The unchanged `past`, without a copy, but available only after `written`: orders writes before reads. */
function afterWrites(b: GraphBuilder, past: KeysValues, written: KeysValues): KeysValues {
  const shapes = [written.k, written.v].map((value) => b.op('Shape', [value]));
  // All zeros; in `Reshape` 0 keeps a dimension.
  const same = b.op('Sub', shapes);
  return { k: b.op('Reshape', [past.k, same]), v: b.op('Reshape', [past.v, same]) };
}

/** Gives V a static width again, which a computed shape hides: ONNX Runtime infers attention's output shape from it. */
const sized = (
  b: GraphBuilder,
  { kvHeadCount, headSize }: ModelConfig,
  { k, v }: KeysValues,
): KeysValues => ({
  k,
  v: b.reshape(v, 1, -1, kvHeadCount * headSize),
});

/**
 * Outputs `[B, S, H]`. With K and V as rows, also outputs K (after rotary embedding) and V, `[B, S, G·D]`; else the buffers
 * of heads.
 */
function runAttention(
  b: GraphBuilder,
  shared: Shared,
  { x, weights, extras, ended }: AttentionParts,
  past: KeysValues,
): void {
  const { config, kvType, positions, reach } = shared;
  const product = multiply(b, x, weights.qkv);
  const declare = (attended: Value, written: KeysValues, grown: KeysValues | undefined) => {
    const out = ended(b, multiply(b, attended, weights.output));
    declareBranch(b, shared, out, written, 'S', grown);
  };
  if (reach.kind === 'rows') {
    const { attended, written } = attendPiece(b, shared, extras, product, past, reach.keyCount);
    declare(attended, written, undefined);
    return;
  }
  const rows = { product, positions: () => positions };
  const { attended, grown } = attendByHead(b, shared, extras, rows, past, reach.lengths);
  const none = () => b.constant(kvType, [1, 0, config.kvHeadCount * config.headSize], []);
  declare(attended, { k: none(), v: none() }, grown);
}

/** Attention of any number of tokens of one sequence, with K and V as rows. */
function attendPiece(
  b: GraphBuilder,
  shared: Shared,
  extras: Extras,
  product: Value,
  past: KeysValues,
  keyCount: Value,
): { readonly attended: Value; readonly written: KeysValues } {
  const { config, kvType, positions } = shared;
  const computed = queriesKeysValues(b, shared, extras, product, positions);
  const written = asKept(b, kvType, computed);
  const mask = extras.window && windowMask(b, extras.window, positions, past.k);
  const read = kvType === 'f32' ? past : sized(b, config, asRead(b, kvType, afterWrites(b, past, written)));
  const inputs = [computed.q, read.k, read.v, mask || undefined, undefined, undefined, keyCount];
  const attended = b.op('Attention', inputs, {
    q_num_heads: config.headCount,
    kv_num_heads: config.kvHeadCount,
    is_causal: 1,
    // Rows of Q carry 1/√D already: ONNX Runtime's matrix-vector kernels only serve a scale of exactly 1,
    // and without them this node takes 1.4 times as long.
    scale: { float: 1 },
  });
  return { attended, written };
}

/**
 * K and V of the first `kv_rows` new tokens: all of them, or none with `kv: elide`. A second `If` here would be clearer,
 * but five times as slow: ONNX Runtime does not prepack weights two branches deep.
 */
function skipAttention(
  b: GraphBuilder,
  shared: Shared,
  { x, weights, extras }: AttentionParts,
  output: (b: GraphBuilder) => Value,
): void {
  const rows = b.op('Slice', [x, b.ints(0), shared.kvRows, b.ints(1)]);
  const computed = keysValues(b, shared, extras, multiply(b, rows, weights.kv), shared.kvPositions);
  const grown = shared.reach.kind === 'heads' ? nothingGrown(b, shared.config) : undefined;
  declareBranch(b, shared, output(b), asKept(b, shared.kvType, computed), 'E', grown);
}

function declareBranch(
  b: GraphBuilder,
  { config, kvType }: Shared,
  out: Value,
  { k, v }: KeysValues,
  kvRows: 'S' | 'E',
  grown: KeysValues | undefined,
): void {
  const width = config.kvHeadCount * config.headSize;
  b.output(out, 'f32', ['B', 'S', config.hiddenSize]);
  b.output(k, kvType, ['written_sequences', kvRows, width]);
  b.output(v, kvType, ['written_sequences', kvRows, width]);
  if (grown) outputGrown(b, grown);
}

function ffn(g: GraphBuilder, { config, skipping, runs }: Shared, parts: FfnParts): Value {
  const { index } = parts;
  const branch = (name: string, out: (b: GraphBuilder) => Value) =>
    g.subgraph(`${name}_${index}`, (b) => b.output(out(b), 'f32', ['B', 'S', config.hiddenSize]));
  const run = branch('ffn', (b) => feedForward(b, config, parts.x, parts));
  const skip = branch('skip_ffn', skippedOutput(g, skipping, parts));
  return g.op('If', [runs[2 * index + 1]], { then_branch: { graph: run }, else_branch: { graph: skip } });
}
