/** What learning is said to take: it grows with the model and the work, and days are named with a way out. */
import { totalmem } from 'node:os';
import { expect, test } from 'vitest';
import { forecastLearning, forecastLines, measurePace } from '../../../gpu-backend/learning/forecast.ts';
import { LEARN_EFFORT, QUICK_EFFORT } from '../../../gpu-backend/learning/search/effort.ts';
import type { ModelConfig } from '../../../gpu-backend/model/model-source.ts';
import { TINY_CONFIG } from '../../support/random-llama.ts';

const EIGHT_B: ModelConfig = {
  ...{ ...TINY_CONFIG, layerCount: 32, hiddenSize: 4096, ffnSize: 14_336, headCount: 32, kvHeadCount: 8 },
  ...{ headSize: 128, vocabularySize: 128_256, tiedEmbeddings: false },
};
const PACE = 1e11;

test('a larger model takes more memory, and more work more time', () => {
  const small = forecastLearning(TINY_CONFIG, 'q8', LEARN_EFFORT, 8, PACE);
  const large = forecastLearning(EIGHT_B, 'q8', LEARN_EFFORT, 8, PACE);
  const quick = forecastLearning(EIGHT_B, 'q8', QUICK_EFFORT, 8, PACE);
  const oneMask = forecastLearning(EIGHT_B, 'q8', LEARN_EFFORT, 1, PACE);
  expect(large.memory_bytes).toBeGreaterThan(20 * small.memory_bytes);
  expect(quick.time_s).toBeLessThan(large.time_s / 2);
  expect(oneMask.time_s).toBeLessThan(large.time_s / 2);
  // 8e9 multiply-adds a token at 3e11 a second: a day is 3,200,000 tokens, and a run has some millions.
  expect(large.time_s).toBeGreaterThan(86_400);
  expect(forecastLearning(EIGHT_B, 'q8', LEARN_EFFORT, 8, 2 * PACE).time_s).toBeCloseTo(large.time_s / 2, 5);
});

test('days, and memory that a machine has not, are said, with the flags that help', () => {
  const days = { memory_bytes: 5e9, time_s: 300_000 };
  const lines = forecastLines(days, { ...days, time_s: 30_000 });
  expect(lines[0]).toMatch(/about 5\.0 GB of memory and up to 3\.5 days/);
  expect(lines[1]).toMatch(/--quick it is up to 8\.3 h; --clusters 1/);
  expect(forecastLines({ memory_bytes: 5e8, time_s: 200 }, days)).toEqual([
    'Learning takes about 0.5 GB of memory and up to 3 min on this machine.',
  ]);
  expect(forecastLines({ memory_bytes: 2 * totalmem(), time_s: 60 }, undefined)[1]).toMatch(/will not fit/);
});

test('the pace is that of this machine', async () => {
  const pace = await measurePace(1);
  expect(pace).toBeGreaterThan(1e8);
  expect(pace).toBeLessThan(1e14);
});
