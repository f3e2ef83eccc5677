/**
 * The KV cache of one sequence, written through: the graph's new K and V are bound in place into these
 * buffers, and the same buffers, viewed up to the live length, are fed back as the past. Nothing is copied a
 * token; a buffer that is full is copied once into one of twice the size.
 *
 * This rests on two properties of the runtime: a preallocated output is written in place, and an input is
 * read in place. `test/gpu-backend/engine/kv-cache.test.ts` compares it with a cache that copies, and is
 * what will tell when a new ONNX Runtime changes either.
 */

import type { KvType } from '../model/model-source.ts';
import type { Feeds, Fetches, RuntimeTensor } from '../onnx/session.ts';
import { tensor } from '../onnx/session.ts';

/** `width` = KV heads · head width, values a token and layer. */
export type CacheShape = {
  readonly layerCount: number;
  readonly width: number;
  readonly contextTokens: number;
  /** How values are kept; fp32 unless given. */
  readonly kvType?: KvType;
};

export type KvValues = Float32Array | Float16Array;
const KV_ARRAYS = { f32: Float32Array, f16: Float16Array } as const;

/** What K and V of one token take in all layers. */
export const tokenBytes = ({
  layerCount,
  width,
  kvType = 'f32',
}: Omit<CacheShape, 'contextTokens'>): number => 2 * layerCount * width * KV_ARRAYS[kvType].BYTES_PER_ELEMENT;

/** Values over `data` itself as the graph takes them. */
export const kvTensor = (data: KvValues, dims: readonly number[]): RuntimeTensor =>
  data instanceof Float32Array ? tensor('f32', data, dims) : tensor('f16', data, dims);

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
  #buffers: KvValues[];
  #past: { readonly viewTokens: number; readonly tensors: readonly RuntimeTensor[] } | undefined;

  /** Takes no memory before the first `reserve`. */
  constructor(shape: CacheShape) {
    this.shape = shape;
    this.#buffers = Array.from({ length: 2 * shape.layerCount }, () => this.newValues(0));
  }

  get capacity_tokens(): number {
    return this.#capacity_tokens;
  }

  /** Memory for so many values, as this cache keeps them. */
  newValues(count: number): KvValues {
    return new KV_ARRAYS[this.shape.kvType ?? 'f32'](count);
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
      const grown = this.newValues(this.#capacity_tokens * width);
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
      const view = (buffer: KvValues) => kvTensor(buffer.subarray(0, viewTokens * this.shape.width), dims);
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
    return kvTensor(data, [1, rows, width]);
  }

  /** Writes the next `rows` rows of one buffer, those of `values` from the `from`th on; returns how many values. */
  write(buffer: number, values: KvValues, from: number, rows: number): number {
    const count = rows * this.shape.width;
    this.#buffers[buffer]!.set(values.subarray(from, from + count), this.length * this.shape.width);
    return count;
  }

  /** After a run: its tokens are in the cache. */
  advance(tokens: number): void {
    this.length += tokens;
  }

  /** Puts `tokens` tokens behind those that it holds; `page` is what `copyPage` gave. Room for them has to be there. */
  appendPage(page: KvValues, tokens: number): void {
    const count = tokens * this.shape.width;
    if (this.length + tokens > this.#capacity_tokens)
      throw new RangeError(`${this.length + tokens} tokens in a cache for ${this.#capacity_tokens}`);
    this.#buffers.forEach((buffer, i) => {
      buffer.set(page.subarray(i * count, (i + 1) * count), this.length * this.shape.width);
    });
    this.length += tokens;
  }

  /** K and V of `tokens` tokens from token `from` on, buffer after buffer; into `page` where there is one of that size. */
  copyPage(from: number, tokens: number, page?: KvValues): KvValues {
    const count = tokens * this.shape.width;
    if (from + tokens > this.length) throw new RangeError(`tokens to ${from + tokens} of ${this.length}`);
    const copy = page ?? this.newValues(this.#buffers.length * count);
    const start = from * this.shape.width;
    this.#buffers.forEach((buffer, i) => {
      copy.set(buffer.subarray(start, start + count), i * count);
    });
    return copy;
  }

  /** Forgets all but the first `tokens`: for a slot that is used again. */
  truncate(tokens: number): void {
    this.length = Math.min(this.length, tokens);
  }
}
