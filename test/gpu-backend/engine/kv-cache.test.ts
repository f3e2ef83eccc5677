/**
 * The cache rests on the runtime writing preallocated outputs in place and reading inputs in place. Should a new
 * ONNX Runtime change either, this is what tells.
 */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { HeadCaches } from '../../../gpu-backend/engine/head-caches.ts';
import { type CacheShape, KvCache } from '../../../gpu-backend/engine/kv-cache.ts';
import { encodeModel } from '../../../gpu-backend/onnx/encode.ts';
import { GraphBuilder } from '../../../gpu-backend/onnx/graph.ts';
import type { Feeds, Fetches, RuntimeTensor } from '../../../gpu-backend/onnx/session.ts';
import { createSession, floats, tensor } from '../../../gpu-backend/onnx/session.ts';

const SHAPE: CacheShape = { layerCount: 1, width: 4, contextTokens: 600, kvType: 'f32' };

/** new_k = x, new_v = 2x; sum = all of past_k, read after the write. */
async function openToy() {
  const g = new GraphBuilder('toy');
  const x = g.input('x', 'f32', [1, 'S', 4]);
  const pastK = g.input('past_k_0', 'f32', [1, 'T', 4]);
  const pastV = g.input('past_v_0', 'f32', [1, 'T', 4]);
  g.node('Mul', [x, g.constant('f32', [1], [1])], ['new_k_0']);
  g.node('Mul', [x, g.constant('f32', [1], [2])], ['new_v_0']);
  // The read comes behind both writes, as attention's does: it hangs on what was written.
  const written = ['new_k_0', 'new_v_0'].map((name) => g.op('ReduceSum', [{ name }], { keepdims: 0 }));
  const nothing = g.op('Mul', [g.op('Sum', written), g.constant('f32', [], [0])]);
  const sums = [pastK, pastV].map((past) =>
    g.op('ReduceSum', [g.op('Add', [past, nothing])], { keepdims: 0 }),
  );
  g.node('Sum', sums, ['sum']);
  g.output({ name: 'new_k_0' }, 'f32', [1, 'S', 4]);
  g.output({ name: 'new_v_0' }, 'f32', [1, 'S', 4]);
  g.output({ name: 'sum' }, 'f32', []);
  return createSession(encodeModel(g.graph), { threads: 1 });
}

async function step(
  session: Awaited<ReturnType<typeof openToy>>,
  cache: KvCache,
  values: number[],
): Promise<number> {
  const tokens = values.length / 4;
  cache.reserve(tokens);
  const feeds: Feeds = { x: tensor('f32', Float32Array.from(values), [1, tokens, 4]) };
  const fetches: Fetches = { sum: null };
  for (const [buffer, name] of ['k_0', 'v_0'].entries()) {
    feeds[`past_${name}`] = cache.past(tokens)[buffer]!;
    fetches[`new_${name}`] = cache.newRows(buffer, tokens);
  }
  const outputs = await session.run(feeds, fetches);
  cache.advance(tokens);
  return floats(outputs.sum as RuntimeTensor)[0]!;
}

test('what a step writes is in the cache that the same step reads, and stays there', async () => {
  const session = await openToy();
  const cache = new KvCache(SHAPE);
  const copied: number[] = [];
  for (let position = 0; position < 600; position += 2) {
    const values = Array.from({ length: 8 }, (_, i) => position + i);
    copied.push(...values);
    // K holds x and V holds 2x: three times the sum of everything fed so far.
    const expected = 3 * copied.reduce((sum, value) => sum + value, 0);
    expect(await step(session, cache, values)).toBe(expected);
  }
  expect(cache.length).toBe(600);
  await session.release();
});

test('a slot used again sees nothing of the sequence before', async () => {
  const session = await openToy();
  const cache = new KvCache(SHAPE);
  await step(session, cache, Array<number>(16).fill(5));
  cache.truncate(0);
  expect(cache.length).toBe(0);
  // Old rows may still lie in the buffer: key_count is what bounds attention. New rows overwrite from the start.
  await step(session, cache, [1, 1, 1, 1]);
  const rows = floats(cache.past(0)[0]!).subarray(0, 8);
  expect([...rows]).toEqual([1, 1, 1, 1, 5, 5, 5, 5]);
  await session.release();
});

test('a cache never outgrows the context', () => {
  const cache = new KvCache(SHAPE);
  expect(() => cache.reserve(601)).toThrow(RangeError);
  cache.reserve(600);
  expect(cache.capacity_tokens).toBe(600);
});

/** Of two heads of two; a token's four values are its number, its cache's, and which buffer. */
const HEADS = { layerCount: 1, contextTokens: 600, kvHeadCount: 2, headSize: 2 };
/** Values of a token in a buffer, where a head is eight wide. */
const ROOM = 2 * 8;

test('among heads, who expects many tokens takes no memory for rows', () => {
  const heads = new HeadCaches(HEADS);
  const cache = new KvCache(SHAPE, heads);
  cache.reserve(600);
  expect(cache).toMatchObject({ capacity_tokens: 0, wanted_tokens: 600 });
  heads.place([cache]);
  expect(cache).toMatchObject({ capacity_tokens: 0, place: 0 });
});

/** What may become of one of twelve caches; eight have a place at most. */
type Change = {
  readonly kind: 'tokens' | 'rows' | 'truncate' | 'empty' | 'page';
  readonly who: number[];
  readonly size: number;
};
const anyChange: fc.Arbitrary<Change> = fc.record({
  kind: fc.constantFrom('tokens', 'tokens', 'tokens', 'rows', 'truncate', 'empty', 'page'),
  who: fc.uniqueArray(fc.nat(11), { minLength: 1, maxLength: 8 }),
  size: fc.integer({ min: 1, max: 200 }),
});

test('whatever moves between rows and heads, each cache has its own tokens, and their memory goes with them', () => {
  let moves = 0;
  fc.assert(
    fc.property(fc.array(anyChange, { minLength: 30, maxLength: 60 }), (changes) => {
      const heads = new HeadCaches(HEADS);
      let next = 1;
      const all = Array.from({ length: 12 }, () => ({
        cache: new KvCache(SHAPE, heads),
        tokens: [] as number[],
      }));
      type One = (typeof all)[number];
      const write = ({ cache, tokens }: One, count: number) => {
        const fresh = Array.from({ length: count }, () => next++);
        for (const buffer of [0, 1]) {
          const values = fresh.flatMap((token) => [token, token + 0.25, token + 0.5, buffer]);
          cache.write(buffer, Float32Array.from(values), 0, count);
        }
        cache.advance(count);
        tokens.push(...fresh);
      };
      const check = ({ cache, tokens }: One) => {
        expect(cache.length).toBe(tokens.length);
        const page = cache.copyPage(0, tokens.length);
        const expected = [0, 1].flatMap((buffer) =>
          tokens.flatMap((token) => [token, token + 0.25, token + 0.5, buffer]),
        );
        expect([...page]).toEqual(expected);
      };
      const change = {
        tokens(some: One[]) {
          const able = some.filter(({ tokens }) => tokens.length < 600);
          if (able.length === 0) return;
          heads.place(able.map(({ cache }) => cache));
          moves++;
          // A run writes over the first token of whoever stands between its own.
          const places = able.map(({ cache }) => cache.place!);
          const from = Math.min(...places);
          const between = Array.from({ length: Math.max(...places) - from }, (_, i) => from + i);
          const empty = between.filter((place) => !places.includes(place));
          const putBack = heads.keepFirst(empty);
          for (const place of empty) heads.write(place, 0, new Float32Array(4).fill(-1), 0, 1);
          putBack();
          for (const one of able) write(one, 1);
          expect(new Set(places).size).toBe(able.length);
        },
        rows(some: One[], size: number) {
          for (const one of some) {
            const count = Math.min(size, 600 - one.tokens.length);
            one.cache.reserveRows(count);
            write(one, count);
          }
        },
        truncate(some: One[], size: number) {
          for (const { cache, tokens } of some) {
            cache.truncate(size);
            tokens.splice(size);
          }
        },
        empty(some: One[]) {
          for (const { cache, tokens } of some) {
            cache.truncate(0);
            tokens.length = 0;
          }
        },
        page(some: One[]) {
          for (const one of some) check(one);
        },
      };
      for (const { kind, who, size } of changes) {
        change[kind](
          who.map((i) => all[i]!),
          size,
        );
      }
      for (const one of all) check(one);
      change.empty(all);
      // What the longest took does not stay.
      expect(heads.buffer_values).toBeLessThan(8 * ROOM * 1024);
    }),
    { seed: 1612, numRuns: 100 },
  );
  expect(moves).toBeGreaterThan(1000);
});

test('heads take no more than their sequences need, and shrink when the longest is gone', () => {
  const heads = new HeadCaches({ ...HEADS, contextTokens: 8192 });
  const shape = { ...SHAPE, contextTokens: 8192 };
  const long = new KvCache(shape, heads);
  const short = new KvCache(shape, heads);
  long.fill(5000);
  short.fill(10);
  heads.place([long, short]);
  expect(heads.buffer_values).toBe(2 * 8192 * ROOM);
  long.truncate(0);
  heads.place([short]);
  expect(heads.buffer_values).toBe(2 * 256 * ROOM);
  expect([...short.copyPage(0, 10)]).toEqual(Array(80).fill(1));
});

test('what long sequences wrote in one place after the other does not stay beside one that goes on', () => {
  const heads = new HeadCaches({ ...HEADS, contextTokens: 8192 });
  const shape = { ...SHAPE, contextTokens: 8192 };
  const [stays, ...others] = Array.from({ length: 8 }, () => new KvCache(shape, heads));
  stays!.fill(3000);
  for (const other of others) other.fill(2000);
  heads.place([stays!, ...others]);
  expect(heads.resident_tokens).toBe(3001 + 7 * 2001);
  for (const other of others) other.truncate(0);
  heads.place([stays!]);
  expect(heads.resident_tokens).toBe(3001);
  expect([...stays!.copyPage(2999, 1)]).toEqual(Array(8).fill(1));
});
