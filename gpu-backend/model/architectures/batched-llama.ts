/**
 * The Llama decoder as one graph for many sequences at once, each under its own mask: what `llama.ts` is for one
 * sequence, with the same arithmetic in the same order, so that both give a row the same bits.
 *
 * Shapes: S = new tokens of all sequences, one after the other; H, F, N, G, D, V as in `llama.ts`; P = places.
 *
 * The weight products see all tokens of a step as rows: weights are read once for everybody. A mask is a list of rows
 * for each block, so a block computes those rows that run it and no others. Attention sees each sequence's own
 * cache at its exact length: one node a sequence. A layer's running sequences stand in its first places, whoever they are.
 * A tree of `If`s picks the branch with as many nodes as sequences, because an `Attention` without rows is an error.
 * No weight lies in those branches: ONNX Runtime does not prepack two branches deep.
 * A row list has the shape `[1, rows]`, so what it gathers is a batch of one sequence, which rotary embedding and attention want.
 * An `If` costs as much as five small nodes, so what is rare (rows that do not run a block) shares one.
 *
 * The limit of a step: every weight of a block that runs for anybody is read once; products grow by the row.
 */
import type { Graph, Value } from '../../onnx/graph.ts';
import { GraphBuilder } from '../../onnx/graph.ts';
import type { KvType, LlamaConfig } from '../model-source.ts';
import { type Extras, keysValues, queriesKeysValues, windowMask } from './attention-extras.ts';
import type { KeysValues, StoredLayer, StoredLlama } from './llama.ts';
import {
  asKept,
  asRead,
  attentionParts,
  feedForward,
  ffnParts,
  outputLogits,
  rotaryTable,
  throughLayers,
} from './llama.ts';
import { embed, type Linear, multiply } from './projections.ts';
import { type StoredSurrogate, surrogateProduct } from './surrogate.ts';

/** P: sequences in one step at most. */
export const BATCH_PLACES = 8;

/** Values that every block sees. */
type Shared = {
  readonly config: LlamaConfig;
  readonly kvType: KvType;
  /** `[S]`. */
  readonly positions: Value;
  readonly cos: Value;
  readonly sin: Value;
  /** `[S, H]`. */
  readonly zeros: Value;
  /** `[1, rows]`: rows that run each of the 2L blocks; and `[1, rows, 1]`, as they are scattered by. */
  readonly runRows: readonly Value[];
  readonly runIndices: readonly Value[];
  /** Rows of each layer whose attention is skipped and whose K and V are written. */
  readonly keptRows: readonly Value[];
  /** For each of the 2L blocks: whether it has something to do for rows that skip it. */
  readonly skips: readonly (Value | undefined)[];
  /** `[P]` a layer: how many of its running rows each place has. */
  readonly placeRows: readonly Value[];
  /** `[1]` for each place of each layer: keys, the new ones counted. */
  readonly keyCounts: readonly Value[];
  /** For each place of each layer: whether more sequences run than stand before it. */
  readonly hasPlace: readonly Value[];
  readonly surrogates: { readonly rows: readonly Value[]; readonly isFirst: Value } | undefined;
};

/** Inputs and outputs are named in `engine/batch-run.ts`, which feeds them. */
export function batchedLlamaGraph(config: LlamaConfig, stored: StoredLlama, kvType: KvType = 'f32'): Graph {
  const g = new GraphBuilder('batched_llama');
  const tokenIds = g.input('token_ids', 'i64', ['S']);
  const logitRows = g.input('logit_rows', 'i64', ['R']);
  const embedded = embed(g, tokenIds, stored.embedding);
  const shared = sharedValues(g, config, kvType, stored, embedded);
  const stream = throughLayers(config, stored, embedded, (layer, index, residual, branch) =>
    ffn(g, shared, layer, index, ...attention(g, shared, layer, index, residual, branch)),
  );
  outputLogits(g, config, stored, rowsOf(g, g.op('Add', stream), logitRows), ['R']);
  return g.graph;
}

function sharedValues(
  g: GraphBuilder,
  config: LlamaConfig,
  kvType: KvType,
  stored: StoredLlama,
  embedded: Value,
): Shared {
  const { layerCount: L } = config;
  const positions = g.input('positions', 'i64', ['S']);
  const run = rowLists(g, 'run', 2 * L);
  const kept = rowLists(g, 'kept', L);
  const keeps = g.input('keeps', 'bool', [L]);
  const hasSurrogates = stored.layers.some(({ surrogates }) => surrogates !== undefined);
  return {
    ...{ config, kvType, positions },
    ...rotaryTable(g, config, stored),
    zeros: g.op('Mul', [embedded, g.constant('f32', [1], [0])]),
    runRows: run.lists,
    runIndices: g.ops('Split', [g.op('Unsqueeze', [run.all, int(g, 2)]), run.counts], 2 * L, { axis: 1 }),
    keptRows: kept.lists,
    placeRows: pieces(g, g.input('place_rows', 'i64', [L * BATCH_PLACES]), L, BATCH_PLACES),
    keyCounts: single(g, 'key_counts', 'i64', L * BATCH_PLACES),
    hasPlace: single(g, 'has_place', 'bool', L * BATCH_PLACES),
    ...(hasSurrogates
      ? {
          skips: skipsOfBlocks(g, keeps, L),
          surrogates: {
            rows: rowLists(g, 'surrogate', 2 * L).lists,
            isFirst: g.op('Unsqueeze', [g.op('Equal', [positions, g.constant('i64', [], [0])]), int(g, 1)]),
          },
        }
      : {
          skips: pieces(g, keeps, L, 1).flatMap((keeps) => [keeps, undefined]),
          surrogates: undefined,
        }),
  };
}

/** Attention writes K and V of rows that skip it, or replaces its output, or both; an FFN only replaces its output. */
function skipsOfBlocks(g: GraphBuilder, keeps: Value, layers: number): Value[] {
  const replaces = g.input('surrogates', 'bool', [2 * layers]);
  const byLayer = g.op('Reshape', [replaces, g.constant('i64', [2], [layers, 2])]);
  const [attention, ffn] = g.ops('Split', [byLayer, g.constant('i64', [2], [1, 1])], 2, { axis: 1 });
  const column = g.op('Reshape', [keeps, g.constant('i64', [2], [layers, 1])]);
  const both = g.op('Concat', [g.op('Or', [attention!, column]), ffn!], { axis: 1 });
  return pieces(g, g.op('Reshape', [both, int(g, 2 * layers)]), 2 * layers, 1);
}

/** Lists of rows, one behind the other in `NAME_rows`, their lengths in `NAME_counts`. */
function rowLists(g: GraphBuilder, name: string, count: number) {
  const all = g.op('Unsqueeze', [g.input(`${name}_rows`, 'i64', [`all_${name}`]), int(g, 0)]);
  const counts = g.input(`${name}_counts`, 'i64', [count]);
  return { all, counts, lists: g.ops('Split', [all, counts], count, { axis: 1 }) };
}

const single = (g: GraphBuilder, name: string, type: 'i64' | 'bool', count: number): Value[] =>
  pieces(g, g.input(name, type, [count]), count, 1);

const pieces = (g: GraphBuilder, value: Value, count: number, size: number): Value[] =>
  g.ops('Split', [value, g.constant('i64', [count], Array<number>(count).fill(size))], count);

const int = (g: GraphBuilder, value: number): Value => g.constant('i64', [1], [value]);
const rowsOf = (g: GraphBuilder, value: Value, rows: Value): Value =>
  g.op('Gather', [value, rows], { axis: 0 });
/** `values` `[1, rows, H]`, `indices` `[1, rows, 1]`. */
const scatter = (g: GraphBuilder, into: Value, indices: Value, values: Value): Value =>
  g.op('ScatterND', [into, indices, values]);

function attention(
  g: GraphBuilder,
  shared: Shared,
  stored: StoredLayer,
  index: number,
  before: Value,
  previous: Value | undefined,
): [Value, Value] {
  const { config, positions } = shared;
  const { residual, x, weights, extras, unweighted } = attentionParts(
    g,
    config,
    stored,
    index,
    before,
    previous,
  );
  const rows = shared.runRows[2 * index]!;
  const product = multiply(g, rowsOf(g, x, rows), weights.qkv);
  const rowPositions = rowsOf(g, positions, rows);
  const { q, k, v } = queriesKeysValues(g, shared, extras, product, rowPositions);
  writePlaces(g, shared, index, { k, v });
  const attended = attendByPlace(g, shared, index, q, { window: extras.window, positions: rowPositions });
  const output = extras.outputBiased(g, multiply(g, attended, weights.output));
  const replacement = replacementOf(g, shared, 2 * index, {
    name: `layer_${index}.attention`,
    stored: stored.surrogates?.attention,
    x: unweighted,
  });
  const around = skippedAttention(g, shared, index, x, weights.kv, extras, replacement);
  return [residual, scatter(g, around, shared.runIndices[2 * index]!, output)];
}

/** K and V of running rows, a tensor a place, bound in place into the caches (`engine/kv-cache.ts`). */
function writePlaces(g: GraphBuilder, shared: Shared, index: number, computed: KeysValues): void {
  const { config, kvType } = shared;
  const width = config.kvHeadCount * config.headSize;
  const { k, v } = asKept(g, kvType, computed);
  const write = (name: 'k' | 'v', value: Value) => {
    const outputs = Array.from({ length: BATCH_PLACES }, (_, place) => `new_${name}_${index}_${place}`);
    g.node('Split', [value, shared.placeRows[index]!], outputs, { axis: 1 });
    for (const [place, output] of outputs.entries())
      g.output({ name: output }, kvType, [1, `rows_${index}_${place}`, width]);
  };
  write('k', k);
  write('v', v);
}

/** `q` `[1, rows, N·D]` of a layer's running rows → what they attend to, of the same shape. */
function attendByPlace(
  g: GraphBuilder,
  shared: Shared,
  index: number,
  q: Value,
  { window, positions }: { readonly window: number | undefined; readonly positions: Value },
): Value {
  const { headCount: N, kvHeadCount: G, headSize: D } = shared.config;
  const past = (name: 'k' | 'v', place: number) =>
    g.input(`past_${name}_${index}_${place}`, shared.kvType, [1, `keys_${index}_${place}`, G * D]);
  const places = Array.from({ length: BATCH_PLACES }, (_, place) => ({
    k: past('k', place),
    v: past('v', place),
  }));
  const nobody = g.constant('f32', [1, 0, N * D], []);
  const attend = (b: GraphBuilder, place: number, queries: Value, at: Value, keyCount: Value): Value => {
    // A branch as a whole waits for the writes, as `afterWrites` needs them.
    const { k, v } = asRead(b, shared.kvType, places[place]!);
    return b.op(
      'Attention',
      [queries, k, v, seen(b, place, at), undefined, undefined, keyCount],
      // Rows of Q carry 1/√D already (see `llama.ts`).
      { q_num_heads: N, kv_num_heads: G, is_causal: 1, scale: { float: 1 } },
    );
  };
  const seen = (b: GraphBuilder, place: number, at: Value) =>
    window === undefined ? undefined : windowMask(b, window, at, places[place]!.k);
  const of = (b: GraphBuilder, count: number): Value => {
    if (count === 0) return b.op('Identity', [nobody]);
    const all = shared.placeRows[index]!;
    const counts = count === BATCH_PLACES ? all : b.op('Slice', [all, int(b, 0), int(b, count), int(b, 0)]);
    const cut = (value: Value) =>
      count === 1 ? [value] : b.ops('Split', [value, counts], count, { axis: 1 });
    const queries = cut(q);
    const at = window === undefined ? queries : cut(positions);
    const attended = queries.map((own, place) => {
      const keyCount = shared.keyCounts[index * BATCH_PLACES + place]!;
      const count = place === 0 ? afterWrites(b, index, keyCount) : keyCount;
      return attend(b, place, own, at[place]!, count);
    });
    return count === 1 ? attended[0]! : b.op('Concat', attended, { axis: 1 });
  };
  /** `low` to `high` sequences run. A full step is found first, which is in the greatest hurry; then one alone. */
  const between = (b: GraphBuilder, low: number, high: number): Value => {
    if (low === high) return of(b, low);
    const isRest = low === 0 && high < BATCH_PLACES;
    const middle = high === BATCH_PLACES ? high - 1 : isRest ? Math.min(1, high - 1) : (low + high) >> 1;
    const part = (from: number, to: number) =>
      b.subgraph(`attention_${index}_of_${from}_to_${to}`, (inner) =>
        inner.output(between(inner, from, to), 'f32', [1, `running_${index}`, N * D]),
      );
    return b.op('If', [shared.hasPlace[index * BATCH_PLACES + middle]!], {
      then_branch: { graph: part(middle + 1, high) },
      else_branch: { graph: part(low, middle) },
    });
  };
  return between(g, 0, BATCH_PLACES);
}

/** The key count itself, known only once all new K and V of the layer are in the caches: it orders writes before reads. */
function afterWrites(b: GraphBuilder, index: number, keyCount: Value): Value {
  const rows = (name: 'k' | 'v') => b.op('Shape', [{ name: `new_${name}_${index}_0` }], { start: 1, end: 2 });
  return b.op('Max', [keyCount, rows('k'), rows('v')]);
}

/**
 * What an attention does for rows that skip it. Outputs `kept_k_i` and `kept_v_i`, their K and V; gives `[S, H]`, what they
 * add to the stream.
 */
function skippedAttention(
  g: GraphBuilder,
  shared: Shared,
  index: number,
  x: Value,
  weights: Linear,
  extras: Extras,
  replacement: Replacement | undefined,
): Value {
  const { config, kvType, zeros } = shared;
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
    const product = multiply(b, rowsOf(b, x, rows), weights);
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

function ffn(
  g: GraphBuilder,
  shared: Shared,
  stored: StoredLayer,
  index: number,
  before: Value,
  previous: Value,
): [Value, Value] {
  const { config } = shared;
  const { residual, x, weights, unweighted } = ffnParts(g, config, stored, index, before, previous);
  const rows = shared.runRows[2 * index + 1]!;
  const output = feedForward(g, config, rowsOf(g, x, rows), weights);
  const replacement = replacementOf(g, shared, 2 * index + 1, {
    name: `layer_${index}.ffn`,
    stored: stored.surrogates?.ffn,
    x: unweighted,
  });
  const around = skippedFfn(g, shared, index, replacement);
  return [residual, scatter(g, around, shared.runIndices[2 * index + 1]!, output)];
}

/** `[S, H]`: what rows that skip an FFN add to the stream. */
function skippedFfn(
  g: GraphBuilder,
  { config, skips, zeros }: Shared,
  index: number,
  replacement: Replacement | undefined,
): Value {
  const skip = skips[2 * index + 1];
  if (replacement === undefined || skip === undefined) return zeros;
  const branch = (name: string, value: (b: GraphBuilder) => Value) =>
    g.subgraph(`${name}_${index}`, (b) => b.output(value(b), 'f32', ['S', config.hiddenSize]));
  return g.op('If', [skip], {
    then_branch: { graph: branch('replaced_ffn', replacement) },
    else_branch: { graph: branch('no_ffn', (b) => b.op('Identity', [zeros])) },
  });
}

/** Inside a branch, `[S, H]`: the outputs of a block's surrogate (`surrogate.ts`) where rows skip it, zeros elsewhere. */
type Replacement = (b: GraphBuilder) => Value;

function replacementOf(
  g: GraphBuilder,
  { zeros, surrogates }: Shared,
  block: number,
  {
    name,
    stored,
    x,
  }: {
    readonly name: string;
    readonly stored: StoredSurrogate | undefined;
    /** The stream before the block, normalized without weights. */
    readonly x: (b: GraphBuilder) => Value;
  },
): Replacement | undefined {
  if (stored === undefined || surrogates === undefined) return undefined;
  const product = surrogateProduct(g, name, stored);
  return (b) => {
    const rows = surrogates.rows[block]!;
    const values = product(b, rowsOf(b, x(b), rows), rowsOf(b, surrogates.isFirst, rows));
    return scatter(b, zeros, b.op('Unsqueeze', [rows, int(b, 2)]), values);
  };
}
