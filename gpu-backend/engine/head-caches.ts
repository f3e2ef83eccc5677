/**
 * K and V of running sequences, head by head: all sequences share one buffer a layer for K and one for V, `[P, G, T, D]`
 * (P = places, G = KV heads, T = token capacity, D = padded head size), which attention nodes read and append to
 * (`model/architectures/head-attention.ts`). A sequence gets a place with its first run (`kv-cache.ts`) and keeps it until
 * its cache is emptied, garbage-collected, or needed as rows again.
 *
 * Buffers grow by doubling, with one copy, and shrink when most of them is unused.
 */
import { BATCH_PLACES } from '../model/architectures/batched-attention.ts';
import { headRoom } from '../model/architectures/head-attention.ts';
import type { RuntimeTensor } from '../onnx/session.ts';
import { tensor } from '../onnx/session.ts';
import { type CacheShape, doubled, type Heads, type KvCache, type KvValues, roomFor } from './kv-cache.ts';

type HeadShape = Pick<CacheShape, 'layerCount' | 'contextTokens'> & {
  readonly kvHeadCount: number;
  readonly headSize: number;
};

const INITIAL_TOKENS = 256;
/** Buffers shrink when they are this many times too large; not earlier, since new memory is slow. */
const TOO_LARGE = 8;
/** Unused capacity of each place up to this is kept. */
const KEPT_TOKENS_MAX = 1024;
/** Resident tokens of ended sequences up to this are kept for the next ones. */
const LEFT_TOKENS_MAX = BATCH_PLACES * KEPT_TOKENS_MAX;
/** Free row buffers that are kept: rarely are more prompts computed at once. */
const KEPT_ROWS = 2;

export class HeadCaches implements Heads {
  readonly shape: HeadShape;
  /** D. */
  readonly #width: number;
  /** K of layer i at 2i, V at 2i + 1. */
  #buffers: Float32Array[] = [];
  #places = 0;
  #tokens = 0;
  /** How far each place was written since its allocation: only written memory is resident. */
  #written_tokens: number[] = [];
  /** The cache in each place, the longest unused first. A garbage-collected cache frees its place. */
  readonly #owners = new Map<number, WeakRef<KvCache>>();
  /** Free row buffers. */
  readonly #rows: KvValues[][] = [];
  /** Tensors over ranges of places, cached. */
  readonly #views = new Map<string, readonly RuntimeTensor[]>();

  constructor(shape: HeadShape) {
    this.shape = shape;
    this.#width = headRoom(shape);
  }

  /** Values of one buffer. */
  get buffer_values(): number {
    return this.#buffers[0]?.length ?? 0;
  }

  /** Tokens whose memory is resident. */
  get resident_tokens(): number {
    return this.#written_tokens.reduce((sum, tokens) => sum + tokens, 0);
  }

  /**
   * Gives each of `caches`, at most `BATCH_PLACES`, a place with room for the tokens that it expects, and moves its K and V
   * there. If there is no free place, other caches move back to rows.
   */
  place(caches: readonly KvCache[]): void {
    const here = new Set(caches);
    const others = this.#others(here);
    for (const cache of others.splice(0, others.length + here.size - BATCH_PLACES)) cache.leaveHeads();
    const all = [...caches, ...others];
    const needed = Math.max(...all.map(({ length, wanted_tokens }) => Math.max(length + 1, wanted_tokens)));
    this.#fit(all.length, needed);
    const live_tokens = all.reduce((sum, { place, length }) => sum + (place === undefined ? 0 : length), 0);
    if (this.resident_tokens - live_tokens > LEFT_TOKENS_MAX) this.#resize(this.#places, this.#tokens);
    for (const cache of caches) {
      const place = cache.place ?? this.#freePlace();
      this.#owners.delete(place);
      this.#owners.set(place, new WeakRef(cache));
      cache.enterHeads(place);
      this.#written_tokens[place] = Math.max(this.#written_tokens[place] ?? 0, cache.length + 1);
    }
  }

  /** Frees a place; after the last one, large buffers are released. */
  free(place: number): void {
    this.#owners.delete(place);
    if (this.#owners.size === 0 && this.#tokens > KEPT_TOKENS_MAX) this.#resize(0, 0);
  }

  takeRows(): KvValues[] | undefined {
    return this.#rows.pop();
  }

  giveRows(rows: KvValues[]): void {
    const { kvHeadCount, headSize } = this.shape;
    const isSmall = rows[0]!.length <= KEPT_TOKENS_MAX * kvHeadCount * headSize;
    if (isSmall && this.#rows.length < KEPT_ROWS) this.#rows.push(rows);
  }

  /** Places `from` to `to` of all buffers, `[to - from, G, T, D]` each: both feeds and, in place, fetches. */
  view(from: number, to: number): readonly RuntimeTensor[] {
    const known = this.#views.get(`${from} ${to}`);
    if (known !== undefined) return known;
    const { kvHeadCount } = this.shape;
    const values = kvHeadCount * this.#tokens * this.#width;
    const made = this.#buffers.map((buffer) =>
      tensor('f32', buffer.subarray(from * values, to * values), [
        to - from,
        kvHeadCount,
        this.#tokens,
        this.#width,
      ]),
    );
    this.#views.set(`${from} ${to}`, made);
    return made;
  }

  /** The buffers of a sequence that has a place, `[1, G, T, D]` each. */
  viewOf({ place }: KvCache): readonly RuntimeTensor[] {
    return this.view(place!, place! + 1);
  }

  /** A placeholder feed and fetch for runs without single tokens. */
  nothing(): RuntimeTensor {
    const { kvHeadCount } = this.shape;
    return tensor('f32', new Float32Array(kvHeadCount * this.#width), [1, kvHeadCount, 1, this.#width]);
  }

  /** Copies `count` rows `[G · head size]` into one buffer, to the tokens of a place from `at` on. */
  write(place: number, buffer: number, rows: KvValues, at: number, count: number): void {
    this.#copy(place, buffer, rows, at, count, 'in');
  }

  /** The reverse of `write`. */
  read(place: number, buffer: number, rows: KvValues, at: number, count: number): void {
    this.#copy(place, buffer, rows, at, count, 'out');
  }

  #copy(place: number, buffer: number, rows: KvValues, at: number, count: number, way: 'in' | 'out'): void {
    const { kvHeadCount, headSize } = this.shape;
    const heads = this.#buffers[buffer]!;
    for (let g = 0; g < kvHeadCount; g++) {
      let head = ((place * kvHeadCount + g) * this.#tokens + at) * this.#width;
      for (let token = 0; token < count; token++) {
        const row = (token * kvHeadCount + g) * headSize;
        if (way === 'in') heads.set(rows.subarray(row, row + headSize), head);
        else rows.set(heads.subarray(head, head + headSize), row);
        head += this.#width;
      }
    }
  }

  /**
   * A run over neighbouring places writes into each of them: in a place without input it overwrites the first token. Saves
   * the first tokens of `places`. @returns a function that restores them.
   */
  keepFirst(places: readonly number[]): () => void {
    const { kvHeadCount, headSize } = this.shape;
    const kept = places
      .filter((place) => this.#owners.get(place)?.deref() !== undefined)
      .map((place) => ({
        place,
        rows: this.#buffers.map((_, buffer) => {
          const row = new Float32Array(kvHeadCount * headSize);
          this.read(place, buffer, row, 0, 1);
          return row;
        }),
      }));
    return () => {
      for (const { place, rows } of kept) {
        for (const [buffer, row] of rows.entries()) this.write(place, buffer, row, 0, 1);
      }
    };
  }

  #others(here: ReadonlySet<KvCache>): KvCache[] {
    const others: KvCache[] = [];
    for (const [place, owner] of this.#owners) {
      const cache = owner.deref();
      if (cache === undefined) this.#owners.delete(place);
      else if (!here.has(cache)) others.push(cache);
    }
    return others;
  }

  /** The lowest free place, so that the sequences of a run are neighbours. */
  #freePlace(): number {
    for (let place = 0; ; place++) if (!this.#owners.has(place)) return place;
  }

  #fit(count: number, needed: number): void {
    const highest = Math.max(-1, ...this.#owners.keys());
    const places = doubled(1, Math.max(count, highest + 1));
    const isTooLong = this.#tokens >= TOO_LARGE * Math.max(needed, INITIAL_TOKENS);
    const room = doubled(isTooLong || this.#tokens === 0 ? INITIAL_TOKENS : this.#tokens, needed);
    const tokens = Math.min(room, this.shape.contextTokens);
    // Small buffers keep their places: after eight sequences and then one there may be eight again.
    const isTooMany = this.#tokens > KEPT_TOKENS_MAX && this.#places >= TOO_LARGE * places;
    if (tokens === this.#tokens && places <= this.#places && !isTooMany) return;
    this.#resize(tokens === this.#tokens && !isTooMany ? Math.max(places, this.#places) : places, tokens);
  }

  #resize(places: number, tokens: number): void {
    const { layerCount, kvHeadCount } = this.shape;
    const width = this.#width;
    const old = this.#buffers;
    const lengths = [...this.#owners].map(([place, owner]) => ({
      place,
      length: owner.deref()?.length ?? 0,
    }));
    this.#buffers = Array.from({ length: 2 * layerCount }, (_, buffer) => {
      const made = roomFor('f32', places * kvHeadCount * tokens * width);
      for (const { place, length } of lengths) {
        for (let head = place * kvHeadCount; head < (place + 1) * kvHeadCount; head++) {
          const from = head * this.#tokens * width;
          made.set(old[buffer]!.subarray(from, from + length * width), head * tokens * width);
        }
      }
      return made;
    });
    this.#places = places;
    this.#tokens = tokens;
    this.#written_tokens = [];
    for (const { place, length } of lengths) this.#written_tokens[place] = length;
    this.#views.clear();
  }
}
