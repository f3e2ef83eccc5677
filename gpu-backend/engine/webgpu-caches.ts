/**
 * K and V in a GPU's memory. All sequences share one buffer a layer for K and one for V, `[P, G, T, D]` (P = places,
 * G = KV heads, T = token capacity, D = padded head size), so a step of many sequences has one attention node a layer.
 *
 * The buffers never leave the device. They grow by doubling, with one copy on the device; the graph writes new K and V in
 * place (`webgpu-runner.ts`). A sequence has a place from its first step until its cache is emptied or garbage-collected.
 * Operations on the device are serialized (`inTurn`), since a step may move the buffers.
 */
import { oneAtATime } from '../one-at-a-time.ts';
import type { RuntimeTensor } from '../onnx/session.ts';
import { floatTensor } from '../onnx/session.ts';
import { doubled, type SequenceCache } from './kv-cache.ts';
import { type Copies, type DeviceCacheShape, dispose, openCopies } from './webgpu-copies.ts';

const INITIAL_TOKENS = 256;

/** The cache of one sequence: its place in the buffers and its length. */
export class DeviceCache implements SequenceCache {
  length = 0;
  /** Its row of the buffers. */
  place: number | undefined;
  /** The length that it is expected to reach. */
  wanted_tokens = 0;
  /** How often it was emptied; a pending copy for an earlier use is dropped. */
  lives = 0;
  /** The error of a failed copy into this cache: its tokens are not valid. */
  failure: Error | undefined;
  readonly #caches: DeviceCaches;

  constructor(caches: DeviceCaches) {
    this.#caches = caches;
  }

  get capacity_tokens(): number {
    return this.place === undefined ? 0 : this.#caches.tokens;
  }

  reserve(tokens: number): void {
    const needed = this.length + tokens;
    const { contextTokens } = this.#caches.shape;
    if (needed > contextTokens)
      throw new RangeError(`${needed} tokens do not fit a context of ${contextTokens}`);
    this.wanted_tokens = Math.max(this.wanted_tokens, needed);
  }

  truncate(tokens: number): void {
    if (tokens === 0) {
      this.#caches.release(this);
      this.wanted_tokens = 0;
      this.lives++;
      this.failure = undefined;
    }
    this.length = Math.min(this.length, tokens);
  }

  /** Writes nothing: unlike in this process's memory, unwritten device memory costs the same. */
  fill(tokens: number): void {
    this.reserve(Math.max(0, tokens - this.length));
    this.length = tokens;
  }

  appendPage(): never {
    throw new Error('a GPU has no pages: its prefix cache is DevicePrefixes');
  }

  copyPage(): never {
    return this.appendPage();
  }
}

/** @throws Error when the cache belongs to another runner. */
export function onDevice(cache: SequenceCache): DeviceCache {
  if (cache instanceof DeviceCache) return cache;
  throw new Error('the cache belongs to another runner');
}

export class DeviceCaches {
  readonly shape: DeviceCacheShape;
  /** K of layer i at 2i, V at 2i + 1. */
  buffers: readonly RuntimeTensor[] = [];
  tokens = 0;
  readonly #copies: Copies;
  /** The cache in each place. A garbage-collected cache frees its place. */
  #owners: (WeakRef<DeviceCache> | undefined)[] = [];

  static async open(shape: DeviceCacheShape): Promise<DeviceCaches> {
    return new DeviceCaches(shape, await openCopies(shape));
  }

  private constructor(shape: DeviceCacheShape, copies: Copies) {
    this.shape = shape;
    this.#copies = copies;
  }

  /** Runs `work` after all earlier work on the device. */
  readonly inTurn = oneAtATime();

  get places(): number {
    return this.#owners.length;
  }

  /** The caches that have a place. */
  get placed(): DeviceCache[] {
    return this.#owners.flatMap((owner) => owner?.deref() ?? []);
  }

  /** Takes a cache's place away. The place becomes free only in turn, since earlier work may still read it. */
  release(cache: DeviceCache): void {
    const { place, length } = cache;
    if (place === undefined) return;
    const last = new DeviceCache(this);
    last.place = place;
    last.length = length;
    this.#owners[place] = new WeakRef(last);
    cache.place = undefined;
    void this.inTurn(async () => {
      this.#owners[place] = undefined;
      last.place = undefined;
    });
  }

  /** Gives each of `caches` a place with room for `tokens` more tokens. */
  async makeRoom(caches: readonly DeviceCache[], tokens: number): Promise<void> {
    const { placed } = this;
    const homeless = caches.filter(({ place }) => place === undefined);
    if (placed.length === 0) this.#shrink();
    const places = doubled(this.places || 1, placed.length + homeless.length);
    const needed = Math.max(
      ...caches.map(({ length, wanted_tokens }) => Math.max(length + tokens, wanted_tokens)),
      // A step of other sequences writes one token behind each.
      ...placed.map(({ length }) => length + 1),
    );
    const room = Math.min(doubled(this.tokens || INITIAL_TOKENS, needed), this.shape.contextTokens + 1);
    if (places !== this.places || room !== this.tokens) await this.#grow(places, room);
    for (const cache of homeless) {
      const place = this.#owners.findIndex((owner) => owner?.deref() === undefined);
      this.#owners[place] = new WeakRef(cache);
      cache.place = place;
    }
  }

  /** Runs `work` on K and V of one place, `[1, G, T, D]` each: the buffers themselves if there is one place, else copies. */
  async with(place: number, work: (rows: readonly RuntimeTensor[]) => Promise<void>): Promise<void> {
    const { buffers } = this;
    if (this.places === 1) return work(buffers);
    const rows = await this.#copies.each(buffers, (buffer) => this.#copies.take(buffer, place));
    try {
      await work(rows);
      for (const [i, buffer] of buffers.entries()) await this.#copies.put(buffer, rows[i]!, place);
    } finally {
      dispose(rows);
    }
  }

  /** A copy of the first tokens of a place, `[1, G, tokens, D]` each. */
  keep(place: number, tokens: number): Promise<KeptRows> {
    return this.#copies.cut(this.buffers, place, tokens);
  }

  /** A copy of the first tokens of kept rows; disposes of `rows`. */
  async shorten(rows: KeptRows, tokens: number): Promise<KeptRows> {
    try {
      return await this.#copies.cut(rows, 0, tokens);
    } finally {
      dispose(rows);
    }
  }

  /** Writes the first tokens of kept rows into a cache, which gets a place. */
  async fill(cache: DeviceCache, rows: KeptRows, tokens: number): Promise<void> {
    await this.makeRoom([cache], 0);
    await this.#copies.fill(this.buffers, cache.place!, rows, tokens);
  }

  async close(): Promise<void> {
    await this.inTurn(async () => {});
    dispose(this.buffers);
    this.buffers = [];
    await this.#copies.close();
  }

  /** Releases the buffers when no cache has a place. */
  #shrink(): void {
    if (this.places <= 1 && this.tokens <= INITIAL_TOKENS) return;
    dispose(this.buffers);
    this.buffers = [];
    this.#owners = [];
    this.tokens = 0;
  }

  async #grow(places: number, tokens: number): Promise<void> {
    const { layerCount, kvHeadCount, headSize, kvType } = this.shape;
    const old = this.buffers;
    const zeros = new Uint8Array(kvHeadCount * headSize);
    const nothing = floatTensor(kvType, zeros, [1, kvHeadCount, 1, headSize]);
    const from = old.length > 0 ? old : Array<RuntimeTensor>(2 * layerCount).fill(nothing);
    const [places0, tokens0] = old.length > 0 ? [this.places, this.tokens] : [1, 1];
    this.buffers = await this.#copies.each(from, (buffer) =>
      this.#copies.pad(buffer, places - places0, tokens - tokens0),
    );
    dispose(old);
    this.tokens = tokens;
    while (this.#owners.length < places) this.#owners.push(undefined);
  }
}

/** K of layer i at 2i, V at 2i + 1, `[1, G, tokens, D]` each, on the device. */
export type KeptRows = readonly RuntimeTensor[];
