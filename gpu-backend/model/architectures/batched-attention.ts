/**
 * Attention of many sequences in one run, in the batched graph (`batched-llama.ts`): of tokens of answers all together
 * (`token-attention.ts`), and of all else one node a sequence.
 *
 * Shapes: N/G = query/KV heads, D = head width, P = places.
 *
 * A sequence that has a node of its own stands in a place: a layer's running ones in its first places, whoever they are.
 * A tree of `If`s picks the branch with as many nodes as there are, because an `Attention` without rows is an error. No weight
 * lies in these branches: ONNX Runtime does not prepack two branches deep.
 */
import type { GraphBuilder, Value } from '../../onnx/graph.ts';
import type { KvType, LlamaConfig } from '../model-source.ts';
import {
  type Extras,
  type KeysValues,
  queriesKeysValues,
  type Rotary,
  windowMask,
} from './attention-extras.ts';
import { asKept, asRead } from './llama.ts';
import { attendTokens, headInputs, nothingGrown, outputGrown, type TokenLengths } from './token-attention.ts';

/** Sequences in one step at most. */
export const BATCH_PLACES = 8;

/**
 * P: sequences in one run that have an `Attention` of their own. In fp32 those are pieces of prompts alone; each place costs
 * inputs and outputs in every run, so there are few.
 */
export const placesOf = (kvType: KvType): number => (kvType === 'f32' ? 2 : BATCH_PLACES);

/** What attention sees beside the rows that it is for. */
export type Attending = Rotary & {
  readonly config: LlamaConfig;
  readonly kvType: KvType;
  readonly places: number;
  /** `[P]` a layer: how many of its running rows each place has. */
  readonly placeRows: readonly Value[];
  /** `[1]` for each place of each layer: keys, the new ones counted. */
  readonly keyCounts: readonly Value[];
  /** For each place of each layer: whether more sequences run than stand before it. */
  readonly hasPlace: readonly Value[];
  readonly tokens: Tokens | undefined;
};

/** Rows that are a token of an answer each, where K and V are fp32; they stand first. */
type Tokens = {
  readonly lengths: TokenLengths;
  /** `[2]` a layer: how many of the rows that it computes are tokens, and how many are of pieces. */
  readonly counts: readonly Value[];
  readonly has: readonly Value[];
  /** Whether a layer computes tokens and nothing else: the step that is in the greatest hurry. */
  readonly alone: readonly Value[];
};

/** Of the rows that a layer computes: their product with the rows of QKV, `[1, rows, (N + 2G)·D]`, and their positions, `[1, rows]`. */
type Rows = { readonly product: Value; readonly positions: Value };
/** `q` `[1, rows, N·D]`, `k` and `v` `[1, rows, G·D]`, `positions` `[1, rows]`. */
type Computed = KeysValues & { readonly q: Value; readonly positions: Value };
/** K and V of a place's new rows, which are bound in place into its cache (`engine/kv-cache.ts`). */
type Fresh = readonly KeysValues[];

/** What a layer's rows attend to, `[1, rows, N·D]`; writes their K and V. */
export function attend(g: GraphBuilder, shared: Attending, index: number, rows: Rows, extras: Extras): Value {
  const { config, kvType, places, tokens } = shared;
  const { window } = extras;
  const compute = (b: GraphBuilder, { product, positions }: Rows): Computed => ({
    ...queriesKeysValues(b, shared, extras, product, positions),
    positions,
  });
  const past = Array.from({ length: places }, (_, place) => ({
    k: pastInput(g, shared, 'k', index, place),
    v: pastInput(g, shared, 'v', index, place),
  }));
  const fresh: Fresh = past.map((_, place) => ({
    k: { name: `new_k_${index}_${place}` },
    v: { name: `new_v_${index}_${place}` },
  }));
  const declare = (b: GraphBuilder, { k, v }: KeysValues, place: number) => {
    const shape = [1, `rows_${index}_${place}`, config.kvHeadCount * config.headSize];
    b.output(k, kvType, shape);
    b.output(v, kvType, shape);
  };
  if (tokens === undefined) {
    const computed = compute(g, rows);
    writePlaces(g, shared, index, computed, fresh);
    fresh.forEach((one, place) => {
      declare(g, one, place);
    });
    return attendByPlace(g, shared, index, computed, { window, past, fresh });
  }
  const heads = headInputs(g, config, index);
  const attended = { name: g.fresh('attended') };
  const grown = { k: { name: `grown_k_${index}` }, v: { name: `grown_v_${index}` } };
  const branch = (
    name: string,
    build: (b: GraphBuilder, fresh: Fresh) => { readonly attended: Value; readonly grown: KeysValues },
  ) =>
    g.subgraph(name, (b) => {
      const own = fresh.map(() => ({ k: { name: b.fresh('new_k') }, v: { name: b.fresh('new_v') } }));
      const found = build(b, own);
      b.output(found.attended, 'f32', [1, `running_${index}`, config.headCount * config.headSize]);
      outputGrown(b, found.grown);
      own.forEach((one, place) => {
        declare(b, one, place);
      });
    });
  const outputs = [attended, grown.k, grown.v, ...fresh.flatMap(({ k, v }) => [k, v])];
  g.node(
    'If',
    [tokens.alone[index]],
    outputs.map(({ name }) => name),
    {
      then_branch: {
        graph: branch(`tokens_${index}`, (b, own) => {
          writeNothing(b, shared, own);
          return attendRows(b, shared, extras, rows, heads, tokens.lengths);
        }),
      },
      else_branch: {
        graph: branch(`tokens_and_pieces_${index}`, (b, own) => {
          const [some, rest] = byKind(b, rows, tokens.counts[index]!);
          const found = attendSome(b, shared, extras, tokens, index, some, heads);
          const computed = compute(b, rest);
          writePlaces(b, shared, index, computed, own);
          const attended = attendByPlace(b, shared, index, computed, { window, past, fresh: own });
          return { ...found, attended: b.op('Concat', [found.attended, attended], { axis: 1 }) };
        }),
      },
    },
  );
  outputGrown(g, grown);
  fresh.forEach((one, place) => {
    declare(g, one, place);
  });
  return attended;
}

const pastInput = (
  g: GraphBuilder,
  { config, kvType }: Attending,
  name: 'k' | 'v',
  index: number,
  place: number,
): Value =>
  g.input(`past_${name}_${index}_${place}`, kvType, [
    1,
    `keys_${index}_${place}`,
    config.kvHeadCount * config.headSize,
  ]);

/** The rows of tokens, and those of pieces. */
function byKind(b: GraphBuilder, { product, positions }: Rows, counts: Value): [Rows, Rows] {
  const products = b.ops('Split', [product, counts], 2, { axis: 1 });
  const places = b.ops('Split', [positions, counts], 2, { axis: 1 });
  return [
    { product: products[0]!, positions: places[0]! },
    { product: products[1]!, positions: places[1]! },
  ];
}

/** Each row is a sequence of its own. */
function attendRows(
  b: GraphBuilder,
  shared: Attending,
  extras: Extras,
  { product, positions }: Rows,
  heads: KeysValues,
  lengths: TokenLengths,
) {
  const { headCount: N, kvHeadCount: G, headSize: D } = shared.config;
  const apart = {
    product: b.op('Reshape', [product, b.constant('i64', [3], [-1, 1, (N + 2 * G) * D])]),
    positions: () => b.op('Reshape', [positions, b.constant('i64', [2], [-1, 1])]),
  };
  const { attended, grown } = attendTokens(b, shared, extras, apart, heads, lengths);
  return { attended: b.op('Reshape', [attended, b.constant('i64', [3], [1, -1, N * D])]), grown };
}

/** The same where there may be no row: the node refuses to have none. */
function attendSome(
  b: GraphBuilder,
  shared: Attending,
  extras: Extras,
  tokens: Tokens,
  index: number,
  rows: Rows,
  heads: KeysValues,
) {
  const { config } = shared;
  const width = config.headCount * config.headSize;
  const branch = (
    name: string,
    build: (c: GraphBuilder) => { readonly attended: Value; readonly grown: KeysValues },
  ) =>
    b.subgraph(name, (c) => {
      const { attended, grown } = build(c);
      c.output(attended, 'f32', [1, `tokens_${index}`, width]);
      outputGrown(c, grown);
    });
  const [attended, k, v] = b.ops('If', [tokens.has[index]], 3, {
    then_branch: {
      graph: branch(`some_tokens_${index}`, (c) =>
        attendRows(c, shared, extras, rows, heads, tokens.lengths),
      ),
    },
    else_branch: {
      graph: branch(`no_tokens_${index}`, (c) => ({
        attended: c.op('Identity', [c.constant('f32', [1, 0, width], [])]),
        grown: nothingGrown(c, config),
      })),
    },
  });
  return { attended: attended!, grown: { k: k!, v: v! } };
}

function writePlaces(
  b: GraphBuilder,
  shared: Attending,
  index: number,
  computed: Computed,
  fresh: Fresh,
): void {
  const { k, v } = asKept(b, shared.kvType, computed);
  const counts = shared.placeRows[index]!;
  const names = (name: 'k' | 'v') => fresh.map((one) => one[name].name);
  b.node('Split', [k, counts], names('k'), { axis: 1 });
  b.node('Split', [v, counts], names('v'), { axis: 1 });
}

/** Nobody stands in any place. */
function writeNothing(b: GraphBuilder, { config, kvType }: Attending, fresh: Fresh): void {
  const none = b.constant(kvType, [1, 0, config.kvHeadCount * config.headSize], []);
  const names = fresh.flatMap(({ k, v }) => [k.name, v.name]);
  const counts = b.constant('i64', [names.length], Array<number>(names.length).fill(0));
  b.node('Split', [none, counts], names, { axis: 1 });
}

/** What rows attend to where each sequence has a node of its own, `[1, rows, N·D]`. */
function attendByPlace(
  g: GraphBuilder,
  shared: Attending,
  index: number,
  { q, positions }: Computed,
  {
    window,
    past,
    fresh,
  }: { readonly window: number | undefined; readonly past: readonly KeysValues[]; readonly fresh: Fresh },
): Value {
  const { headCount: N, kvHeadCount: G, headSize: D } = shared.config;
  const { places } = shared;
  const nobody = g.constant('f32', [1, 0, N * D], []);
  const attend = (b: GraphBuilder, place: number, queries: Value, at: Value, keyCount: Value): Value => {
    // A branch as a whole waits for the writes, as `afterWrites` needs them.
    const { k, v } = asRead(b, shared.kvType, past[place]!);
    return b.op(
      'Attention',
      [queries, k, v, seen(b, place, at), undefined, undefined, keyCount],
      // Rows of Q carry 1/√D already (see `llama.ts`).
      { q_num_heads: N, kv_num_heads: G, is_causal: 1, scale: { float: 1 } },
    );
  };
  const seen = (b: GraphBuilder, place: number, at: Value) =>
    window === undefined ? undefined : windowMask(b, window, at, past[place]!.k);
  const of = (b: GraphBuilder, count: number): Value => {
    if (count === 0) return b.op('Identity', [nobody]);
    const all = shared.placeRows[index]!;
    const one = (value: number) => b.constant('i64', [1], [value]);
    const counts = count === places ? all : b.op('Slice', [all, one(0), one(count), one(0)]);
    const cut = (value: Value) =>
      count === 1 ? [value] : b.ops('Split', [value, counts], count, { axis: 1 });
    const queries = cut(q);
    const at = window === undefined ? queries : cut(positions);
    const attended = queries.map((own, place) => {
      const keyCount = shared.keyCounts[index * places + place]!;
      const count = place === 0 ? afterWrites(b, fresh[0]!, keyCount) : keyCount;
      return attend(b, place, own, at[place]!, count);
    });
    return count === 1 ? attended[0]! : b.op('Concat', attended, { axis: 1 });
  };
  /** `low` to `high` sequences run. A full step is found first, which is in the greatest hurry; then one alone. */
  const between = (b: GraphBuilder, low: number, high: number): Value => {
    if (low === high) return of(b, low);
    const isRest = low === 0 && high < places;
    const middle = high === places ? high - 1 : isRest ? Math.min(1, high - 1) : (low + high) >> 1;
    const part = (from: number, to: number) =>
      b.subgraph(`attention_${index}_of_${from}_to_${to}`, (inner) =>
        inner.output(between(inner, from, to), 'f32', [1, `placed_${index}`, N * D]),
      );
    return b.op('If', [shared.hasPlace[index * places + middle]!], {
      then_branch: { graph: part(middle + 1, high) },
      else_branch: { graph: part(low, middle) },
    });
  };
  return between(g, 0, places);
}

/** The key count itself, known only once all new K and V of the layer are in the caches: it orders writes before reads. */
function afterWrites(b: GraphBuilder, { k, v }: KeysValues, keyCount: Value): Value {
  const rows = (value: Value) => b.op('Shape', [value], { start: 1, end: 2 });
  return b.op('Max', [keyCount, rows(k), rows(v)]);
}
