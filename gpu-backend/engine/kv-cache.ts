/**
 * The KV cache of one sequence. It is kept in one of two forms: as rows of all heads, and head by head.
 *
 * Head by head, beside those of other sequences (`head-caches.ts`), is what runs compute with. Rows are what is taken over from another
 * prompt before the first run, and what has to leave its place. What one form lacks is copied when the sequence comes there: 2 ms
 * for 100 tokens of the default model.
 * Halves stay rows. They are written through: the graph's new K and V are bound in place into these buffers, and the same
 * buffers, viewed up to the live length, are fed back as the past. Nothing is copied a piece; a buffer that is full is copied once into
 * one of twice the size.
 *
 * This rests on two properties of the runtime: a preallocated output is written in place, and an input is
 * read in place. `test/gpu-backend/engine/kv-cache.test.ts` compares it with a cache that copies, and is
 * what will tell when a new ONNX Runtime changes either.
 */

import type { KvType } from '../model/model-source.ts';
import type { RuntimeTensor } from '../onnx/session.ts';
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

export const newValues = (kvType: KvType, count: number): KvValues => new KV_ARRAYS[kvType](count);

/** The first of `from`, 2·`from`, 4·`from` … that is no less than `needed`: how all caches grow. */
export function doubled(from: number, needed: number): number {
  let value = from;
  while (value < needed) value *= 2;
  return value;
}

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
  'length' | 'capacity_tokens' | 'reserve' | 'truncate' | 'fill' | 'appendPage' | 'copyPage'
>;

/** Keys and values head by head (`head-caches.ts`), as a cache uses them: rows `[count, width]` go in and out. */
export type Heads = {
  write(place: number, buffer: number, rows: KvValues, at: number, count: number): void;
  read(place: number, buffer: number, rows: KvValues, at: number, count: number): void;
  free(place: number): void;
  /** Memory for rows that another cache is done with: of prompts, which are computed after one another. */
  takeRows(): KvValues[] | undefined;
  giveRows(rows: KvValues[]): void;
};

const INITIAL_TOKENS = 256;
/** Attention costs in proportion to the view, so it stays near the live length. */
const VIEW_STEP_TOKENS = 16;

export class KvCache {
  readonly shape: CacheShape;
  readonly #heads: Heads | undefined;
  /** Tokens whose K and V are written. */
  #length = 0;
  /** Tokens that are known to come, those that are there counted. */
  wanted_tokens = 0;
  /** Its place among {@link Heads}; while it has one, K and V are there. */
  #place: number | undefined;
  #capacity_tokens = 0;
  /** Rows: K of layer i at 2i, V at 2i + 1; each `[capacity, width]`. */
  #buffers: KvValues[];
  #past: { readonly viewTokens: number; readonly tensors: readonly RuntimeTensor[] } | undefined;

  /** Takes no memory before the first `reserve`. `heads`: where tokens of answers go, if anywhere. */
  constructor(shape: CacheShape, heads?: Heads) {
    this.shape = shape;
    this.#heads = heads;
    this.#buffers = this.#noRows();
  }

  get length(): number {
    return this.#length;
  }

  /** Forgets what is behind. */
  set length(tokens: number) {
    if (tokens > this.#length) throw new RangeError(`${tokens} tokens of ${this.#length}`);
    this.#length = tokens;
  }

  /** Room that it has as rows. */
  get capacity_tokens(): number {
    return this.#capacity_tokens;
  }

  get place(): number | undefined {
    return this.#place;
  }

  /** Of `HeadCaches`: from now on K and V are in `place`. */
  enterHeads(place: number): void {
    if (this.#place !== undefined) return;
    for (const [buffer, rows] of this.#buffers.entries())
      this.#heads!.write(place, buffer, rows, 0, this.#length);
    this.#place = place;
    if (this.#capacity_tokens > 0) this.#heads!.giveRows(this.#buffers);
    this.#useRows(this.#noRows());
  }

  /** From now on they are rows. */
  leaveHeads(): void {
    const place = this.#place;
    if (place === undefined) return;
    this.#grow(this.#length);
    for (const [buffer, rows] of this.#buffers.entries())
      this.#heads!.read(place, buffer, rows, 0, this.#length);
    this.#giveUpPlace();
  }

  #giveUpPlace(): void {
    if (this.#place !== undefined) this.#heads!.free(this.#place);
    this.#place = undefined;
  }

  #noRows(): KvValues[] {
    return Array.from({ length: 2 * this.shape.layerCount }, () => this.#newValues(0));
  }

  #newValues(count: number): KvValues {
    return newValues(this.shape.kvType ?? 'f32', count);
  }

  /**
   * Makes room for `tokens` more; asked for what is known to come, it copies nothing later. Among heads, room comes with a place.
   * @throws RangeError past the model's context.
   */
  reserve(tokens: number): void {
    if (this.#heads === undefined) this.reserveRows(tokens);
    else this.expect(tokens);
  }

  /** The same as rows, which it becomes if it is not. */
  reserveRows(tokens: number): void {
    this.expect(tokens);
    this.leaveHeads();
    this.#grow(this.#length + tokens);
  }

  /** `tokens` more will come. @throws RangeError past the model's context. */
  expect(tokens: number): void {
    const needed = this.#length + tokens;
    const { contextTokens } = this.shape;
    if (needed > contextTokens)
      throw new RangeError(`${needed} tokens do not fit a context of ${contextTokens}`);
    this.wanted_tokens = Math.max(this.wanted_tokens, needed);
  }

  #grow(needed: number): void {
    if (needed <= this.#capacity_tokens) return;
    const { contextTokens, width } = this.shape;
    const known = this.#capacity_tokens === 0 ? this.#heads?.takeRows() : undefined;
    if (known !== undefined) this.#useRows(known);
    if (needed <= this.#capacity_tokens) return;
    const capacity = doubled(Math.max(this.#capacity_tokens, INITIAL_TOKENS), needed);
    const values = Math.min(capacity, contextTokens) * width;
    this.#useRows(
      this.#buffers.map((old) => {
        const grown = this.#newValues(values);
        grown.set(old.subarray(0, this.#length * width));
        return grown;
      }),
    );
  }

  #useRows(buffers: KvValues[]): void {
    this.#buffers = buffers;
    this.#capacity_tokens = buffers[0]!.length / this.shape.width;
    this.#past = undefined;
  }

  /** K of layer i at 2i, V at 2i + 1, `[1, T, width]` each, T ≥ length + tokens: to be fed. Call `reserveRows` first. */
  past(tokens: number): readonly RuntimeTensor[] {
    const live = Math.ceil((this.#length + tokens) / VIEW_STEP_TOKENS) * VIEW_STEP_TOKENS;
    const viewTokens = Math.min(live, this.#capacity_tokens);
    if (this.#past?.viewTokens !== viewTokens) {
      const dims = [1, viewTokens, this.shape.width];
      const view = (buffer: KvValues) => kvTensor(buffer.subarray(0, viewTokens * this.shape.width), dims);
      this.#past = { viewTokens, tensors: this.#buffers.map(view) };
    }
    return this.#past.tensors;
  }

  /** The next `rows` rows of one buffer: an output that is bound to it is written in place. */
  newRows(buffer: number, rows: number): RuntimeTensor {
    const { width } = this.shape;
    const start = this.#length * width;
    const data = this.#buffers[buffer]!.subarray(start, start + rows * width);
    return kvTensor(data, [1, rows, width]);
  }

  /** Writes the next `rows` rows of one buffer, those of `values` from the `from`th on; returns how many values. */
  write(buffer: number, values: KvValues, from: number, rows: number): number {
    const { width } = this.shape;
    const count = rows * width;
    const written = values.subarray(from, from + count);
    if (this.#place === undefined) this.#buffers[buffer]!.set(written, this.#length * width);
    else this.#heads!.write(this.#place, buffer, written, this.#length, rows);
    return count;
  }

  /** After a run: its tokens are in the cache. */
  advance(tokens: number): void {
    this.#length += tokens;
  }

  /** As if so many tokens were there: some numbers are, in memory that costs what real ones cost. */
  fill(tokens: number): void {
    this.reserveRows(Math.max(0, tokens - this.#length));
    const { width } = this.shape;
    for (const buffer of this.#buffers) buffer.fill(1, this.#length * width, tokens * width);
    this.#length = tokens;
  }

  /** Puts `tokens` tokens behind those that it holds, as rows; `page` is what `copyPage` gave. */
  appendPage(page: KvValues, tokens: number): void {
    const count = tokens * this.shape.width;
    this.reserveRows(tokens);
    this.#buffers.forEach((buffer, i) => {
      buffer.set(page.subarray(i * count, (i + 1) * count), this.#length * this.shape.width);
    });
    this.#length += tokens;
  }

  /** K and V of `tokens` tokens from token `from` on, buffer after buffer; into `page` where there is one of that size. */
  copyPage(from: number, tokens: number, page?: KvValues): KvValues {
    const { width } = this.shape;
    const count = tokens * width;
    if (from + tokens > this.#length) throw new RangeError(`tokens to ${from + tokens} of ${this.#length}`);
    const copy = page ?? this.#newValues(this.#buffers.length * count);
    this.#buffers.forEach((buffer, i) => {
      if (this.#place === undefined)
        copy.set(buffer.subarray(from * width, (from + tokens) * width), i * count);
      else this.#heads!.read(this.#place, i, copy.subarray(i * count, (i + 1) * count), from, tokens);
    });
    return copy;
  }

  /** Forgets all but the first `tokens`. An empty one has no place, and can be used again. */
  truncate(tokens: number): void {
    this.length = Math.min(this.#length, tokens);
    if (this.#length > 0) return;
    this.wanted_tokens = 0;
    this.#giveUpPlace();
  }
}
