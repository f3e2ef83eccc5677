/**
 * The Llama decoder as one graph for many sequences at once, each under its own mask. The arithmetic and its order are the
 * same as in `one-mask-llama.ts`, so both give a row the same bits.
 *
 * Shapes: S = new tokens of all sequences, one after the other; H, F, N, G, D, V as in `llama.ts`; P = places.
 *
 * The weight products take all tokens of a step as rows, so a step reads the weights once. A mask is a list of rows for
 * each block, and a block computes only the rows that run it. One node a layer attends the decoded tokens of all answers
 * (`head-attention.ts`). When some sequences run a layer's attention, it also computes the tokens that skip it, but only
 * their K and V are used. A piece of a prompt, and any sequence with K and V in halves, has an attention node of its own
 * (`batched-attention.ts`).
 * A row list has the shape `[1, rows]`, so that it gathers a batch of one sequence, as rotary embedding and attention need.
 * An `If` costs as much as five small nodes, so all work for rows that skip a block shares one.
 *
 * The limit of a step: it reads the weights of a block once if any row runs the block; products grow with the rows.
 */
import type { Dimension, Graph, Value } from '../../onnx/graph.ts';
import { GraphBuilder, giveNothingBack } from '../../onnx/graph.ts';
import type { KvType, ModelConfig } from '../model-source.ts';
import { type KeysValues, keysValues } from './attention-extras.ts';
import { type Attending, attend, placesOf } from './batched-attention.ts';
import { headLengths } from './head-attention.ts';
import type { AttentionParts, FfnParts, StoredLlama } from './llama.ts';
import { asKept, feedForward, outputLogits, rotaryTables, throughLayers } from './llama.ts';
import { embed, multiply } from './projections.ts';
import { type SkippedBlock, surrogateProduct } from './surrogate.ts';

/** Values that every block sees. */
type Shared = Attending & {
  /** `[S]`. */
  readonly positions: Value;
  /** `[S, H]`. */
  readonly zeros: Value;
  /** `[1, rows]`: rows that each of the 2L blocks computes. */
  readonly runRows: readonly Value[];
  /** `[1, rows, 1]` for each of the 2L blocks: the rows of the stream that its outputs go to. */
  readonly intoIndices: readonly Value[];
  /** `[rows]` for each layer: the computed rows of its attention whose output is used. */
  readonly usedRows: readonly Value[];
  /** For each layer: the rows that skip its attention, but write K and V. */
  readonly keptRows: readonly Value[];
  /** For each of the 2L blocks: whether rows that skip it need work. */
  readonly skips: readonly (Value | undefined)[];
  readonly surrogates: { readonly rows: readonly Value[]; readonly isFirst: Value } | undefined;
};

/** Inputs and outputs are named in `engine/batch-run.ts`, which feeds them. */
export function batchedLlamaGraph(config: ModelConfig, stored: StoredLlama, kvType: KvType = 'f32'): Graph {
  const g = new GraphBuilder('batched_llama');
  const tokenIds = g.input('token_ids', 'i64', ['S']);
  const logitRows = g.input('logit_rows', 'i64', ['R']);
  giveNothingBack(g, tokenIds, 'i64');
  const embedded = embed(g, tokenIds, stored.embedding);
  const shared = sharedValues(g, config, kvType, stored, embedded);
  const stream = throughLayers(g, config, stored, embedded, {
    attention: (parts) => attention(g, shared, parts),
    ffn: (parts) => ffn(g, shared, parts),
  });
  outputLogits(g, config, stored, rowsOf(g, stream, logitRows), ['R']);
  return g.graph;
}

function sharedValues(
  g: GraphBuilder,
  config: ModelConfig,
  kvType: KvType,
  stored: StoredLlama,
  embedded: Value,
): Shared {
  const { layerCount: L } = config;
  const positions = g.input('positions', 'i64', ['S']);
  const places = placesOf(kvType);
  const run = rowLists(g, 'run', 2 * L);
  const into = rowLists(g, 'into', 2 * L);
  const kept = rowLists(g, 'kept', L);
  const keeps = g.input('keeps', 'bool', [L]);
  const hasSurrogates = stored.layers.some(({ surrogates }) => surrogates !== undefined);
  return {
    config,
    kvType,
    positions,
    ropes: rotaryTables(g, config, stored),
    zeros: g.op('Mul', [embedded, g.constant('f32', [1], [0])]),
    runRows: named(g, run.lists, (block) => [
      1,
      `${block % 2 === 0 ? 'running' : 'running_ffn'}_${block >> 1}`,
    ]),
    usedRows: named(
      g,
      g.ops('Split', [g.input('used_rows', 'i64', ['all_used']), g.input('used_counts', 'i64', [L])], L),
      (layer) => [`used_${layer}`],
    ),
    intoIndices: g.ops('Split', [g.op('Unsqueeze', [into.all, g.ints(2)]), into.counts], 2 * L, { axis: 1 }),
    keptRows: kept.lists,
    hasPlace: single(g, 'has_place', 'bool', L * places),
    form: kvType === 'f32' ? headForm(g, L, places) : rowForm(g, L, places),
    ...(hasSurrogates
      ? {
          skips: skipsOfBlocks(g, keeps, L),
          surrogates: {
            rows: rowLists(g, 'surrogate', 2 * L).lists,
            isFirst: g.op('Unsqueeze', [g.op('Equal', [positions, g.constant('i64', [], [0])]), g.ints(1)]),
          },
        }
      : {
          skips: pieces(g, keeps, L, 1).flatMap((keeps) => [keeps, undefined]),
          surrogates: undefined,
        }),
  };
}

function headForm(g: GraphBuilder, layers: number, places: number): Attending['form'] {
  const pasts = single(g, 'place_pasts', 'i32', layers * places);
  const most = single(g, 'place_keys', 'i32', layers * places);
  return {
    kind: 'heads',
    lengths: headLengths(g),
    placeLengths: pasts.map((past, i) => ({ past, most: most[i]! })),
    counts: pieces(g, g.input('kind_counts', 'i64', [layers * (1 + places)]), layers, 1 + places),
    hasTokens: single(g, 'has_tokens', 'bool', layers),
    tokensAlone: single(g, 'tokens_alone', 'bool', layers),
  };
}

const rowForm = (g: GraphBuilder, layers: number, places: number): Attending['form'] => ({
  kind: 'rows',
  placeRows: pieces(g, g.input('place_rows', 'i64', [layers * places]), layers, places),
  keyCounts: single(g, 'key_counts', 'i64', layers * places),
});

/** Whether each block has work for rows that skip it: K and V to write (attention only), or surrogates. */
function skipsOfBlocks(g: GraphBuilder, keeps: Value, layers: number): readonly Value[] {
  const replaces = g.input('surrogates', 'bool', [2 * layers]);
  const byLayer = g.reshape(replaces, layers, 2);
  const [attention, ffn] = g.split(byLayer, [1, 1], 1);
  const column = g.reshape(keeps, layers, 1);
  const both = g.op('Concat', [g.op('Or', [attention!, column]), ffn!], { axis: 1 });
  return pieces(g, g.reshape(both, 2 * layers), 2 * layers, 1);
}

/** `count` lists of rows: concatenated in the input `NAME_rows`, with their lengths in `NAME_counts`. */
function rowLists(g: GraphBuilder, name: string, count: number) {
  const all = g.op('Unsqueeze', [g.input(`${name}_rows`, 'i64', [`all_${name}`]), g.ints(0)]);
  const counts = g.input(`${name}_counts`, 'i64', [count]);
  return { all, counts, lists: g.ops('Split', [all, counts], count, { axis: 1 }) };
}

/**
 * Names the lengths of row lists, which the runtime cannot infer. By these names it knows which values have the same size, and
 * plans their memory in a quarter of the time: without them it compares all with all.
 */
function named(g: GraphBuilder, lists: readonly Value[], shape: (index: number) => readonly Dimension[]) {
  for (const [index, list] of lists.entries()) g.describe(list, 'i64', shape(index));
  return lists;
}

const single = (
  g: GraphBuilder,
  name: string,
  type: 'i64' | 'i32' | 'bool',
  count: number,
): readonly Value[] => pieces(g, g.input(name, type, [count]), count, 1);

const pieces = (g: GraphBuilder, value: Value, count: number, size: number): readonly Value[] =>
  g.split(value, Array<number>(count).fill(size));

const rowsOf = (g: GraphBuilder, value: Value, rows: Value): Value =>
  g.op('Gather', [value, rows], { axis: 0 });
/** `values` `[1, rows, H]`, `indices` `[1, rows, 1]`. */
const scatter = (g: GraphBuilder, into: Value, indices: Value, values: Value): Value =>
  g.op('ScatterND', [into, indices, values]);

function attention(g: GraphBuilder, shared: Shared, parts: AttentionParts): Value {
  const { positions } = shared;
  const { index, x, weights, extras, ended } = parts;
  const rows = shared.runRows[2 * index]!;
  const product = multiply(g, rowsOf(g, x, rows), weights.qkv);
  const rowPositions = rowsOf(g, positions, rows);
  const attended = attend(g, shared, index, { product, positions: rowPositions }, extras);
  const used = g.op('Gather', [attended, shared.usedRows[index]!], { axis: 1 });
  const output = ended(g, multiply(g, used, weights.output));
  const around = skippedAttention(g, shared, parts);
  return scatter(g, around, shared.intoIndices[2 * index]!, output);
}

/**
 * The work of an attention block for rows that skip it. Outputs their K and V as `kept_k_i` and `kept_v_i`; returns
 * `[S, H]`, which these rows add to the stream.
 */
function skippedAttention(g: GraphBuilder, shared: Shared, parts: AttentionParts): Value {
  const { config, kvType, zeros } = shared;
  const { index, x, weights, extras } = parts;
  const replacement = replacementOf(g, shared, 2 * index, parts);
  const { kvHeadCount: G, headSize: D, hiddenSize: H } = config;
  const width = G * D;
  const nothing = g.constant(kvType, [1, 0, width], []);
  const declare = (b: GraphBuilder, { k, v }: KeysValues, around: (() => Value) | undefined) => {
    b.output(k, kvType, [1, `kept_${index}`, width]);
    b.output(v, kvType, [1, `kept_${index}`, width]);
    if (around !== undefined) b.output(around(), 'f32', ['S', H]);
  };
  const some = g.subgraph(`skips_${index}`, (b) => {
    const rows = shared.keptRows[index]!;
    const product = multiply(b, rowsOf(b, x, rows), weights.kv);
    const computed = keysValues(b, shared, extras, product, rowsOf(b, shared.positions, rows));
    declare(b, asKept(b, kvType, computed), replacement && (() => replacement(b)));
  });
  const none = g.subgraph(`skips_none_${index}`, (b) => {
    const empty = () => b.op('Identity', [nothing]);
    declare(b, { k: empty(), v: empty() }, replacement && (() => b.op('Identity', [zeros])));
  });
  const kept = [`kept_k_${index}`, `kept_v_${index}`];
  const around = g.fresh('around');
  g.node('If', [shared.skips[2 * index]], replacement ? [...kept, around] : kept, {
    then_branch: { graph: some },
    else_branch: { graph: none },
  });
  for (const name of kept) g.output({ name }, kvType, [1, `kept_${index}`, width]);
  return replacement ? { name: around } : zeros;
}

function ffn(g: GraphBuilder, shared: Shared, parts: FfnParts): Value {
  const block = 2 * parts.index + 1;
  const rows = rowsOf(g, parts.x, shared.runRows[block]!);
  const output = feedForward(g, shared.config, rows, parts);
  const around = skippedFfn(g, shared, parts);
  return scatter(g, around, shared.intoIndices[block]!, output);
}

/** `[S, H]`, which rows that skip an FFN add to the stream. */
function skippedFfn(g: GraphBuilder, shared: Shared, parts: FfnParts): Value {
  const { config, skips, zeros } = shared;
  const { index } = parts;
  const skip = skips[2 * index + 1];
  const replacement = replacementOf(g, shared, 2 * index + 1, parts);
  if (replacement === undefined || skip === undefined) return zeros;
  const branch = (name: string, value: (b: GraphBuilder) => Value) =>
    g.subgraph(`${name}_${index}`, (b) => b.output(value(b), 'f32', ['S', config.hiddenSize]));
  return g.op('If', [skip], {
    then_branch: { graph: branch('replaced_ffn', replacement) },
    else_branch: { graph: branch('no_ffn', (b) => b.op('Identity', [zeros])) },
  });
}

/** Builds, inside a branch, `[S, H]`: the surrogate's outputs (`surrogate.ts`) of rows that skip the block, zeros elsewhere. */
type Replacement = (b: GraphBuilder) => Value;

function replacementOf(
  g: GraphBuilder,
  { zeros, surrogates }: Shared,
  block: number,
  skipped: SkippedBlock,
): Replacement | undefined {
  const product = surrogateProduct(g, skipped);
  if (product === undefined || surrogates === undefined) return undefined;
  return (b) => {
    const rows = surrogates.rows[block]!;
    const x = rowsOf(b, skipped.unweighted(b), rows);
    const values = product(b, x, rowsOf(b, surrogates.isFirst, rows));
    return scatter(b, zeros, b.op('Unsqueeze', [rows, b.ints(2)]), values);
  };
}
