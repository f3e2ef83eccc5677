/**
 * Attention of many sequences in one run, in the batched graph (`batched-llama.ts`).
 *
 * Shapes: N/G = query/KV heads, D = head width, P = places.
 *
 * One node attends the decoded tokens of all answers (`head-attention.ts`). Every other sequence has an attention node of
 * its own, in a place; the sequences that run a layer take its first places. An `If` skips places without rows, because
 * attention without rows is an error. These branches hold no weights, as ONNX Runtime does not prepack weights two
 * branches deep.
 */
import type { GraphBuilder, Value } from '../../onnx/graph.ts';
import type { KvType, ModelConfig } from '../model-source.ts';
import {
  type Extras,
  type KeysValues,
  queriesKeysValues,
  type Rotary,
  windowMask,
} from './attention-extras.ts';
import { attendByHead, type HeadLengths, headInputs, nothingGrown, outputGrown } from './head-attention.ts';
import { asKept, asRead } from './llama.ts';

/** Most sequences in one step. */
export const BATCH_PLACES = 8;

/**
 * P: the number of places, which is the most sequences in one run with an attention node of their own. In fp32 only pieces
 * of prompts have one. Each place costs inputs and outputs in every run, so there are few.
 */
export const placesOf = (kvType: KvType): number => (kvType === 'f32' ? 2 : BATCH_PLACES);

/** Values that the attention of all layers shares. */
export type Attending = Rotary & {
  readonly kvType: KvType;
  /** For each place of each layer: whether a sequence is in it. */
  readonly hasPlace: readonly Value[];
  readonly form: HeadForm | RowForm;
};

/** A cache of halves: K and V are rows of all heads. */
type RowForm = {
  readonly kind: 'rows';
  /** `[P]` for each layer: the number of rows that each place computes. */
  readonly placeRows: readonly Value[];
  /** `[1]` for each place of each layer: the number of keys, including the new ones. */
  readonly keyCounts: readonly Value[];
};

/** An fp32 cache: K and V are kept head by head. Rows of decoded tokens come first, then the rows of the places. */
type HeadForm = {
  readonly kind: 'heads';
  /** Lengths of the sequences that decode a token. */
  readonly lengths: HeadLengths;
  /** Lengths of the sequence in each place of each layer. */
  readonly placeLengths: readonly HeadLengths[];
  /** `[1 + P]` for each layer: the number of rows that are decoded tokens, and of each place's rows. */
  readonly counts: readonly Value[];
  readonly hasTokens: readonly Value[];
  /** Whether a layer computes decoded tokens only; this step must be the fastest. */
  readonly tokensAlone: readonly Value[];
};

/** The rows that a layer computes: their product with QKV, `[1, rows, (N + 2G)·D]`, and their positions, `[1, rows]`. */
type Rows = { readonly product: Value; readonly positions: Value };
/** `q` `[1, rows, N·D]`, `k` and `v` `[1, rows, G·D]`, `positions` `[1, rows]`. */
type Computed = KeysValues & { readonly q: Value; readonly positions: Value };
/** K and V of each place's new rows; these outputs are bound to its cache (`engine/kv-cache.ts`). */
type Fresh = readonly KeysValues[];

/** The attention of a layer's rows, `[1, rows, N·D]`; writes their K and V. */
export function attend(g: GraphBuilder, shared: Attending, index: number, rows: Rows, extras: Extras): Value {
  const { form } = shared;
  return form.kind === 'heads'
    ? attendHeads(g, { ...shared, form }, index, rows, extras)
    : attendRowForm(g, { ...shared, form }, index, rows, extras);
}

const namesOf = (index: number, place: number): KeysValues => ({
  k: { name: `new_k_${index}_${place}` },
  v: { name: `new_v_${index}_${place}` },
});

/** The result of attention, and the buffers of heads with the new K and V. */
type Attended = { readonly attended: Value; readonly grown: KeysValues };

/** K and V of decoded tokens, and of each place. */
type HeadBuffers = { readonly tokens: KeysValues; readonly places: readonly KeysValues[] };
/** The result of a layer's attention, and the buffers of tokens and of each place, grown. */
type AllAttended = { readonly attended: Value; readonly grown: readonly KeysValues[] };

function attendHeads(
  g: GraphBuilder,
  shared: Attending & { readonly form: HeadForm },
  index: number,
  rows: Rows,
  extras: Extras,
): Value {
  const { config, form } = shared;
  const width = config.headCount * config.headSize;
  const heads: HeadBuffers = {
    tokens: headInputs(g, config, `${index}`),
    places: Array.from({ length: placesOf(shared.kvType) }, (_, place) =>
      headInputs(g, config, `${index}_${place}`),
    ),
  };
  const branch = (name: string, build: (b: GraphBuilder) => AllAttended) =>
    g.subgraph(`${name}_${index}`, (b) => {
      const { attended, grown } = build(b);
      b.output(attended, 'f32', [1, `running_${index}`, width]);
      for (const one of grown) outputGrown(b, one);
    });
  const attended = { name: g.fresh('attended') };
  const grown = [
    { k: { name: `grown_k_${index}` }, v: { name: `grown_v_${index}` } },
    ...heads.places.map((_, place) => namesOf(index, place)),
  ];
  g.node(
    'If',
    [form.tokensAlone[index]],
    [attended, ...grown.flatMap(({ k, v }) => [k, v])].map(({ name }) => name),
    {
      then_branch: { graph: branch('tokens', (b) => attendTokens(b, shared, rows, heads, extras)) },
      else_branch: {
        graph: branch('tokens_and_pieces', (b) => attendBoth(b, shared, index, rows, heads, extras)),
      },
    },
  );
  for (const one of grown) outputGrown(g, one);
  return attended;
}

/** All rows are decoded tokens. */
function attendTokens(
  b: GraphBuilder,
  shared: Attending & { readonly form: HeadForm },
  rows: Rows,
  { tokens, places }: HeadBuffers,
  extras: Extras,
): AllAttended {
  const { attended, grown } = attendRows(b, shared, extras, rows, tokens, shared.form.lengths);
  return { attended, grown: [grown, ...places.map(() => nothingGrown(b, shared.config))] };
}

/** Rows of decoded tokens, if there are any, and of each place with a piece. */
function attendBoth(
  b: GraphBuilder,
  shared: Attending & { readonly form: HeadForm },
  index: number,
  rows: Rows,
  heads: HeadBuffers,
  extras: Extras,
): AllAttended {
  const { config, form } = shared;
  const places = heads.places.length;
  const [tokens, ...pieces] = byKind(b, rows, form.counts[index]!, 1 + places);
  const ofPieces = pieces.map(({ product, positions }, place) => {
    const i = index * places + place;
    const piece = { product, positions: () => positions };
    return attendWhere(b, config, shared.hasPlace[i]!, `${index}_${place}`, (c) =>
      attendByHead(c, shared, extras, piece, heads.places[place]!, form.placeLengths[i]!),
    );
  });
  const own = { ...tokens!, product: after(b, tokens!.product, ofPieces, shared) };
  const ofTokens = attendWhere(b, config, form.hasTokens[index]!, `${index}`, (c) =>
    attendRows(c, shared, extras, own, heads.tokens, form.lengths),
  );
  const all = [ofTokens, ...ofPieces];
  const parts = all.map(({ attended }) => attended);
  return { attended: b.op('Concat', parts, { axis: 1 }), grown: all.map(({ grown }) => grown) };
}

/** Splits rows into those of decoded tokens and those of each place. */
function byKind(b: GraphBuilder, { product, positions }: Rows, counts: Value, kinds: number): Rows[] {
  const products = b.ops('Split', [product, counts], kinds, { axis: 1 });
  const places = b.ops('Split', [positions, counts], kinds, { axis: 1 });
  return products.map((own, i) => ({ product: own, positions: places[i]! }));
}

/**
 * The unchanged `product` of the decoded tokens, but available only after the attention of all pieces. The tokens' node
 * also writes K and V for sequences that decode no token, over the first token of a piece (`engine/head-caches.ts`), which
 * must be read before.
 */
function after(
  b: GraphBuilder,
  product: Value,
  pieces: readonly Attended[],
  { config }: Pick<Attending, 'config'>,
): Value {
  const width = (config.headCount + 2 * config.kvHeadCount) * config.headSize;
  const sizes = pieces.map(({ attended }) => b.op('Shape', [attended], { start: 0, end: 1 }));
  // All are 1, and so is their product.
  const one = sizes.reduce((all, size) => b.op('Mul', [all, size]));
  const dims = b.op('Concat', [one, b.ints(-1, width)], { axis: 0 });
  return b.op('Reshape', [product, dims]);
}

/** Attention of rows that are one token each of different sequences. */
function attendRows(
  b: GraphBuilder,
  shared: Attending,
  extras: Extras,
  { product, positions }: Rows,
  heads: KeysValues,
  lengths: HeadLengths,
): Attended {
  const { headCount: N, kvHeadCount: G, headSize: D } = shared.config;
  const apart = {
    product: b.reshape(product, -1, 1, (N + 2 * G) * D),
    positions: () => b.reshape(positions, -1, 1),
  };
  const { attended, grown } = attendByHead(b, shared, extras, apart, heads, lengths);
  return { attended: b.reshape(attended, 1, -1, N * D), grown };
}

/** Attention, or an empty result unless `isThere`: the node refuses inputs without rows. */
function attendWhere(
  b: GraphBuilder,
  config: ModelConfig,
  isThere: Value,
  name: string,
  build: (c: GraphBuilder) => Attended,
): Attended {
  const width = config.headCount * config.headSize;
  const branch = (kind: string, build: (c: GraphBuilder) => Attended) =>
    b.subgraph(`${kind}_rows_${name}`, (c) => {
      const { attended, grown } = build(c);
      c.output(attended, 'f32', [1, `rows_${name}`, width]);
      outputGrown(c, grown);
    });
  const [attended, k, v] = b.ops('If', [isThere], 3, {
    then_branch: { graph: branch('some', build) },
    else_branch: {
      graph: branch('no', (c) => ({
        attended: c.op('Identity', [c.constant('f32', [1, 0, width], [])]),
        grown: nothingGrown(c, config),
      })),
    },
  });
  return { attended: attended!, grown: { k: k!, v: v! } };
}

function attendRowForm(
  g: GraphBuilder,
  shared: Attending & { readonly form: RowForm },
  index: number,
  { product, positions }: Rows,
  extras: Extras,
): Value {
  const { config, kvType } = shared;
  const places = Array.from({ length: placesOf(kvType) }, (_, place) => place);
  const past = places.map((place) => ({
    k: pastInput(g, shared, 'k', index, place),
    v: pastInput(g, shared, 'v', index, place),
  }));
  const fresh = places.map((place) => namesOf(index, place));
  const computed = { ...queriesKeysValues(g, shared, extras, product, positions), positions };
  writePlaces(g, shared, index, computed, fresh);
  fresh.forEach(({ k, v }, place) => {
    const shape = [1, `rows_${index}_${place}`, config.kvHeadCount * config.headSize];
    g.output(k, kvType, shape);
    g.output(v, kvType, shape);
  });
  return attendByPlace(g, shared, index, computed, { window: extras.window, past, fresh });
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

function writePlaces(
  b: GraphBuilder,
  shared: Attending & { readonly form: RowForm },
  index: number,
  computed: Computed,
  fresh: Fresh,
): void {
  const { k, v } = asKept(b, shared.kvType, computed);
  const counts = shared.form.placeRows[index]!;
  const names = (name: 'k' | 'v') => fresh.map((one) => one[name].name);
  b.node('Split', [k, counts], names('k'), { axis: 1 });
  b.node('Split', [v, counts], names('v'), { axis: 1 });
}

/** Attention with a node for each sequence, `[1, rows, N·D]`. */
function attendByPlace(
  g: GraphBuilder,
  shared: Attending & { readonly form: RowForm },
  index: number,
  { q, positions }: Computed,
  {
    window,
    past,
    fresh,
  }: { readonly window: number | undefined; readonly past: readonly KeysValues[]; readonly fresh: Fresh },
): Value {
  const { headCount: N, kvHeadCount: G, headSize: D } = shared.config;
  const places = placesOf(shared.kvType);
  const nobody = g.constant('f32', [1, 0, N * D], []);
  const attend = (b: GraphBuilder, place: number, queries: Value, at: Value, keyCount: Value): Value => {
    // Reads are safe: the branch waits for the writes through `afterWrites`.
    const { k, v } = asRead(b, shared.kvType, past[place]!);
    return b.op(
      'Attention',
      [queries, k, v, seen(b, place, at), undefined, undefined, keyCount],
      // Rows of Q carry 1/√D already (see `one-mask-llama.ts`).
      { q_num_heads: N, kv_num_heads: G, is_causal: 1, scale: { float: 1 } },
    );
  };
  const seen = (b: GraphBuilder, place: number, at: Value) =>
    window === undefined ? undefined : windowMask(b, window, at, past[place]!.k);
  const of = (b: GraphBuilder, count: number): Value => {
    if (count === 0) return b.op('Identity', [nobody]);
    const all = shared.form.placeRows[index]!;
    const counts = count === places ? all : b.op('Slice', [all, b.ints(0), b.ints(count), b.ints(0)]);
    const cut = (value: Value) =>
      count === 1 ? [value] : b.ops('Split', [value, counts], count, { axis: 1 });
    const queries = cut(q);
    const at = window === undefined ? queries : cut(positions);
    const attended = queries.map((own, place) => {
      const keyCount = shared.form.keyCounts[index * places + place]!;
      const count = place === 0 ? afterWrites(b, fresh[0]!, keyCount) : keyCount;
      return attend(b, place, own, at[place]!, count);
    });
    return count === 1 ? attended[0]! : b.op('Concat', attended, { axis: 1 });
  };
  /** Nested `If`s for `low` to `high` running sequences; tests for a full step first, then for a single sequence. */
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

/** The unchanged key count, but available only after the layer's new K and V are written: orders writes before reads. */
function afterWrites(b: GraphBuilder, { k, v }: KeysValues, keyCount: Value): Value {
  const rows = (value: Value) => b.op('Shape', [value], { start: 1, end: 2 });
  return b.op('Max', [keyCount, rows(k), rows(v)]);
}
