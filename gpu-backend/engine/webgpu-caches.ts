/**
 * Keys and values in a GPU's memory. All sequences share one buffer a layer for K and one for V, `[P, G, T, D]`
 * (P = places, T = tokens, G = KV heads, D = head width): a step of many sequences is one attention node a layer.
 *
 * The buffers never come to the host. They grow by doubling, with one copy on the device; `webgpu-runner.ts` has the graph write
 * new K and V in place. A sequence has a place from its first step until its cache is emptied or forgotten.
 */
import { encodeModel } from '../onnx/encode.ts';
import { GraphBuilder, type Value } from '../onnx/graph.ts';
import type { RuntimeTensor, Session } from '../onnx/session.ts';
import { createSession, integers, tensor } from '../onnx/session.ts';
import type { CacheShape, SequenceCache } from './kv-cache.ts';

export type DeviceCacheShape = CacheShape & { readonly kvHeadCount: number; readonly headSize: number };

const INITIAL_TOKENS = 256;

/** The cache of one sequence: which place is its own, and how many tokens stand there. */
export class DeviceCache implements SequenceCache {
  length = 0;
  /** Its row of the buffers. */
  place: number | undefined;
  /** Tokens that are known to come. */
  wanted_tokens = 0;
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
    this.length = Math.min(this.length, tokens);
    if (this.length > 0) return;
    this.wanted_tokens = 0;
    this.#caches.free(this);
  }

  /** Memory of a device costs the same, written or not. */
  fill(tokens: number): void {
    this.reserve(Math.max(0, tokens - this.length));
    this.length = tokens;
  }

  appendPage(): never {
    throw new Error('pages of prompts are not kept on a GPU');
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

  static async open(shape: DeviceCacheShape): Promise<DeviceCaches> {
    return new DeviceCaches(shape, await openCopies(shape));
  }

  private constructor(shape: DeviceCacheShape, copies: Copies) {
    this.shape = shape;
    this.#copies = copies;
  }

  get places(): number {
    return this.#owners.length;
  }

  /** Those that have a place. */
  get placed(): DeviceCache[] {
    return this.#owners.flatMap((owner) => owner?.deref() ?? []);
  }

  free(cache: DeviceCache): void {
    if (cache.place === undefined) return;
    this.#owners[cache.place] = undefined;
    cache.place = undefined;
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

  async close(): Promise<void> {
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
    const { layerCount, kvHeadCount, headSize } = this.shape;
    const old = this.buffers;
    const nothing = tensor('f32', new Float32Array(kvHeadCount * headSize), [1, kvHeadCount, 1, headSize]);
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

function doubled(from: number, needed: number): number {
  let value = from;
  while (value < needed) value *= 2;
  return value;
}

function dispose(tensors: readonly RuntimeTensor[]): void {
  for (const each of tensors) each.dispose();
}

/*
 * What the device copies: three small graphs, since only graphs reach its memory.
 */

type Copies = {
  pad(buffer: RuntimeTensor, places: number, tokens: number): Promise<RuntimeTensor>;
  take(buffer: RuntimeTensor, place: number): Promise<RuntimeTensor>;
  put(buffer: RuntimeTensor, row: RuntimeTensor, place: number): Promise<void>;
  /** One after the other; when one fails, those before it are given back. */
  each(
    buffers: readonly RuntimeTensor[],
    copy: (buffer: RuntimeTensor) => Promise<RuntimeTensor>,
  ): Promise<RuntimeTensor[]>;
  close(): Promise<void>;
};

async function openCopies({ kvHeadCount: G, headSize: D }: DeviceCacheShape): Promise<Copies> {
  const session = (stay: readonly string[], build: (g: GraphBuilder, buffer: Value) => void) => {
    const g = new GraphBuilder('copy');
    build(g, g.input('buffer', 'f32', ['P', G, 'T', D]));
    return createSession(encodeModel(g.graph), { threads: 1, device: 'webgpu', stay });
  };
  const output = (g: GraphBuilder, shape: readonly (string | number)[]) =>
    g.output({ name: 'copy' }, 'f32', shape);
  const sessions: Session[] = [];
  const opened = async (made: Promise<Session>): Promise<Session> => {
    sessions.push(await made);
    return sessions.at(-1)!;
  };
  const pad = await opened(
    session(['copy'], (g, buffer) => {
      g.node('Pad', [buffer, g.input('pads', 'i64', [8])], ['copy']);
      output(g, ['P2', G, 'T2', D]);
    }),
  );
  const take = await opened(
    session(['copy'], (g, buffer) => {
      g.node('Gather', [buffer, g.input('place', 'i64', [1])], ['copy'], { axis: 0 });
      output(g, [1, G, 'T', D]);
    }),
  );
  const put = await opened(
    session([], (g, buffer) => {
      const row = g.input('row', 'f32', [1, G, 'T', D]);
      const places = g.op('Expand', [g.input('place', 'i32', [1, 1, 1, 1]), g.op('Shape', [row])]);
      g.node('ScatterElements', [buffer, places, row], ['copy'], { axis: 0 });
      output(g, ['P', G, 'T', D]);
    }),
  );
  const copy = async (by: Session, feeds: Parameters<Session['run']>[0]) =>
    (await by.run(feeds, ['copy'])).copy!;
  return {
    pad: (buffer, places, tokens) =>
      copy(pad, { buffer, pads: integers([0, 0, 0, 0, places, 0, tokens, 0]) }),
    take: (buffer, place) => copy(take, { buffer, place: integers([place]) }),
    async put(buffer, row, place) {
      const at = tensor('i32', Int32Array.of(place), [1, 1, 1, 1]);
      await put.run({ buffer, row, place: at }, { copy: buffer });
    },
    async each(buffers, make) {
      const made: RuntimeTensor[] = [];
      try {
        for (const buffer of buffers) made.push(await make(buffer));
        return made;
      } catch (error) {
        dispose(made);
        throw error;
      }
    },
    async close() {
      for (const each of sessions) await each.release();
    },
  };
}
