/**
 * The cache rests on the runtime writing preallocated outputs in place and reading inputs in place. Should a new
 * ONNX Runtime change either, this is what tells.
 */
import { expect, test } from 'vitest';
import { KvCache } from '../../../gpu-backend/engine/kv-cache.ts';
import { encodeModel } from '../../../gpu-backend/onnx/encode.ts';
import { GraphBuilder } from '../../../gpu-backend/onnx/graph.ts';
import type { Feeds, Fetches, RuntimeTensor } from '../../../gpu-backend/onnx/session.ts';
import { createSession, floats, tensor } from '../../../gpu-backend/onnx/session.ts';

const SHAPE = { layerCount: 1, width: 4, contextTokens: 600 };

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
  cache.bind(feeds, fetches, tokens, () => true);
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
