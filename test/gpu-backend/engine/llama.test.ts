/** The graph and its written-through cache against plain loops that keep every K and V. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { KvMode } from '../../../gpu-backend/engine/engine.ts';
import type { Runner } from '../../../gpu-backend/engine/runner-interface.ts';
import type { ModelConfig, WeightSource } from '../../../gpu-backend/model/model-source.ts';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../../shared/mask/mask.ts';
import { furthestInRows } from '../../support/furthest.ts';
import { naiveLlama } from '../../support/naive-llama.ts';
import { asGemma, openEmitted, randomLlama, TINY_CONFIG } from '../../support/random-llama.ts';

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

/** What families have beside a plain Llama, and all of it at once. */
const FEATURES: [string, Partial<ModelConfig>][] = [
  ['biases of Q, K and V', { architecture: 'qwen2', attentionBias: 'qkv' }],
  ['biases of all of attention', { attentionBias: 'qkvo' }],
  [
    'norms over heads as wide as they like',
    { architecture: 'qwen3', headNorms: true, headSize: 32, kvHeadCount: 1 },
  ],
  ['layers without rotary', { architecture: 'smollm3', layersWithoutRope: [1, 3] }],
  ['all that a Gemma 3 has', asGemma()],
  ['a sliding window in some layers', { slidingWindow: { tokens: 9, layers: [0, 2] } }],
  [
    'all of it, YaRN and a head of its own',
    {
      attentionBias: 'qkvo',
      headNorms: true,
      layersWithoutRope: [0],
      tiedEmbeddings: false,
      slidingWindow: { tokens: 13, layers: [1, 2, 3] },
      ropeScaling: {
        type: 'yarn',
        factor: 4,
        originalContextTokens: 16,
        betaFast: 32,
        betaSlow: 1,
        wholeDimensions: true,
        attentionFactor: 1.1386,
      },
    },
  ],
];

const WHOLE = [60];
const BY_TOKEN = Array<number>(60).fill(1);
const UNEVEN = [7, 1, 1, 30, 2, 19];

test.each([['a plain Llama', {}], ...FEATURES])(
  'K and V in half precision, %s: as plain loops that round K and V, at any chunks',
  async (_name, changes) => {
    const source = randomLlama(changes);
    await using runner = await openEmitted(source, 'f32', undefined, undefined, 'f16');
    const naive = await naiveLlama(source, undefined, Math.f16round);
    const mask = (position: number) => (position < 20 ? MASKED : DENSE);
    const expected = TOKENS.map((tokenId, position) => naive.next(tokenId, mask(position)));
    // fp32 and fp64 fall on two sides of a half now and then.
    for (const chunks of [[20, 40], BY_TOKEN, [7, 13, 1, 1, 30, 2, 6]])
      expect(furthestInRows(await logitsOf(runner, chunks, mask), expected)).toBeLessThan(5e-3);
  },
);

describe.each([
  ['tied embeddings', {}],
  ['a head of its own', { tiedEmbeddings: false }],
  ['heads of 32, whose scale is no power of two', { headSize: 32, headCount: 3, kvHeadCount: 1 }],
  ...FEATURES,
])('fp32, %s', (_name, changes) => {
  const source = randomLlama(changes);
  let runner: Awaited<ReturnType<typeof openEmitted>>;
  beforeAll(async () => {
    runner = await openEmitted(source, 'f32');
  });
  afterAll(() => runner[Symbol.asyncDispose]());

  test.each([
    ['dense', DENSE],
    ['masked', MASKED],
    ['everything skipped', { runs: new Uint8Array(8) }],
  ])('%s logits equal the naive ones, whatever the chunks', async (_what, mask) => {
    const expected = await naiveLogits(source, () => mask);
    for (const chunks of [WHOLE, BY_TOKEN, UNEVEN]) {
      expect(furthestInRows(await logitsOf(runner, chunks, () => mask), expected)).toBeLessThan(1e-4);
    }
  });

  test('a conversation may change its mask half-way: skipped attention kept writing K and V', async () => {
    const mask = (position: number) => (position < 38 ? MASKED : DENSE);
    const found = await logitsOf(runner, [38, 10, 12], mask);
    expect(furthestInRows(found, await naiveLogits(source, mask))).toBeLessThan(1e-4);
  });
});

test.each(FEATURES)(
  '%s: two sequences under two masks at once have the logits that they have alone',
  async (_, changes) => {
    const source = randomLlama(changes);
    await using runner = await openEmitted(source, 'f32');
    const plans = [DENSE, MASKED].map((mask) => ({ mask, kv: 'preserve' as const }));
    const caches = plans.map(() => runner.newCache());
    const expected = await Promise.all(plans.map(({ mask }) => naiveLogits(source, () => mask)));
    for (const [step, size] of [7, 1, 12, 1].entries()) {
      const inputs = plans.map((plan, i) => {
        const cache = caches[i]!;
        const tokens = i === 0 ? size : size + 1;
        return {
          cache,
          plan,
          tokenIds: TOKENS.slice(cache.length, cache.length + tokens),
          logitRows: [tokens - 1],
        };
      });
      const logits = await runner.runMany(inputs);
      logits.forEach((row, i) => {
        const found = [row];
        expect(furthestInRows(found, [expected[i]![caches[i]!.length - 1]!]), `step ${step}`).toBeLessThan(
          1e-4,
        );
      });
    }
  },
);

test('with kv: elide a request that keeps its mask has the same logits', async () => {
  const source = randomLlama();
  await using runner = await openEmitted(source, 'f32');
  const kept = await logitsOf(runner, UNEVEN, () => MASKED);
  expect(furthestInRows(await logitsOf(runner, UNEVEN, () => MASKED, 'elide'), kept)).toBe(0);
});

test.each(['q8', 'q4', 'q8-columns'] as const)(
  '%s stays near fp32, and its rotated basis is the same function',
  async (kind) => {
    const source = randomLlama();
    await using exact = await openEmitted(source, 'f32');
    await using quantized = await openEmitted(source, kind);
    const expected = await logitsOf(exact, WHOLE, () => MASKED);
    const size = Math.max(...expected.map((row) => Math.max(...row.map(Math.abs))));
    const found = await logitsOf(quantized, WHOLE, () => MASKED);
    expect(furthestInRows(found, expected) / size).toBeLessThan(kind === 'q4' ? 0.5 : 0.04);
  },
);
