/**
 * Attention of many sequences in one run, in the batched graph (`batched-llama.ts`).
 *
 * Shapes: N/G = query/KV heads, D = head width, P = places.
 *
 * Tokens of answers are attended all together (`head-attention.ts`). Any other sequence has a node of its own. It stands in a place: a
 * layer's running ones in its first places, whoever they are. An `If` passes by what nobody needs, because attention without
 * rows is an error. No weight lies in these branches: ONNX Runtime does not prepack two branches deep.
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
import { attendByHead, type HeadLengths, headInputs, nothingGrown, outputGrown } from './head-attention.ts';
import { asKept, asRead } from './llama.ts';

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
  /** For each place of each layer: whether more sequences run than stand before it. */
  readonly hasPlace: readonly Value[];
  readonly form: HeadForm | RowForm;
};

/** K and V in halves are rows of all heads. */
type RowForm = {
  readonly kind: 'rows';
  /** `[P]` a layer: how many of its running rows each place has. */
  readonly placeRows: readonly Value[];
  /** `[1]` for each place of each layer: keys, the new ones counted. */
  readonly keyCounts: readonly Value[];
};

/** In fp32 they are kept head by head. Rows that are a token of an answer each stand first. */
type HeadForm = {
  readonly kind: 'heads';
  /** Of tokens. */
  readonly lengths: HeadLengths;
  /** Of the sequence in each place of each layer. */
  readonly placeLengths: readonly HeadLengths[];
  /** `[1 + P]` a layer: how many of the rows that it computes are tokens, and how many each place has. */
  readonly counts: readonly Value[];
  readonly hasTokens: readonly Value[];
  /** Whether a layer computes tokens and nothing else: the step that is in the greatest hurry. */
  readonly tokensAlone: readonly Value[];
};

/** Of the rows that a layer computes: their product with the rows of QKV, `[1, rows, (N + 2G)·D]`, and their positions, `[1, rows]`. */
type Rows = { readonly product: Value; readonly positions: Value };
/** `q` `[1, rows, N·D]`, `k` and `v` `[1, rows, G·D]`, `positions` `[1, rows]`. */
type Computed = KeysValues & { readonly q: Value; readonly positions: Value };
/** K and V of a place's new rows, which are bound in place into its cache (`engine/kv-cache.ts`). */
type Fresh = readonly KeysValues[];

/** What a layer's rows attend to, `[1, rows, N·D]`; writes their K and V. */
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

/** What heads are attended with gives, and the buffers of heads, which hold the new K and V then. */
type Attended = { readonly attended: Value; readonly grown: KeysValues };

function attendHeads(
  g: GraphBuilder,
  shared: Attending & { readonly form: HeadForm },
  index: number,
  rows: Rows,
  extras: Extras,
): Value {
  const { config, form } = shared;
  const width = config.headCount * config.headSize;
  const places = placesOf(shared.kvType);
  const heads = headInputs(g, config, `${index}`);
  const ofPlaces = Array.from({ length: places }, (_, place) => headInputs(g, config, `${index}_${place}`));
  const branch = (
    name: string,
    build: (b: GraphBuilder) => { readonly attended: Value; readonly grown: readonly KeysValues[] },
  ) =>
    g.subgraph(name, (b) => {
      const { attended, grown } = build(b);
      b.output(attended, 'f32', [1, `running_${index}`, width]);
      for (const one of grown) outputGrown(b, one);
    });
  const nothing = (b: GraphBuilder) => nothingGrown(b, config);
  const attended = { name: g.fresh('attended') };
  const grown = [
    { k: { name: `grown_k_${index}` }, v: { name: `grown_v_${index}` } },
    ...ofPlaces.map((_, place) => namesOf(index, place)),
  ];
  g.node(
    'If',
    [form.tokensAlone[index]],
    [attended, ...grown.flatMap(({ k, v }) => [k, v])].map(({ name }) => name),
    {
      then_branch: {
        graph: branch(`tokens_${index}`, (b) => {
          const found = attendRows(b, shared, extras, rows, heads, form.lengths);
          return { attended: found.attended, grown: [found.grown, ...ofPlaces.map(() => nothing(b))] };
        }),
      },
      else_branch: {
        graph: branch(`tokens_and_pieces_${index}`, (b) => {
          const [tokens, ...pieces] = byKind(b, rows, form.counts[index]!, 1 + places);
          const ofPieces = pieces.map((piece, place) => {
            const i = index * places + place;
            return attendWhere(b, config, shared.hasPlace[i]!, `${index}_${place}`, (c) =>
              attendByHead(
                c,
                shared,
                extras,
                { product: piece.product, positions: () => piece.positions },
                ofPlaces[place]!,
                form.placeLengths[i]!,
              ),
            );
          });
          const own = { ...tokens!, product: after(b, tokens!.product, ofPieces, shared) };
          const ofTokens = attendWhere(b, config, form.hasTokens[index]!, `${index}`, (c) =>
            attendRows(c, shared, extras, own, heads, form.lengths),
          );
          const all = [ofTokens, ...ofPieces];
          return {
            attended: b.op(
              'Concat',
              all.map((one) => one.attended),
              { axis: 1 },
            ),
            grown: all.map((one) => one.grown),
          };
        }),
      },
    },
  );
  for (const one of grown) outputGrown(g, one);
  return attended;
}

/** The rows of tokens, and those of each place. */
function byKind(b: GraphBuilder, { product, positions }: Rows, counts: Value, kinds: number): Rows[] {
  const products = b.ops('Split', [product, counts], kinds, { axis: 1 });
  const places = b.ops('Split', [positions, counts], kinds, { axis: 1 });
  return products.map((own, i) => ({ product: own, positions: places[i]! }));
}

/**
 * The product of tokens, known only once pieces are attended. Between tokens stand places where nobody's token is computed, and what is
 * computed there writes over the first token of a piece (`engine/head-caches.ts`): it must be read before.
 */
function after(
  b: GraphBuilder,
  product: Value,
  pieces: readonly Attended[],
  { config }: Pick<Attending, 'config'>,
): Value {
  const width = (config.headCount + 2 * config.kvHeadCount) * config.headSize;
  const sizes = pieces.map(({ attended }) => b.op('Shape', [attended], { start: 0, end: 1 }));
  // Each is 1: what comes out is 1 as well.
  const one = sizes.reduce((all, size) => b.op('Mul', [all, size]));
  const dims = b.op('Concat', [one, b.constant('i64', [2], [-1, width])], { axis: 0 });
  return b.op('Reshape', [product, dims]);
}

/** Each row is a sequence of its own. */
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
    product: b.op('Reshape', [product, b.constant('i64', [3], [-1, 1, (N + 2 * G) * D])]),
    positions: () => b.op('Reshape', [positions, b.constant('i64', [2], [-1, 1])]),
  };
  const { attended, grown } = attendByHead(b, shared, extras, apart, heads, lengths);
  return { attended: b.op('Reshape', [attended, b.constant('i64', [3], [1, -1, N * D])]), grown };
}

/** The same where there may be no row: the node refuses to have none. */
function attendWhere(
  b: GraphBuilder,
  config: LlamaConfig,
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

/** What rows attend to where each sequence has a node of its own, `[1, rows, N·D]`. */
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
    const all = shared.form.placeRows[index]!;
    const one = (value: number) => b.constant('i64', [1], [value]);
    const counts = count === places ? all : b.op('Slice', [all, one(0), one(count), one(0)]);
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
