/**
 * Attention of one new token each of several sequences, in one node: what answers are made with.
 *
 * K and V of all sequences stand in one buffer each, head by head, `[B, G, T, D]` (B = sequences, G = KV heads, T = room for
 * tokens, D = head width). The node writes the new K and V into the buffer that it reads from, which is fed and fetched at
 * once (`engine/head-caches.ts`), and reads each sequence as far as it goes. A row's sums depend on nothing but its own keys:
 * a sequence has the same bits alone and in company. Keys of a head lie one behind the other, so long contexts are read faster
 * than from rows of all heads.
 *
 * It takes single tokens alone: several tokens of several sequences behind others are refused. So pieces of prompts go
 * through `Attention`, over rows of all heads.
 */
import { type GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import type { LlamaConfig } from '../model-source.ts';
import type { KeysValues } from './attention-extras.ts';

/** What says how far each sequence goes. */
export type TokenLengths = {
  /** `[B]` int32: tokens before the new one. */
  readonly past: Value;
  /** `[1]` int32: the most keys of any, the new one counted. */
  readonly most: Value;
};

/** Inputs `token_pasts` and `token_keys_max`. */
export const tokenLengths = (g: GraphBuilder): TokenLengths => ({
  past: g.input('token_pasts', 'i32', ['token_sequences']),
  most: g.input('token_keys_max', 'i32', [1]),
});

/** Inputs `heads_k_i` and `heads_v_i`. */
export const headInputs = (
  g: GraphBuilder,
  { kvHeadCount, headSize }: LlamaConfig,
  index: number,
): KeysValues => {
  const input = (name: string) =>
    g.input(`heads_${name}_${index}`, 'f32', ['token_sequences', kvHeadCount, 'room', headSize]);
  return { k: input('k'), v: input('v') };
};

/** Free sizes: where no token is computed, `[1, G, 0, D]` comes out instead of the buffers. */
const GROWN = ['grown_sequences', 'grown_heads', 'grown_room', 'grown_width'];

/** The buffers, which then hold the new token, as outputs of a branch or a graph. */
export function outputGrown(b: GraphBuilder, { k, v }: KeysValues): void {
  b.output(k, 'f32', GROWN);
  b.output(v, 'f32', GROWN);
}

export function nothingGrown(b: GraphBuilder, { kvHeadCount, headSize }: LlamaConfig): KeysValues {
  const none = () => b.constant('f32', [1, kvHeadCount, 0, headSize], []);
  return { k: b.op('Identity', [none()]), v: b.op('Identity', [none()]) };
}

/** `q` `[B, 1, N·D]`, `k` and `v` `[B, 1, G·D]` → what each attends to, `[B, 1, N·D]`, and the grown buffers. */
export function attendTokens(
  b: GraphBuilder,
  { headCount, kvHeadCount }: LlamaConfig,
  { q, k, v }: KeysValues & { readonly q: Value },
  heads: KeysValues,
  { past, most }: TokenLengths,
  window: number | undefined,
): { readonly attended: Value; readonly grown: KeysValues } {
  const [attended, grownK, grownV] = b.ops(
    'GroupQueryAttention',
    [q, k, v, heads.k, heads.v, past, most],
    3,
    {
      num_heads: headCount,
      kv_num_heads: kvHeadCount,
      // Rows of Q carry 1/√D already.
      scale: { float: 1 },
      ...(window === undefined ? {} : { local_window_size: window }),
    },
    MICROSOFT,
  );
  return { attended: attended!, grown: { k: grownK!, v: grownV! } };
}
