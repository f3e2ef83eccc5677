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
  readonly #pastNames: readonly string[];
  readonly #newNames: readonly string[];

  /** Takes no memory before the first `reserve`. */
  constructor(shape: CacheShape) {
    this.shape = shape;
    const names = (prefix: string) =>
      Array.from(
        { length: 2 * shape.layerCount },
        (_, i) => `${prefix}_${i % 2 === 0 ? 'k' : 'v'}_${i >> 1}`,
      );
    this.#pastNames = names('past');
    this.#newNames = names('new');
    this.#buffers = this.#pastNames.map(() => new Float32Array(0));
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

  /** Feeds `past_k_i`, `past_v_i`: `[1, T, width]`, T ≥ length + tokens. Call `reserve` first. */
  addPast(feeds: Feeds, tokens: number): void {
    const live = Math.ceil((this.length + tokens) / VIEW_STEP_TOKENS) * VIEW_STEP_TOKENS;
    const viewTokens = Math.min(live, this.#capacity_tokens);
    if (this.#past?.viewTokens !== viewTokens) {
      const dims = [1, viewTokens, this.shape.width];
      const view = (buffer: Float32Array) =>
        tensor('f32', buffer.subarray(0, viewTokens * this.shape.width), dims);
      this.#past = { viewTokens, tensors: this.#buffers.map(view) };
    }
    this.#past.tensors.forEach((past, i) => {
      feeds[this.#pastNames[i]!] = past;
    });
  }

  /**
   * Binds `new_k_i`, `new_v_i` to the next `tokens` rows. `writes(layer)` is false where the mask elides K and
   * V: those outputs are empty.
   */
  addNew(fetches: Fetches, tokens: number, writes: (layer: number) => boolean): void {
    const { width } = this.shape;
    const start = this.length * width;
    this.#buffers.forEach((buffer, i) => {
      const rows = writes(i >> 1) ? tokens : 0;
      fetches[this.#newNames[i]!] = tensor('f32', buffer.subarray(start, start + rows * width), [
        1,
        rows,
        width,
      ]);
    });
  }

  /** After a run: its tokens are in the cache. */
  advance(tokens: number): void {
    this.length += tokens;
  }

  /** Holds the first `tokens` of `from`, and nothing else; room for them has to be there. */
  copyFrom(from: KvCache, tokens: number): void {
    const { width } = this.shape;
    if (tokens > from.length || tokens > this.#capacity_tokens)
      throw new RangeError(
        `${tokens} tokens of a cache with ${from.length} into one for ${this.#capacity_tokens}`,
      );
    this.#buffers.forEach((buffer, i) => {
      buffer.set(from.#buffers[i]!.subarray(0, tokens * width));
    });
    this.length = tokens;
  }

  /** Forgets all but the first `tokens`: for a slot that is used again. */
  truncate(tokens: number): void {
    this.length = Math.min(this.length, tokens);
  }
}
