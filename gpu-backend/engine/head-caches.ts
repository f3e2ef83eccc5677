/**
 * Keys and values of those that run, head by head: all sequences share one buffer a layer for K and one for V,
 * `[P, G, T, D]` (P = places, G = KV heads, T = room for tokens, D = a head's width there), which attention nodes read and append
 * to (`model/architectures/head-attention.ts`). A sequence comes here with its first run (`kv-cache.ts`) and has a place until its
 * cache is emptied, forgotten, or needed as rows again.
 *
 * Buffers grow by doubling, with one copy, and shrink again: what nobody needs any more does not stay.
 */
import { BATCH_PLACES } from '../model/architectures/batched-attention.ts';
import { headRoom } from '../model/architectures/head-attention.ts';
import type { RuntimeTensor } from '../onnx/session.ts';
import { tensor } from '../onnx/session.ts';
import { type CacheShape, doubled, type Heads, type KvCache, type KvValues } from './kv-cache.ts';

export type HeadShape = Pick<CacheShape, 'layerCount' | 'contextTokens'> & {
  readonly kvHeadCount: number;
  readonly headSize: number;
};

const INITIAL_TOKENS = 256;
/** Buffers that are so many times too large are made anew: seldom, since memory that is new is slow. */
const TOO_LARGE = 8;
/** Room for so many tokens in each place is kept while nobody uses it. */
const KEPT_TOKENS_MAX = 1024;
/** Tokens of those that are gone, whose memory stays for the next in their places. */
const LEFT_TOKENS_MAX = BATCH_PLACES * KEPT_TOKENS_MAX;
/** Prompts that are computed at a time, mostly. */
const KEPT_ROWS = 2;

export class HeadCaches implements Heads {
  readonly shape: HeadShape;
  /** D. */
  readonly #width: number;
  /** K of layer i at 2i, V at 2i + 1. */
  #buffers: Float32Array[] = [];
  #places = 0;
  #tokens = 0;
  /** How far each place was written since its memory is there: only that costs any. */
  #written_tokens: number[] = [];
  /** Who has each place, those that ran longest ago first. What nobody refers to any more gives its place back. */
  readonly #owners = new Map<number, WeakRef<KvCache>>();
  /** Memory for rows that is free. */
  readonly #rows: KvValues[][] = [];
  /** Tensors over some neighbouring places. */
  readonly #views = new Map<string, readonly RuntimeTensor[]>();

  constructor(shape: HeadShape) {
    this.shape = shape;
    this.#width = headRoom(shape);
  }

  /** Values of one buffer. */
  get buffer_values(): number {
    return this.#buffers[0]?.length ?? 0;
  }

  /** Tokens that memory is resident for. */
  get resident_tokens(): number {
    return this.#written_tokens.reduce((sum, tokens) => sum + tokens, 0);
  }

  /**
   * Each of `caches`, `BATCH_PLACES` at most, has a place with room for what it expects, and its keys and values there. Others
   * make room where there is none; nothing of theirs is lost.
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

  /** What is large does not stay when the last one is gone. */
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

  /** `[to - from, G, T, D]` of all buffers: to be fed, and fetched as what the graph makes of it. */
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

  /** Fed and fetched where no token is computed. */
  nothing(): RuntimeTensor {
    const { kvHeadCount } = this.shape;
    return tensor('f32', new Float32Array(kvHeadCount * this.#width), [1, kvHeadCount, 1, this.#width]);
  }

  /** `count` rows `[G·D]` of one buffer go to the tokens of a place from `at` on. */
  write(place: number, buffer: number, rows: KvValues, at: number, count: number): void {
    this.#copy(place, buffer, rows, at, count, 'in');
  }

  /** The reverse. */
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
        if (way === 'in') for (let i = 0; i < headSize; i++) heads[head + i] = rows[row + i]!;
        else for (let i = 0; i < headSize; i++) rows[row + i] = heads[head + i]!;
        head += this.#width;
      }
    }
  }

  /**
   * A run over neighbouring places computes something in each. Where nobody of the run stands it writes over the first token:
   * gives what puts that back.
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

  /** The first that is free, so that those of a run are neighbours. */
  #freePlace(): number {
    for (let place = 0; ; place++) if (!this.#owners.has(place)) return place;
  }

  #fit(count: number, needed: number): void {
    const highest = Math.max(-1, ...this.#owners.keys());
    const places = doubled(1, Math.max(count, highest + 1));
    const isTooLong = this.#tokens >= TOO_LARGE * Math.max(needed, INITIAL_TOKENS);
    const room = doubled(isTooLong || this.#tokens === 0 ? INITIAL_TOKENS : this.#tokens, needed);
    const tokens = Math.min(room, this.shape.contextTokens);
    // A lone sequence after eight does not shrink what the next eight need.
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
      // Memory that nobody wrote to costs nothing.
      const made = new Float32Array(places * kvHeadCount * tokens * width);
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
