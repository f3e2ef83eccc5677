/**
 * The KV cache of one sequence, written through: the graph's new K and V are bound in place into these
 * buffers, and the same buffers, viewed up to the live length, are fed back as the past. Nothing is copied a
 * token; a buffer that is full is copied once into one of twice the size.
 *
 * This rests on two properties of the runtime: a preallocated output is written in place, and an input is
 * read in place. `test/gpu-backend/engine/kv-cache.test.ts` compares it with a cache that copies, and is
 * what will tell when a new ONNX Runtime changes either.
 */

import type { Feeds, Fetches, RuntimeTensor } from '../onnx/session.ts';
import { tensor } from '../onnx/session.ts';

/** `width` = KV heads · head width, floats a token and layer. */
export type CacheShape = {
  readonly layerCount: number;
  readonly width: number;
  readonly contextTokens: number;
};

/** What the engine knows of a cache, wherever keys and values lie. */
export type SequenceCache = Pick<
  KvCache,
  'length' | 'capacity_tokens' | 'reserve' | 'truncate' | 'appendPage' | 'copyPage'
>;

const INITIAL_TOKENS = 256;
/** Attention costs in proportion to the view, so it stays near the live length. */
const VIEW_STEP_TOKENS = 16;

export class KvCache {
  readonly shape: CacheShape;
  /** Tokens whose K and V are written. */
  length = 0;
  #capacity_tokens = 0;
  /** K of layer i at 2i, V at 2i + 1; each `[capacity, width]`. */
  #buffers: Float32Array[];
  #past: { readonly viewTokens: number; readonly tensors: readonly RuntimeTensor[] } | undefined;

  /** Takes no memory before the first `reserve`. */
  constructor(shape: CacheShape) {
    this.shape = shape;
    this.#buffers = Array.from({ length: 2 * shape.layerCount }, () => new Float32Array(0));
  }

  get capacity_tokens(): number {
    return this.#capacity_tokens;
  }

  /** Makes room for `tokens` more; asked for what is known to come, it copies nothing later. @throws RangeError past the model's context. */
  reserve(tokens: number): void {
    const needed = this.length + tokens;
    const { contextTokens, width } = this.shape;
    if (needed > contextTokens)
      throw new RangeError(`${needed} tokens do not fit a context of ${contextTokens}`);
    if (needed <= this.#capacity_tokens) return;
    let capacity = Math.max(this.#capacity_tokens, INITIAL_TOKENS);
    while (capacity < needed) capacity *= 2;
    this.#capacity_tokens = Math.min(capacity, contextTokens);
    this.#buffers = this.#buffers.map((old) => {
      const grown = new Float32Array(this.#capacity_tokens * width);
      grown.set(old.subarray(0, this.length * width));
      return grown;
    });
    this.#past = undefined;
  }

  /** K of layer i at 2i, V at 2i + 1, `[1, T, width]` each, T ≥ length + tokens: to be fed. Call `reserve` first. */
  past(tokens: number): readonly RuntimeTensor[] {
    const live = Math.ceil((this.length + tokens) / VIEW_STEP_TOKENS) * VIEW_STEP_TOKENS;
    const viewTokens = Math.min(live, this.#capacity_tokens);
    if (this.#past?.viewTokens !== viewTokens) {
      const dims = [1, viewTokens, this.shape.width];
      const view = (buffer: Float32Array) =>
        tensor('f32', buffer.subarray(0, viewTokens * this.shape.width), dims);
      this.#past = { viewTokens, tensors: this.#buffers.map(view) };
    }
    return this.#past.tensors;
  }

  /**
   * For the graph of one sequence: feeds `past_k_i`, `past_v_i`, and binds `new_k_i`, `new_v_i` to the next `tokens` rows.
   * `writes(layer)` is false where the mask elides K and V: those outputs are empty.
   */
  bind(feeds: Feeds, fetches: Fetches, tokens: number, writes: (layer: number) => boolean): void {
    this.past(tokens).forEach((past, buffer) => {
      const layer = buffer >> 1;
      const name = `${buffer % 2 === 0 ? 'k' : 'v'}_${layer}`;
      feeds[`past_${name}`] = past;
      fetches[`new_${name}`] = this.newRows(buffer, writes(layer) ? tokens : 0);
    });
  }

  /** The next `rows` rows of one buffer: an output that is bound to it is written in place. */
  newRows(buffer: number, rows: number): RuntimeTensor {
    const { width } = this.shape;
    const start = this.length * width;
    const data = this.#buffers[buffer]!.subarray(start, start + rows * width);
    return tensor('f32', data, [1, rows, width]);
  }

  /** Writes the next `rows` rows of one buffer, from `values` on at float `from`; returns how many floats. */
  write(buffer: number, values: Float32Array, from: number, rows: number): number {
    const floats = rows * this.shape.width;
    this.#buffers[buffer]!.set(values.subarray(from, from + floats), this.length * this.shape.width);
    return floats;
  }

  /** After a run: its tokens are in the cache. */
  advance(tokens: number): void {
    this.length += tokens;
  }

  /** Puts `tokens` tokens behind those that it holds; `page` is what `copyPage` gave. Room for them has to be there. */
  appendPage(page: Float32Array, tokens: number): void {
    const floats = tokens * this.shape.width;
    if (this.length + tokens > this.#capacity_tokens)
      throw new RangeError(`${this.length + tokens} tokens in a cache for ${this.#capacity_tokens}`);
    this.#buffers.forEach((buffer, i) => {
      buffer.set(page.subarray(i * floats, (i + 1) * floats), this.length * this.shape.width);
    });
    this.length += tokens;
  }

  /** K and V of `tokens` tokens from token `from` on, buffer after buffer; into `page` where there is one of that size. */
  copyPage(from: number, tokens: number, page?: Float32Array): Float32Array {
    const floats = tokens * this.shape.width;
    if (from + tokens > this.length) throw new RangeError(`tokens to ${from + tokens} of ${this.length}`);
    const copy = page ?? new Float32Array(this.#buffers.length * floats);
    const start = from * this.shape.width;
    this.#buffers.forEach((buffer, i) => {
      copy.set(buffer.subarray(start, start + floats), i * floats);
    });
    return copy;
  }

  /** Forgets all but the first `tokens`: for a slot that is used again. */
  truncate(tokens: number): void {
    this.length = Math.min(this.length, tokens);
  }
}
