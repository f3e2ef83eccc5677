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
 * Several tokens of several sequences behind others are refused: each piece of a prompt has a node of its own.
 */
import { type GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import type { LlamaConfig } from '../model-source.ts';
import { type Extras, type KeysValues, queriesKeysValues, type Rotary } from './attention-extras.ts';

/** The node rotates heads whose width is a multiple of this. */
const ROTATED_HEADS = 16;

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
export const headInputs = (
  g: GraphBuilder,
  { kvHeadCount, headSize }: LlamaConfig,
  whose: string,
): KeysValues => {
  const input = (name: string) =>
    g.input(`heads_${name}_${whose}`, 'f32', [`sequences_${whose}`, kvHeadCount, `room_${whose}`, headSize]);
  return { k: input('k'), v: input('v') };
};

/** Free sizes: where no token is computed, `[1, G, 0, D]` comes out instead of the buffers. */
const GROWN = ['grown_sequences', 'grown_heads', 'grown_room', 'grown_width'];

/** The buffers, which then hold the new tokens, as outputs of a branch or a graph. */
export function outputGrown(b: GraphBuilder, { k, v }: KeysValues): void {
  b.output(k, 'f32', GROWN);
  b.output(v, 'f32', GROWN);
}

export function nothingGrown(b: GraphBuilder, { kvHeadCount, headSize }: LlamaConfig): KeysValues {
  const none = () => b.constant('f32', [1, kvHeadCount, 0, headSize], []);
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
  const isWhole = !extras.hasNorms && (!extras.hasRope || headSize % ROTATED_HEADS === 0);
  const rotates = isWhole && extras.hasRope;
  const { q, k, v } = isWhole
    ? { q: extras.biased(b, product, { from: 0, count: headCount + 2 * kvHeadCount }) }
    : queriesKeysValues(b, shared, extras, product, positions());
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
  return { attended: attended!, grown: { k: grownK!, v: grownV! } };
}
