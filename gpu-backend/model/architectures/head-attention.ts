/**
 * Attention to keys and values that stand head by head, in one node: of one new token each of several sequences, or of a piece of
 * one.
 *
 * K and V of all sequences stand in one buffer each, head by head, `[B, G, T, D]` (B = sequences, G = KV heads, T = room for
 * tokens, D = head width). The node writes the new K and V into the buffer that it reads from, which is fed and fetched at
 * once (`engine/head-caches.ts`), and reads each sequence as far as it goes. A row's sums depend on nothing but its own keys:
 * a sequence has the same bits alone and in company. Keys of a head lie one behind the other, so long contexts are read faster
 * than from rows of all heads.
 *
 * The node takes the product with the rows of QKV as it is and rotates Q and K by itself, where nothing stands between: that is
 * three nodes fewer a layer. The positions that it rotates by are the lengths.
 *
 * It takes heads whose width is a multiple of 8. Narrower ones stand in the buffers with zeros behind: these add nothing to a score, and
 * what they give is cut off.
 *
 * Several tokens of several sequences behind others are refused: each piece of a prompt has a node of its own.
 */
import { type GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import type { LlamaConfig } from '../model-source.ts';
import { type Extras, type KeysValues, queriesKeysValues, type Rotary } from './attention-extras.ts';

/** The node rotates heads whose width is a multiple of this. */
const ROTATED_HEADS = 16;
const HEAD_UNIT = 8;

/** How wide a head of this model stands in the buffers. */
export const headRoom = ({ headSize }: Pick<LlamaConfig, 'headSize'>): number =>
  Math.ceil(headSize / HEAD_UNIT) * HEAD_UNIT;

/** `x` `[B, S, heads·D]` with zeros behind each head, as wide as the buffers have it. */
export function widened(b: GraphBuilder, config: LlamaConfig, x: Value, heads: number): Value {
  const { headSize } = config;
  const missing = headRoom(config) - headSize;
  if (missing === 0) return x;
  const apart = b.op('Reshape', [x, b.constant('i64', [4], [0, 0, heads, headSize])]);
  const wide = b.op('Pad', [apart, b.constant('i64', [8], [0, 0, 0, 0, 0, 0, 0, missing])]);
  return b.op('Reshape', [wide, b.constant('i64', [3], [0, 0, heads * headRoom(config)])]);
}

/** The inverse of {@link widened}. */
export function narrowed(b: GraphBuilder, config: LlamaConfig, x: Value, heads: number): Value {
  const { headSize } = config;
  if (headRoom(config) === headSize) return x;
  const int = (value: number) => b.constant('i64', [1], [value]);
  const apart = b.op('Reshape', [x, b.constant('i64', [4], [0, 0, heads, headRoom(config)])]);
  const narrow = b.op('Slice', [apart, int(0), int(headSize), int(3)]);
  return b.op('Reshape', [narrow, b.constant('i64', [3], [0, 0, heads * headSize])]);
}

/** What says how far each sequence goes. */
export type HeadLengths = {
  /** `[B]` int32: tokens before the last new one. */
  readonly past: Value;
  /** `[1]` int32: the most keys of any, the new ones counted. */
  readonly most: Value;
};

/** Inputs `token_pasts` and `token_keys_max`. */
export const headLengths = (g: GraphBuilder): HeadLengths => ({
  past: g.input('token_pasts', 'i32', ['token_sequences']),
  most: g.input('token_keys_max', 'i32', [1]),
});

/** Inputs `heads_k_WHOSE` and `heads_v_WHOSE`: of a layer, or of a place in it. */
export const headInputs = (g: GraphBuilder, config: LlamaConfig, whose: string): KeysValues => {
  const shape = [`sequences_${whose}`, config.kvHeadCount, `room_${whose}`, headRoom(config)];
  const input = (name: string) => g.input(`heads_${name}_${whose}`, 'f32', shape);
  return { k: input('k'), v: input('v') };
};

/** Free sizes: where no token is computed, `[1, G, 0, D]` comes out instead of the buffers. */
const GROWN = ['grown_sequences', 'grown_heads', 'grown_room', 'grown_width'];

/** The buffers, which then hold the new tokens, as outputs of a branch or a graph. */
export function outputGrown(b: GraphBuilder, { k, v }: KeysValues): void {
  b.output(k, 'f32', GROWN);
  b.output(v, 'f32', GROWN);
}

export function nothingGrown(b: GraphBuilder, config: LlamaConfig): KeysValues {
  const none = () => b.constant('f32', [1, config.kvHeadCount, 0, headRoom(config)], []);
  return { k: none(), v: none() };
}

/** The product with the rows of QKV, `[B, S, (N + 2G)·D]`, and its rows' positions, `[B, S]`, which seldom are asked for; S or B is 1. */
export type HeadRows = { readonly product: Value; positions(): Value };

/** What each row attends to, `[B, S, N·D]`, and the grown buffers. */
export function attendByHead(
  b: GraphBuilder,
  shared: Rotary,
  extras: Extras,
  { product, positions }: HeadRows,
  heads: KeysValues,
  { past, most }: HeadLengths,
): { readonly attended: Value; readonly grown: KeysValues } {
  const { config, cos, sin } = shared;
  const { headCount, kvHeadCount, headSize } = config;
  const canRotate = !extras.hasRope || headSize % ROTATED_HEADS === 0;
  const isWhole = !extras.hasNorms && headRoom(config) === headSize && canRotate;
  const rotates = isWhole && extras.hasRope;
  const { q, k, v } = isWhole
    ? { q: extras.biased(b, product, { from: 0, count: headCount + 2 * kvHeadCount }) }
    : wideQueriesKeysValues(b, shared, extras, product, positions());
  const [attended, grownK, grownV] = b.ops(
    'GroupQueryAttention',
    [q, k, v, heads.k, heads.v, past, most, ...(rotates ? [cos, sin] : [])],
    3,
    {
      num_heads: headCount,
      kv_num_heads: kvHeadCount,
      // Rows of Q carry 1/√D already.
      scale: { float: 1 },
      ...(rotates ? { do_rotary: 1 } : {}),
      ...(extras.window === undefined ? {} : { local_window_size: extras.window }),
    },
    MICROSOFT,
  );
  return { attended: narrowed(b, config, attended!, headCount), grown: { k: grownK!, v: grownV! } };
}

/** As {@link queriesKeysValues}, each head as wide as the buffers have it. */
export function wideQueriesKeysValues(
  b: GraphBuilder,
  shared: Rotary,
  extras: Extras,
  product: Value,
  positions: Value,
): KeysValues & { readonly q: Value } {
  const { config } = shared;
  const { q, k, v } = queriesKeysValues(b, shared, extras, product, positions);
  return {
    q: widened(b, config, q, config.headCount),
    k: widened(b, config, k, config.kvHeadCount),
    v: widened(b, config, v, config.kvHeadCount),
  };
}
