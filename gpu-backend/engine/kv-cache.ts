/**
 * The KV cache of one sequence. K and V have one of two layouts: rows of all heads, or head by head.
 *
 * fp32 runs compute head by head, in buffers that all sequences share (`head-caches.ts`). Rows are the layout of pages from
 * the prefix cache, before the first run, and of a sequence that had to give up its place. A change of layout copies K and
 * V: 2 ms for 100 tokens of the default model.
 * fp16 uses rows only, without copies: the graph's new K and V are bound in place into these buffers, and views of the same
 * buffers are fed back as the past. A full buffer is copied once into one of twice the size.
 *
 * This depends on two properties of the runtime: a preallocated output is written in place, and an input is read in place.
 * `test/gpu-backend/engine/kv-cache.test.ts` compares with a cache that copies, and fails if a new ONNX Runtime changes
 * either.
 */

import type { KvType } from '../model/model-source.ts';
import type { RuntimeTensor } from '../onnx/session.ts';
import { tensor } from '../onnx/session.ts';

/** `width` = KV heads · head size: values of K, or of V, for one token in one layer. */
export type CacheShape = {
  readonly layerCount: number;
  readonly width: number;
  readonly contextTokens: number;
  readonly kvType: KvType;
};

export type KvValues = Float32Array | Float16Array;
const KV_ARRAYS = { f32: Float32Array, f16: Float16Array } as const;

export const newValues = (kvType: KvType, count: number): KvValues => new KV_ARRAYS[kvType](count);

/**
 * `count` zeros of a buffer that has room to grow: its memory becomes resident where it is written, in small pages. Such memory has a
 * resizable buffer, since that of all others may be in large pages, which are resident as a whole (`large-pages.js`).
 * Loops over its values are three times as slow as over others', so they are copied with `set`.
 */
export function roomFor<T extends KvType>(kvType: T, count: number): InstanceType<(typeof KV_ARRAYS)[T]> {
  const Values = KV_ARRAYS[kvType];
  const bytes = count * Values.BYTES_PER_ELEMENT;
  const buffer = new ArrayBuffer(bytes, { maxByteLength: bytes });
  return new Values(buffer, 0, count) as InstanceType<(typeof KV_ARRAYS)[T]>;
}

/** The first of `from`, 2·`from`, 4·`from` … that is at least `needed`; all caches grow this way. */
export function doubled(from: number, needed: number): number {
  let value = from;
  while (value < needed) value *= 2;
  return value;
}

/** Bytes of K and V of one token, all layers. */
export const tokenBytes = ({ layerCount, width, kvType }: Omit<CacheShape, 'contextTokens'>): number =>
  2 * layerCount * width * KV_ARRAYS[kvType].BYTES_PER_ELEMENT;

/** A tensor over `data` itself, without a copy. */
export const kvTensor = (data: KvValues, dims: readonly number[]): RuntimeTensor =>
  data instanceof Float32Array ? tensor('f32', data, dims) : tensor('f16', data, dims);

/** A cache as the engine uses it, in this process's memory or on a GPU. */
export type SequenceCache = Pick<
  KvCache,
  'length' | 'capacity_tokens' | 'reserve' | 'truncate' | 'fill' | 'appendPage' | 'copyPage'
>;

/** The head caches (`head-caches.ts`) as one sequence's cache uses them; rows are `[count, width]`. */
export type Heads = {
  write(place: number, buffer: number, rows: KvValues, at: number, count: number): void;
  read(place: number, buffer: number, rows: KvValues, at: number, count: number): void;
  free(place: number): void;
  /** Row buffers that another cache no longer needs; prompts are computed one after the other. */
  takeRows(): KvValues[] | undefined;
  giveRows(rows: KvValues[]): void;
};

const INITIAL_TOKENS = 256;
/** Views are rounded up to this: attention's cost grows with the view, so it stays close to the length. */
const VIEW_STEP_TOKENS = 16;

export class KvCache {
  readonly shape: CacheShape;
  readonly #heads: Heads | undefined;
  /** Tokens whose K and V are written. */
  #length = 0;
  /** The length that the cache is expected to reach. */
  wanted_tokens = 0;
  /** Its place in {@link Heads}; while it has one, K and V are there. */
  #place: number | undefined;
  #capacity_tokens = 0;
  /** Rows: K of layer i at 2i, V at 2i + 1; each `[capacity, width]`. */
  #buffers: KvValues[];
  #past: { readonly viewTokens: number; readonly tensors: readonly RuntimeTensor[] } | undefined;

  /** Allocates nothing before the first `reserve`. Without `heads` K and V stay rows. */
  constructor(shape: CacheShape, heads?: Heads) {
    this.shape = shape;
    this.#heads = heads;
    this.#buffers = this.#noRows();
  }

  get length(): number {
    return this.#length;
  }

  /** Drops all tokens after the first `tokens`. @throws RangeError when it would grow. */
  set length(tokens: number) {
    if (tokens > this.#length) throw new RangeError(`${tokens} tokens of ${this.#length}`);
    this.#length = tokens;
  }

  /** Allocated row capacity. */
  get capacity_tokens(): number {
    return this.#capacity_tokens;
  }

  get place(): number | undefined {
    return this.#place;
  }

  /** Moves K and V to `place` of the head caches; called by `HeadCaches`. */
  enterHeads(place: number): void {
    if (this.#place !== undefined) return;
    for (const [buffer, rows] of this.#buffers.entries())
      this.#heads!.write(place, buffer, rows, 0, this.#length);
    this.#place = place;
    if (this.#capacity_tokens > 0) this.#heads!.giveRows(this.#buffers);
    this.#useRows(this.#noRows());
  }

  /** Moves K and V back to rows and frees the place. */
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
    return newValues(this.shape.kvType, count);
  }

  /**
   * Makes room for `tokens` more; reserving all expected tokens at once avoids copies later. In the head caches the room
   * comes with the place. @throws RangeError beyond the model's context.
   */
  reserve(tokens: number): void {
    if (this.#heads === undefined) this.reserveRows(tokens);
    else this.expect(tokens);
  }

  /** Makes room for `tokens` more rows, after a change to rows if necessary. @throws as `reserve`. */
  reserveRows(tokens: number): void {
    this.expect(tokens);
    this.leaveHeads();
    this.#grow(this.#length + tokens);
  }

  /** Notes that `tokens` more will come. @throws RangeError beyond the model's context. */
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
        const grown = roomFor(this.shape.kvType, values);
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

  /** Feeds: K of layer i at 2i, V at 2i + 1, `[1, T, width]` each, T ≥ length + tokens. Call `reserveRows` first. */
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

  /** The next `rows` rows of one buffer, as an output that the runtime writes in place. */
  newRows(buffer: number, rows: number): RuntimeTensor {
    const { width } = this.shape;
    const start = this.#length * width;
    const data = this.#buffers[buffer]!.subarray(start, start + rows * width);
    return kvTensor(data, [1, rows, width]);
  }

  /** Writes the next `rows` rows of one buffer from `values`, starting at value `from`. @returns number of values written. */
  write(buffer: number, values: KvValues, from: number, rows: number): number {
    const { width } = this.shape;
    const count = rows * width;
    const written = values.subarray(from, from + count);
    if (this.#place === undefined) this.#buffers[buffer]!.set(written, this.#length * width);
    else this.#heads!.write(this.#place, buffer, written, this.#length, rows);
    return count;
  }

  /** Call it after a run that wrote `tokens` tokens. */
  advance(tokens: number): void {
    this.#length += tokens;
  }

  /** Sets the length to `tokens` with dummy values, for measurements; the memory is written, as with real values. */
  fill(tokens: number): void {
    this.reserveRows(Math.max(0, tokens - this.#length));
    const { width } = this.shape;
    for (const buffer of this.#buffers) buffer.fill(1, this.#length * width, tokens * width);
    this.#length = tokens;
  }

  /** Appends a page of `tokens` tokens from `copyPage`, as rows. */
  appendPage(page: KvValues, tokens: number): void {
    const count = tokens * this.shape.width;
    this.reserveRows(tokens);
    this.#buffers.forEach((buffer, i) => {
      buffer.set(page.subarray(i * count, (i + 1) * count), this.#length * this.shape.width);
    });
    this.#length += tokens;
  }

  /** Copies K and V of `tokens` tokens from token `from` on, buffer after buffer; into `page` if given. @throws RangeError. */
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

  /** Drops all but the first `tokens`. An empty cache gives up its place and can be reused. */
  truncate(tokens: number): void {
    this.length = Math.min(this.#length, tokens);
    if (this.#length > 0) return;
    this.wanted_tokens = 0;
    this.#giveUpPlace();
  }
}
