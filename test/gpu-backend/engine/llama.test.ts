/** The graph and its written-through cache against plain loops that keep every K and V. */
import { describe, expect, test } from 'vitest';
import type { KvMode } from '../../../gpu-backend/engine/engine.ts';
import type { Runner } from '../../../gpu-backend/engine/runner.ts';
import type { WeightSource } from '../../../gpu-backend/model/model-source.ts';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../../shared/mask/mask.ts';
import { naiveLlama } from '../../support/naive-llama.ts';
import { openEmitted, randomLlama, TINY_CONFIG } from '../../support/random-llama.ts';

const V = TINY_CONFIG.vocabularySize;
const TOKENS = Array.from({ length: 60 }, (_, i) => (i * 131 + 17) % V);
const DENSE = denseMask(8);
const MASKED = maskFromSkippedLayers(8, { skipAttention: [1, 2], skipFfn: [0, 2] });

/** Logits of every position, `[tokens][V]`. The mask may change between chunks. */
async function logitsOf(
  runner: Runner,
  chunks: readonly number[],
  mask: (position: number) => Mask,
  kv: KvMode = 'preserve',
) {
  const cache = runner.newCache();
  const rows: Float32Array[] = [];
  for (const size of chunks) {
    const tokenIds = TOKENS.slice(cache.length, cache.length + size);
    const plan = { mask: mask(cache.length), kv };
    const logits = await runner.run({ cache, tokenIds, plan, logitRows: tokenIds.map((_, i) => i) });
    for (let i = 0; i < size; i++) rows.push(logits.slice(i * V, (i + 1) * V));
  }
  return rows;
}

async function naiveLogits(source: WeightSource, mask: (position: number) => Mask) {
  const naive = await naiveLlama(source);
  return TOKENS.map((tokenId, position) => naive.next(tokenId, mask(position)));
}

function largestDifference(a: ArrayLike<number>[], b: ArrayLike<number>[]): number {
  expect(a.length).toBe(b.length);
  let largest = 0;
  a.forEach((row, i) => {
    for (let j = 0; j < V; j++) largest = Math.max(largest, Math.abs(row[j]! - b[i]![j]!));
  });
  return largest;
}

const WHOLE = [60];
const BY_TOKEN = Array<number>(60).fill(1);
const UNEVEN = [7, 1, 1, 30, 2, 19];

describe.each([
  ['tied embeddings', {}],
  ['a head of its own', { tiedEmbeddings: false }],
  ['heads of 32, whose scale is no power of two', { headSize: 32, headCount: 3, kvHeadCount: 1 }],
])('fp32, %s', (_name, changes) => {
  const source = randomLlama(changes);

  test.each([
    ['dense', DENSE],
    ['masked', MASKED],
    ['everything skipped', { runs: new Uint8Array(8) }],
  ])('%s logits equal the naive ones, whatever the chunks', async (_what, mask) => {
    await using runner = await openEmitted(source, 'f32');
    const expected = await naiveLogits(source, () => mask);
    for (const chunks of [WHOLE, BY_TOKEN, UNEVEN]) {
      expect(largestDifference(await logitsOf(runner, chunks, () => mask), expected)).toBeLessThan(1e-4);
    }
  });

  test('a conversation may change its mask half-way: skipped attention kept writing K and V', async () => {
    await using runner = await openEmitted(source, 'f32');
    const mask = (position: number) => (position < 38 ? MASKED : DENSE);
    const found = await logitsOf(runner, [38, 10, 12], mask);
    expect(largestDifference(found, await naiveLogits(source, mask))).toBeLessThan(1e-4);
  });
});

test('with kv: elide a request that keeps its mask has the same logits', async () => {
  const source = randomLlama();
  await using runner = await openEmitted(source, 'f32');
  const kept = await logitsOf(runner, UNEVEN, () => MASKED);
  expect(largestDifference(await logitsOf(runner, UNEVEN, () => MASKED, 'elide'), kept)).toBe(0);
});

test.each(['q8', 'q4'] as const)(
  '%s stays near fp32, and its rotated basis is the same function',
  async (kind) => {
    const source = randomLlama();
    await using exact = await openEmitted(source, 'f32');
    await using quantized = await openEmitted(source, kind);
    const expected = await logitsOf(exact, WHOLE, () => MASKED);
    const size = Math.max(...expected.map((row) => Math.max(...row.map(Math.abs))));
    const found = await logitsOf(quantized, WHOLE, () => MASKED);
    expect(largestDifference(found, expected) / size).toBeLessThan(kind === 'q8' ? 0.04 : 0.5);
  },
);
