/**
 * Keys and values in a GPU's memory. All sequences share one buffer a layer for K and one for V, `[P, G, T, D]`
 * (P = places, T = tokens, G = KV heads, D = head width): a step of many sequences is one attention node a layer.
 *
 * The buffers never come to the host. They grow by doubling, with one copy on the device; `webgpu-runner.ts` has the graph write
 * new K and V in place. A sequence has a place from its first step until its cache is emptied or forgotten.
 * What is done with the device is done in turn: a step may move the buffers.
 */
import type { RuntimeTensor } from '../onnx/session.ts';
import { floatTensor } from '../onnx/session.ts';
import { doubled, type SequenceCache } from './kv-cache.ts';
import { type Copies, type DeviceCacheShape, dispose, openCopies } from './webgpu-copies.ts';

const INITIAL_TOKENS = 256;

/** The cache of one sequence: which place is its own, and how many tokens stand there. */
export class DeviceCache implements SequenceCache {
  length = 0;
  /** Its row of the buffers. */
  place: number | undefined;
  /** Tokens that are known to come. */
  wanted_tokens = 0;
  /** How often it was emptied: what was begun for an earlier life is not finished. */
  lives = 0;
  /** Why it does not hold the tokens that it should. */
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

  /** Memory of a device costs the same, written or not. */
  fill(tokens: number): void {
    this.reserve(Math.max(0, tokens - this.length));
    this.length = tokens;
  }

  appendPage(): never {
    throw new Error('pages are for the host: a GPU keeps prompts by itself');
  }

  copyPage(): never {
    return this.appendPage();
  }
}

export class DeviceCaches {
  readonly shape: DeviceCacheShape;
  /** K of layer i at 2i, V at 2i + 1. */
  buffers: readonly RuntimeTensor[] = [];
  tokens = 0;
  readonly #copies: Copies;
  /** Who has each place. What nobody refers to any more gives its place back. */
  #owners: (WeakRef<DeviceCache> | undefined)[] = [];
  #last: Promise<unknown> = Promise.resolve();

  static async open(shape: DeviceCacheShape): Promise<DeviceCaches> {
    return new DeviceCaches(shape, await openCopies(shape));
  }

  private constructor(shape: DeviceCacheShape, copies: Copies) {
    this.shape = shape;
    this.#copies = copies;
  }

  /** Does `work` with the device when all that was asked before is done. */
  inTurn<T>(work: () => Promise<T>): Promise<T> {
    const done = this.#last.then(work);
    this.#last = done.catch(() => undefined);
    return done;
  }

  get places(): number {
    return this.#owners.length;
  }

  /** Those that have a place. */
  get placed(): DeviceCache[] {
    return this.#owners.flatMap((owner) => owner?.deref() ?? []);
  }

  /** Takes a cache's place from it. Until its turn has come nobody else has the place: what was asked before may still read it. */
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

  /** A place for each of `caches`, with room for `tokens` more tokens. */
  async makeRoom(caches: readonly DeviceCache[], tokens: number): Promise<void> {
    const { placed } = this;
    const homeless = caches.filter(({ place }) => place === undefined);
    if (placed.length === 0) this.#shrink();
    const places = doubled(this.places || 1, placed.length + homeless.length);
    const needed = Math.max(
      ...caches.map(({ length, wanted_tokens }) => Math.max(length + tokens, wanted_tokens)),
      // Steps of others write one token behind each.
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

  /** Work on K and V of one place, `[1, G, T, D]` each: on the buffers themselves when there is one place, else on copies. */
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

  /** The first tokens of what was kept, which goes. */
  async shorten(rows: KeptRows, tokens: number): Promise<KeptRows> {
    try {
      return await this.#copies.cut(rows, 0, tokens);
    } finally {
      dispose(rows);
    }
  }

  /** Writes the first tokens of what was kept into a cache, which gets a place. */
  async fill(cache: DeviceCache, rows: KeptRows, tokens: number): Promise<void> {
    await this.makeRoom([cache], 0);
    await this.#copies.fill(this.buffers, cache.place!, rows, tokens);
  }

  async close(): Promise<void> {
    await this.#last;
    dispose(this.buffers);
    this.buffers = [];
    await this.#copies.close();
  }

  /** Nobody is there: the next one begins with little. */
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
