/** The graph's surrogates against plain loops, in every chunking, basis and kind of weights. */
import { expect, test } from 'vitest';
import type { KvMode } from '../../../gpu-backend/engine/engine.ts';
import type { Runner } from '../../../gpu-backend/engine/runner-interface.ts';
import { denseMask, type Mask, maskFromSkippedLayers, withSurrogates } from '../../../shared/mask/mask.ts';
import { furthest } from '../../support/furthest.ts';
import { naiveLlama } from '../../support/naive-llama.ts';
import {
  asGemma,
  openEmitted,
  RANDOM_TABLE_ID,
  randomLlama,
  randomSurrogates,
  TINY_CONFIG,
} from '../../support/random-llama.ts';

const V = TINY_CONFIG.vocabularySize;
const TOKENS = Array.from({ length: 40 }, (_, i) => (i * 131 + 17) % V);
const HOLES = maskFromSkippedLayers(8, { skipAttention: [1, 2], skipFfn: [0, 2] });
const REPLACED = withSurrogates(HOLES, RANDOM_TABLE_ID);
const ALL_REPLACED = withSurrogates({ runs: new Uint8Array(8) }, RANDOM_TABLE_ID);

const source = randomLlama();
const table = randomSurrogates(source.config, 32);

async function logitsOf(
  runner: Runner,
  chunks: readonly number[],
  mask: (position: number) => Mask,
  kv: KvMode = 'preserve',
): Promise<number[]> {
  const cache = runner.newCache();
  const rows: number[] = [];
  for (const size of chunks) {
    const tokenIds = TOKENS.slice(cache.length, cache.length + size);
    const plan = { mask: mask(cache.length), kv };
    rows.push(...(await runner.run({ cache, tokenIds, plan, logitRows: tokenIds.map((_, i) => i) })));
  }
  return rows;
}

async function naiveLogits(mask: (position: number) => Mask): Promise<number[]> {
  const naive = await naiveLlama(source, table);
  return TOKENS.flatMap((tokenId, position) => [...naive.next(tokenId, mask(position))]);
}

const CHUNKS = [[40], Array<number>(40).fill(1), [1, 7, 1, 20, 11]];

test.each([
  ['some blocks', REPLACED],
  ['all blocks', ALL_REPLACED],
  ['holes in the same graph', HOLES],
  ['dense in the same graph', denseMask(8)],
])('%s: the naive logits, whatever the chunks', async (_name, mask) => {
  await using runner = await openEmitted(source, 'f32', table);
  const expected = await naiveLogits(() => mask);
  for (const chunks of CHUNKS)
    expect(furthest(await logitsOf(runner, chunks, () => mask), expected)).toBeLessThan(2e-4);
});

test('a conversation may change between surrogates, holes and dense', async () => {
  await using runner = await openEmitted(source, 'f32', table);
  const mask = (position: number) => (position < 8 ? REPLACED : position < 29 ? HOLES : denseMask(8));
  const found = await logitsOf(runner, [1, 7, 1, 20, 11], mask);
  expect(furthest(found, await naiveLogits(mask))).toBeLessThan(2e-4);
});

test('with kv: elide a request that keeps its mask has the same logits', async () => {
  await using runner = await openEmitted(source, 'f32', table);
  const kept = await logitsOf(runner, CHUNKS[2]!, () => REPLACED);
  expect(furthest(await logitsOf(runner, CHUNKS[2]!, () => REPLACED, 'elide'), kept)).toBe(0);
});

test('holes have the logits of a graph without surrogates, to the last bit', async () => {
  await using plain = await openEmitted(source, 'q8');
  await using runner = await openEmitted(source, 'q8', table);
  expect(await logitsOf(runner, CHUNKS[2]!, () => HOLES)).toEqual(
    await logitsOf(plain, CHUNKS[2]!, () => HOLES),
  );
});

test.each([
  ['q8', 'Llama'],
  ['q4', 'Llama'],
  ['q8-columns', 'Llama'],
  // Its stream is rotated in blocks.
  ['q8', 'Gemma'],
] as const)('%s: the rotated basis of a %s is the same function', async (kind, family) => {
  const source = randomLlama(family === 'Gemma' ? asGemma() : {});
  await using exact = await openEmitted(source, 'f32', table);
  await using quantized = await openEmitted(source, kind, table);
  const expected = await logitsOf(exact, [40], () => ALL_REPLACED);
  const size = Math.max(...expected.map(Math.abs));
  expect(furthest(await logitsOf(quantized, [40], () => ALL_REPLACED), expected) / size).toBeLessThan(
    kind === 'q4' ? 0.3 : 0.03,
  );
});

test('another table than the graph has, or any where it has none, is refused', async () => {
  await using plain = await openEmitted(source, 'f32');
  await expect(logitsOf(plain, [40], () => REPLACED)).rejects.toThrow(/this model has none/);
});
