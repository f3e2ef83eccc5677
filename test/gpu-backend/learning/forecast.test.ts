/** What learning is said to take: it grows with the model and the work, holds against what is measured, and days have a way out. */
import { execFile } from 'node:child_process';
import { appendFile, mkdtempDisposable, writeFile } from 'node:fs/promises';
import { tmpdir, totalmem } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, test } from 'vitest';
import { sizeOfData } from '../../../gpu-backend/learning/data/read-data.ts';
import type { Scored } from '../../../gpu-backend/learning/data/samples.ts';
import {
  batchTimes,
  type Forecast,
  forecastLearning,
  forecastLines,
  measurePaces,
  type Paces,
  tokensAPosition,
} from '../../../gpu-backend/learning/forecast.ts';
import { fastestRounding, ROUNDINGS } from '../../../gpu-backend/learning/gates/rounding.ts';
import {
  LOSS_BATCH_TOKENS,
  type MemoryPlan,
  planMemory,
  STEP_PART_TOKENS,
  weightCounts,
} from '../../../gpu-backend/learning/gates/step-memory.ts';
import { openRunJournal } from '../../../gpu-backend/learning/journal.ts';
import { roundingIn, STATE_FILE } from '../../../gpu-backend/learning/learn.ts';
import { LEARN_EFFORT, QUICK_EFFORT } from '../../../gpu-backend/learning/search/effort.ts';
import type { ModelConfig, ModelManifest, WeightKind } from '../../../gpu-backend/model/model-source.ts';
import { installedModel } from '../../support/installed-model.ts';
import { TINY_CONFIG } from '../../support/random-llama.ts';
import { installTinyModel } from '../../support/tiny-model.ts';

const EIGHT_B: ModelConfig = {
  ...TINY_CONFIG,
  layerCount: 32,
  hiddenSize: 4096,
  ffnSize: 14_336,
  headCount: 32,
  kvHeadCount: 8,
  headSize: 128,
  vocabularySize: 128_256,
  tiedEmbeddings: false,
};
/** A CPU with VNNI and without AMX. */
const pacesOf = (f32: number): Paces => ({
  f32,
  q8: 1.2 * f32,
  q4: f32,
  'q8-columns': 2.8 * f32,
  columns: 2.8 * f32,
  pairs: 1.4 * f32,
  rounding: 'blocks',
});
const MACHINE = {
  clusterCounts: [8],
  paces: pacesOf(1e11),
  available_bytes: 1e12,
  data: { bytes: 2e6, lines: 1000 },
  positionTokens: 1.5,
};

test('a larger model takes more memory, and more work more time', () => {
  const small = forecastLearning(TINY_CONFIG, 'q8', LEARN_EFFORT, MACHINE);
  const large = forecastLearning(EIGHT_B, 'q8', LEARN_EFFORT, MACHINE);
  const quick = forecastLearning(EIGHT_B, 'q8', QUICK_EFFORT, MACHINE);
  const oneMask = forecastLearning(EIGHT_B, 'q8', LEARN_EFFORT, { ...MACHINE, clusterCounts: [1] });
  expect(large.memory_bytes).toBeGreaterThan(20 * small.memory_bytes);
  expect(quick.time_s).toBeLessThan(large.time_s / 2);
  expect(oneMask.time_s).toBeLessThan(large.time_s / 2);
  // 8e9 multiply-adds a token at 3e11 a second: a day is 3,200,000 tokens, and a run has some millions.
  expect(large.time_s).toBeGreaterThan(86_400);
  const faster = forecastLearning(EIGHT_B, 'q8', LEARN_EFFORT, { ...MACHINE, paces: pacesOf(2e11) });
  expect(faster.time_s / large.time_s).toBeCloseTo(0.5, 1);
});

test('every mask that is asked for, and every number of clusters, takes its time', () => {
  const timeOf = (clusterCounts: number[], maskCount?: number) =>
    forecastLearning(EIGHT_B, 'q8', LEARN_EFFORT, { ...MACHINE, clusterCounts, maskCount }).time_s;
  expect(timeOf([64], 1)).toBe(timeOf([1]));
  expect(timeOf([64], 2)).toBeLessThan(timeOf([64]) / 1.5);
  expect(timeOf([64], 32)).toBeGreaterThan(2 * timeOf([64]));
  expect(timeOf([64], 256)).toBe(timeOf([64], 64));
  // What all of them share is learned once.
  expect(timeOf([1, 64])).toBeCloseTo(timeOf([64]), 3);
  expect(timeOf([16, 64])).toBeCloseTo(timeOf([16]) + timeOf([64]) - timeOf([1]), 3);
});

test('little text takes little time, and more than there is work for no more', () => {
  const timeOn = (positions: number) => {
    const data = { bytes: 2 * positions, lines: 0 };
    return forecastLearning(EIGHT_B, 'f32', LEARN_EFFORT, { ...MACHINE, data }).time_s;
  };
  // Two rows of fifty tokens.
  expect(timeOn(100)).toBeLessThan(timeOn(1e9) / 20);
  expect(timeOn(100)).toBeGreaterThan(timeOn(0));
  expect(timeOn(0)).toBeGreaterThan(0);
  expect(timeOn(1e5)).toBe(timeOn(1e9));
});

test('system prompts, and questions beside scored answers, take time though no position of them is scored', async () => {
  await using out = await mkdtempDisposable(join(tmpdir(), 'maskroute-forecast-'));
  const model = await installTinyModel(join(out.path, 'model'), 'f32', { contextTokens: 1024 });
  const ask = { role: 'user', content: 'What is the capital of France, and how many people live there?' };
  const answer = { role: 'assistant', content: 'Paris, which has two million.' };
  const file = join(out.path, 'rows.jsonl');
  const tokensHere = async (scored: Scored) => {
    const files = [file];
    const { lines } = await sizeOfData({ files });
    return await tokensAPosition(model, { files, lines }, { tokensMax: 128, scored });
  };
  const append = (messages: readonly object[], count: number) =>
    appendFile(file, `${JSON.stringify({ messages })}\n`.repeat(count));
  const tokensOf = async (messages: readonly object[], scored: Scored) => {
    await writeFile(file, `${JSON.stringify({ messages: [{ role: 'user', content: '' }] })}\n`);
    await append(messages, 10);
    return await tokensHere(scored);
  };
  const system = { role: 'system', content: 'Answer in one sentence. '.repeat(8) };
  const plain = await tokensOf([ask, answer], 'all');
  expect(plain).toBeLessThan(2);
  const [led, answers] = [
    await tokensOf([system, ask, answer], 'all'),
    await tokensOf([ask, answer], 'answers'),
  ];
  for (const positionTokens of [led, answers]) {
    expect(positionTokens).toBeGreaterThan(2.5);
    const timeOf = (some: number) =>
      forecastLearning(EIGHT_B, 'q8', LEARN_EFFORT, { ...MACHINE, positionTokens: some }).time_s;
    expect(timeOf(positionTokens)).toBeGreaterThan(1.2 * timeOf(plain));
  }
  // Many plain rows come first.
  await tokensOf([ask, answer], 'all');
  await append([ask, answer], 1000);
  await append([system, ask, answer], 3000);
  expect(await tokensHere('all')).toBeGreaterThan(plain + 0.6 * (led - plain));
  const asked = { files: [file], lines: 4000 };
  const reading = tokensAPosition(model, asked, { tokensMax: 128, scored: 'all' }, AbortSignal.abort());
  await expect(reading, 'Ctrl-C while it reads').rejects.toThrow('aborted');
});

test('the data take memory, too, by their bytes and by their rows', () => {
  const memoryOn = (bytes: number, lines: number) =>
    forecastLearning(TINY_CONFIG, 'q8', LEARN_EFFORT, { ...MACHINE, data: { bytes, lines } }).memory_bytes;
  // Measured: 150 MB of rows of 320 bytes took 1.57 GB, and of rows of 5 KB 0.37 GB.
  const none = memoryOn(0, 0);
  expect((memoryOn(150e6, 464_456) - none) / 1.57e9).toBeCloseTo(1, 1);
  expect((memoryOn(150e6, 30_348) - none) / 0.37e9).toBeCloseTo(1, 1);
});

test('a model of 8B weights in four bits is learned on layer by layer in 16 GB, which takes longer', () => {
  const roomy = forecastLearning(EIGHT_B, 'q4', LEARN_EFFORT, MACHINE);
  const bounded = forecastLearning(EIGHT_B, 'q4', LEARN_EFFORT, { ...MACHINE, available_bytes: 16e9 });
  expect(roomy.plan).toBe('whole');
  expect(roomy.memory_bytes).toBeGreaterThan(24e9);
  expect(bounded.plan).toBe('layers');
  expect(bounded.memory_bytes).toBeLessThan(16e9);
  expect(bounded.time_s).toBeGreaterThan(roomy.time_s);
  // More layers, more time; the pieces are as large as before.
  const [flat, deep] = [32, 80].map((layerCount) => planMemory({ ...EIGHT_B, layerCount }, 'q4', 1e9));
  expect([flat, deep]).toMatchObject(Array(2).fill({ kind: 'layers', layersKept: 0 }));
});

test('a whole 8B in four bits, layer by layer, takes what was measured', () => {
  // `memory-run.ts` on two cores with other work, all of them at a pace of 7.9e10: a batch's loss took 71 s, a step's part 121 s.
  const plan = planMemory(EIGHT_B, 'q4', 1e9);
  const timesOf = (of: Pick<MemoryPlan, 'kind' | 'layersKept'>) =>
    batchTimes(EIGHT_B, 'q4', of, pacesOf(7.9e10), LOSS_BATCH_TOKENS);
  const { loss_s, step_s } = timesOf(plan);
  for (const [said, measured] of [
    [loss_s, 71],
    [step_s, 121],
  ] as const) {
    expect(said).toBeGreaterThan(0.8 * measured);
    expect(said).toBeLessThan(1.25 * measured);
  }
  // The engine that scores has most.
  expect(plan.memory_bytes).toBeGreaterThan(7.78e9);
  expect(plan.memory_bytes).toBeLessThan(1.2 * 7.78e9);
  // Layers that stay open are packed once; on the way back all are.
  const roomy = timesOf({ kind: 'layers', layersKept: 32 });
  const whole = timesOf({ kind: 'whole', layersKept: 0 });
  expect(roomy.loss_s - whole.loss_s).toBeLessThan(3);
  expect(roomy.step_s - whole.step_s).toBeGreaterThan(40);
});

test('a head whose copies are most of the memory takes what was measured', () => {
  // The peak of `trainingLinears` alone, on a head of 4096 and so many tokens, in the rounding that takes more.
  for (const [vocabularySize, measured_bytes] of [
    [16_384, 0.795e9],
    [16_390, 1.007e9],
  ] as const) {
    const config = { ...TINY_CONFIG, hiddenSize: 4096, headSize: 64, layerCount: 1, vocabularySize };
    const { memory_bytes } = planMemory(config, 'q8', 1);
    expect(memory_bytes).toBeGreaterThan(measured_bytes);
    expect(memory_bytes).toBeLessThan(1.15 * measured_bytes);
  }
});

test('norms behind blocks take what was measured', () => {
  // More than without them, in a step's part as a whole, of six layers that are 1024 wide.
  const measured_bytes = 55e6;
  const config = { ...TINY_CONFIG, hiddenSize: 1024, headSize: 256, ffnSize: 4096, layerCount: 6 };
  const memoryOf = (changes: Partial<ModelConfig>) =>
    planMemory({ ...config, ...changes }, 'q8', 1e12).memory_bytes;
  const more_bytes = memoryOf({ postNorms: true }) - memoryOf({});
  expect(more_bytes).toBeGreaterThan(measured_bytes);
  expect(more_bytes).toBeLessThan(1.15 * measured_bytes);
});

test('days, and memory that a machine has not, are said, with the flags that help', () => {
  const of = (time_s: number, memory_bytes = 5e9): Forecast => ({ plan: 'whole', memory_bytes, time_s });
  const smaller = [
    { flags: '--clusters 1', forecast: of(200_000) },
    { flags: '--quick', forecast: of(30_000) },
    { flags: '--quick --clusters 1', forecast: of(10_000) },
  ];
  const lines = forecastLines(of(300_000), smaller);
  expect(lines[0]).toMatch(/about 5\.0 GB of memory, and up to 3\.5 days/);
  expect(lines[1]).toBe('That takes days. With --quick it takes up to 8.3 h.');
  expect(forecastLines(of(300_000), smaller.slice(0, 1))[1]).toMatch(
    /The smallest run, --clusters 1, takes up to 2\.3/,
  );
  expect(forecastLines(of(150_000), smaller.slice(0, 1))[1]).toMatch(/there is no smaller run/);
  expect(forecastLines(of(200, 5e8), smaller)).toEqual([
    'Learning takes about 0.5 GB of memory, and up to 3 min on this machine.',
  ]);
  expect(forecastLines(of(60, 2 * totalmem()), [])[1]).toMatch(/will not fit/);
  // A container may have less than its machine.
  expect(forecastLines(of(60), [], 2e9)[1]).toBe(
    'This machine has only 2.0 GB of memory: the run will not fit.',
  );
  expect(forecastLines({ ...of(60), plan: 'layers' }, [])[0]).toMatch(/layer by layer/);
});

test('the paces are those of this machine', async () => {
  const { rounding, ...paces } = await measurePaces(1, 'pairs');
  expect(rounding).toBe('pairs');
  expect(Object.keys(paces).sort()).toEqual(['columns', 'f32', 'pairs', 'q4', 'q8', 'q8-columns']);
  for (const pace of Object.values(paces)) {
    expect(pace).toBeGreaterThan(1e8);
    expect(pace).toBeLessThan(1e14);
  }
});

test('a run that goes on is rounded as it began, and a new one as is fastest here', async () => {
  await using out = await mkdtempDisposable(join(tmpdir(), 'maskroute-forecast-'));
  expect(await roundingIn(out.path)).toBe(await fastestRounding());
  for (const [index, rounding] of ROUNDINGS.entries()) {
    const journal = await openRunJournal(join(out.path, STATE_FILE), rounding, () => {});
    await journal.set('rounding', [index]);
    expect(await roundingIn(out.path)).toBe(rounding);
  }
});

test('each form of weights counts at its own pace', () => {
  const timesAt = (paces: Paces) =>
    batchTimes(EIGHT_B, 'q8', { kind: 'whole', layersKept: 0 }, paces, LOSS_BATCH_TOKENS);
  const before = timesAt(pacesOf(1e11));
  const columns = timesAt({ ...pacesOf(1e11), columns: 7e11 });
  const blocks = timesAt({ ...pacesOf(1e11), q8: 0.7e11 });
  expect(columns.loss_s).toBeLessThan(0.75 * before.loss_s);
  expect(blocks.loss_s).toBeGreaterThan(1.2 * before.loss_s);
  expect(blocks.step_s).toBeGreaterThan(1.3 * before.step_s);
  const amx: Paces = { ...pacesOf(1e11), q8: 0.7e11, columns: 7e11, 'q8-columns': 7e11, pairs: 3e11 };
  const [inBlocks, inPairs] = [timesAt(amx), timesAt({ ...amx, rounding: 'pairs' })];
  expect(inPairs.step_s).toBeLessThan(0.6 * inBlocks.step_s);
  expect(timesAt({ ...amx, rounding: 'pairs', q8: 1e9 })).toEqual(inPairs);
  // All but the head's gradients are rows.
  const slowRows = timesAt({ ...amx, rounding: 'pairs', 'q8-columns': 0.5 * amx['q8-columns'] });
  expect(slowRows.loss_s).toBe(inPairs.loss_s);
  expect(slowRows.step_s).toBeGreaterThan(1.2 * inPairs.step_s);
  // Forward products take two codes an activation, gradients one.
  const [forward_s, both_s] = [inPairs.loss_s / LOSS_BATCH_TOKENS, inPairs.step_s / STEP_PART_TOKENS];
  expect(both_s - forward_s).toBeLessThan(0.6 * forward_s);
});

test('by column, a training step takes the time and memory of blocks; only serving takes less', () => {
  const paces = { ...pacesOf(1e11), 'q8-columns': 5e11 };
  const whole = { kind: 'whole', layersKept: 0 } as const;
  const [blocks, byColumn] = (['q8', 'q8-columns'] as const).map((kind) =>
    batchTimes(EIGHT_B, kind, whole, paces, LOSS_BATCH_TOKENS),
  );
  expect(byColumn).toEqual(blocks);
  const timeOf = (kind: WeightKind, changes: Partial<Paces> = {}) =>
    forecastLearning(EIGHT_B, kind, LEARN_EFFORT, { ...MACHINE, paces: { ...paces, ...changes } }).time_s;
  expect(timeOf('q8-columns')).toBeLessThan(timeOf('q8'));
  // Only its head has two codes an activation.
  const [slowPairs, slowRows] = [{ pairs: paces.pairs / 2 }, { 'q8-columns': paces['q8-columns'] / 2 }];
  const more = (slow: Partial<Paces>) => timeOf('q8-columns', slow) - timeOf('q8-columns');
  expect(more(slowPairs)).toBeGreaterThan(0);
  expect(more(slowRows)).toBeGreaterThan(3 * more(slowPairs));
  for (const slow of [slowPairs, slowRows]) expect(timeOf('q8', slow)).toBe(timeOf('q8'));
  const memoryOf = (kind: WeightKind) => planMemory(EIGHT_B, kind, 1e12).memory_bytes;
  expect(memoryOf('q8') - memoryOf('q8-columns')).toBeGreaterThan(0);
  expect(memoryOf('q8') - memoryOf('q8-columns')).toBeLessThan(0.25 * 1.1 * weightCounts(EIGHT_B).all);
});

describe('a model as wide as the default one', () => {
  const measured = async (home: string, { config, weights }: ModelManifest, available_bytes: number) => {
    const run = 'test/gpu-backend/learning/units/memory-run.ts';
    const args = [run, home, 'wide', String(available_bytes)];
    const { stdout } = await promisify(execFile)(process.execPath, args);
    const { numbers, peak_bytes } = JSON.parse(stdout) as {
      numbers: Record<string, number[]>;
      peak_bytes: number;
    };
    return { numbers, peak_bytes, plan: planMemory(config, weights, available_bytes) };
  };

  test('takes the memory that is said, as a whole and layer by layer, and comes to the same numbers', async () => {
    await using home = await mkdtempDisposable(join(tmpdir(), 'maskroute-forecast-'));
    // All layers and tokens of the default one take four times as long, and show the same.
    const { config } = (await installedModel()).manifest;
    const shape = { ...config, layerCount: 4, vocabularySize: 16_384 };
    const { folder, manifest } = await installTinyModel(join(home.path, 'models', 'wide'), 'q8', shape);
    await writeFile(join(folder, 'model.json'), JSON.stringify(manifest));
    const whole = await measured(home.path, manifest, 1e12);
    const layers = await measured(home.path, manifest, 1);
    expect([whole.plan.kind, layers.plan.kind]).toEqual(['whole', 'layers']);
    for (const { peak_bytes, plan } of [whole, layers]) {
      expect(peak_bytes).toBeLessThan(plan.memory_bytes);
      expect(peak_bytes).toBeGreaterThan(0.6 * plan.memory_bytes);
    }
    expect(layers.peak_bytes).toBeLessThan(whole.peak_bytes / 2);
    expect(layers.numbers).toEqual(whole.numbers);
  });
});
