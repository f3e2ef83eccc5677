/**
 * Attention over a KV cache in head-major order, in one `GroupQueryAttention` node: for one new token each of several
 * sequences, or for several tokens of one sequence. Training has whole sequences and no cache.
 *
 * K and V of all sequences are one buffer each, `[B, G, T, D]` (B = sequences, G = KV heads, T = capacity in tokens, D = head
 * width). The same buffer is input and output of the node (`engine/head-caches.ts`), which appends the new K and V and reads
 * each sequence up to its length. A row's result depends only on its own keys, so a sequence has the same bits alone and in
 * a batch. The keys of a head are contiguous, so long contexts are read faster than from rows of all heads.
 *
 * If no norm and no padding is in between, the node takes the product with QKV and applies rotary embedding itself, which
 * saves three nodes a layer. It takes the positions from the lengths.
 *
 * The node needs heads whose width is a multiple of 8. Other heads are padded with zeros in the buffers; zeros add nothing to
 * a score, and their part of the output is cut off.
 *
 * The node refuses several tokens each of several sequences with a past, so each piece of a prompt has a node of its own.
 * Without a past it takes many sequences of one length.
 */
import { type GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import type { ModelConfig } from '../model-source.ts';
import {
  type Extras,
  type KeysValues,
  queriesKeysValues,
  type Rotary,
  ropeTable,
} from './attention-extras.ts';

/** The node applies rotary embedding only to heads whose width is a multiple of this. */
const ROTATED_HEADS = 16;
const HEAD_UNIT = 8;
/** Which scores the node's fourth output has. */
const AFTER_SOFTMAX = 2;

/** The width of a head in the buffers, padding included. */
export const headRoom = ({ headSize }: Pick<ModelConfig, 'headSize'>): number =>
  Math.ceil(headSize / HEAD_UNIT) * HEAD_UNIT;

/** `x` `[B, S, heads·D]` with each head padded with zeros to the width of the buffers. */
export function widened(b: GraphBuilder, config: ModelConfig, x: Value, heads: number): Value {
  const { headSize } = config;
  const missing = headRoom(config) - headSize;
  if (missing === 0) return x;
  const apart = b.reshape(x, 0, 0, heads, headSize);
  const wide = b.op('Pad', [apart, b.ints(0, 0, 0, 0, 0, 0, 0, missing)]);
  return b.reshape(wide, 0, 0, heads * headRoom(config));
}

/** The inverse of {@link widened}. */
export function narrowed(b: GraphBuilder, config: ModelConfig, x: Value, heads: number): Value {
  const { headSize } = config;
  if (headRoom(config) === headSize) return x;
  const apart = b.reshape(x, 0, 0, heads, headRoom(config));
  const narrow = b.op('Slice', [apart, b.ints(0), b.ints(headSize), b.ints(3)]);
  return b.reshape(narrow, 0, 0, heads * headSize);
}

/** The lengths of the sequences. */
export type HeadLengths = {
  /** `[B]` int32: tokens before the last new one. */
  readonly past: Value;
  /** `[1]` int32: the most keys of a sequence, including the new ones. */
  readonly most: Value;
};

/** Inputs `token_pasts` and `token_keys_max`. */
export const headLengths = (g: GraphBuilder): HeadLengths => ({
  past: g.input('token_pasts', 'i32', ['token_sequences']),
  most: g.input('token_keys_max', 'i32', [1]),
});

/** Inputs `heads_k_WHOSE` and `heads_v_WHOSE`: the buffers of a layer, or of a place in it. */
export const headInputs = (g: GraphBuilder, config: ModelConfig, whose: string): KeysValues => {
  const shape = [`sequences_${whose}`, config.kvHeadCount, `room_${whose}`, headRoom(config)];
  const input = (name: string) => g.input(`heads_${name}_${whose}`, 'f32', shape);
  return { k: input('k'), v: input('v') };
};

/** Symbolic dimensions, as the output is `[1, G, 0, D]` instead of the buffers when no token is computed. */
const GROWN = ['grown_sequences', 'grown_heads', 'grown_room', 'grown_width'];

/** Makes the buffers with the new tokens outputs of a branch or a graph. */
export function outputGrown(b: GraphBuilder, { k, v }: KeysValues): void {
  b.output(k, 'f32', GROWN);
  b.output(v, 'f32', GROWN);
}

export function nothingGrown(b: GraphBuilder, config: ModelConfig): KeysValues {
  const none = () => b.constant('f32', [1, config.kvHeadCount, 0, headRoom(config)], []);
  return { k: none(), v: none() };
}

/**
 * The product with QKV, `[B, S, (N + 2G)·D]`, and the positions, `[B, S]`; S or B is 1 unless the tokens are whole sequences.
 * `positions` is a function, as most models do not need it.
 */
type HeadRows = { readonly product: Value; positions(): Value };

/**
 * The result of attention, `[B, S, N·D]`, and the buffers with the new tokens. Without `heads` the tokens are whole sequences. With
 * `keepsProbabilities` the node has a fourth output, `[B, N, S, T]`, which its gradient needs.
 */
export function attendByHead(
  b: GraphBuilder,
  shared: Rotary,
  extras: Extras,
  { product, positions }: HeadRows,
  heads: KeysValues | undefined,
  { past, most }: HeadLengths,
  { keepsProbabilities = false }: { readonly keepsProbabilities?: boolean } = {},
): { readonly attended: Value; readonly grown: KeysValues } {
  const { config } = shared;
  const { headCount, kvHeadCount, headSize } = config;
  const canRotate = extras.rope === undefined || headSize % ROTATED_HEADS === 0;
  const isWhole = !extras.hasNorms && headRoom(config) === headSize && canRotate;
  const rope = isWhole && extras.rope !== undefined ? ropeTable(shared, extras.rope) : undefined;
  const { q, k, v } = isWhole
    ? { q: extras.biased(b, product, { from: 0, count: headCount + 2 * kvHeadCount }) }
    : wideQueriesKeysValues(b, shared, extras, product, positions());
  const [attended, grownK, grownV] = b.ops(
    'GroupQueryAttention',
    [q, k, v, heads?.k, heads?.v, past, most, rope?.cos, rope?.sin],
    keepsProbabilities ? 4 : 3,
    {
      num_heads: headCount,
      kv_num_heads: kvHeadCount,
      // Rows of Q carry 1/√D already.
      scale: { float: 1 },
      ...(rope ? { do_rotary: 1 } : {}),
      ...(extras.window === undefined ? {} : { local_window_size: extras.window }),
      ...(keepsProbabilities ? { qk_output: AFTER_SOFTMAX } : {}),
    },
    MICROSOFT,
  );
  return { attended: narrowed(b, config, attended!, headCount), grown: { k: grownK!, v: grownV! } };
}

/** {@link queriesKeysValues} with heads padded to the width of the buffers. */
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
