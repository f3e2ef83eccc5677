/** Learning one mask, on a small random model: it starts at the target, is the same after any interruption, and helps. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { emitModel } from '../../../gpu-backend/model/emit.ts';
import { lowestSkipped, searchSwaps } from '../../../gpu-backend/training/binary-mask.ts';
import type { GateSession } from '../../../gpu-backend/training/gate-session.ts';
import { nextTokenBatch, openGateSession } from '../../../gpu-backend/training/gate-session.ts';
import { expectedSparsity, normalizedWeights } from '../../../gpu-backend/training/lagrangian.ts';
import type { TrainingOptions } from '../../../gpu-backend/training/train-mask.ts';
import { startState, trainMask } from '../../../gpu-backend/training/train-mask.ts';
import { loadCheckpoint, storeCheckpoint } from '../../../gpu-backend/training/training-state.ts';
import type { Mask } from '../../../shared/mask.ts';
import { randomLlama } from '../../support/random-llama.ts';

const BLOCKS = 8;
const flat = Array<number>(BLOCKS).fill(1);
let folder: string;
let session: GateSession;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-train-'));
  const source = randomLlama({ tiedEmbeddings: false });
  await emitModel(source, 'f32', folder, () => {});
  session = await openGateSession(folder, source.config, 'f32', { threads: 1 });
});
afterAll(async () => {
  await session.close();
  await rm(folder, { recursive: true });
});

/** Two parts of one sequence; all predict one token, so that some blocks help and others harm. */
const part = (step: number, offset: number) => {
  const batch = nextTokenBatch(
    Array.from({ length: 24 }, (_, i) => (step * 48 + offset * 24 + i * 5) % 320),
    1,
  );
  return { ...batch, targetIds: Array.from(batch.targetIds, () => 7) };
};
const fixed = [part(0, 0), part(0, 1)];
const options = (changes: Partial<TrainingOptions> = {}): TrainingOptions => ({
  session,
  importance: flat,
  blockWeights: flat,
  targetSparsity: 0.25,
  steps: 12,
  seed: 5,
  batches: (step) => [part(step, 0), part(step, 1)],
  ...changes,
});

const lossOf = async ({ runs }: Mask): Promise<number> => {
  const losses = await Promise.all(fixed.map((batch) => session.step(batch, runs)));
  return losses.reduce((sum, { loss }) => sum + loss, 0) / losses.length;
};

test.each([
  ['blocks', flat],
  ['cost', [1, 4, 1, 4, 1, 4, 1, 4]],
])('the expected sparsity, weighted by %s, is the target before the first step', (_name, blockWeights) => {
  const importance = [3, 1, 4, 1, 5, 9, 2, 6];
  const { logAlphas } = startState(options({ blockWeights, importance }));
  expect(expectedSparsity(logAlphas, normalizedWeights(blockWeights))).toBeCloseTo(0.25, 6);
  expect(logAlphas.indexOf(Math.max(...logAlphas))).toBe(5);
});

test('the same seed gives the same run, another seed another', async () => {
  const first = await trainMask(options());
  expect(await trainMask(options())).toEqual(first);
  expect((await trainMask(options({ seed: 6 }))).logAlphas).not.toEqual(first.logAlphas);
});

test('stopped at any step and taken up from its file, a run ends as one that was not', async () => {
  const whole = await trainMask(options());
  const path = join(folder, 'checkpoint.json');
  for (const stopAfter of [1, 5, 11]) {
    await rm(path, { force: true });
    const controller = new AbortController();
    const interrupted = options({
      signal: controller.signal,
      onStep: async (state) => {
        await storeCheckpoint(path, 'key', state);
        if (state.step === stopAfter) controller.abort();
      },
    });
    await expect(trainMask(interrupted)).rejects.toThrow(/abort/);
    const state = await loadCheckpoint(path, 'key');
    expect(state!.step).toBe(stopAfter);
    expect(JSON.stringify(await trainMask(options(), state))).toBe(JSON.stringify(whole));
  }
});

test('a checkpoint of another run, or a damaged one, is not taken up', async () => {
  const path = join(folder, 'other.json');
  await storeCheckpoint(path, 'key', startState(options()));
  expect(await loadCheckpoint(path, 'another key')).toBeUndefined();
  await writeFile(path, '{"key":"key","state":{"step":3');
  expect(await loadCheckpoint(path, 'key')).toBeUndefined();
});

test('learning beats the ranking that it started from, and stays near the target', async () => {
  // Blocks that the loss would gladly do without are ranked as the most important.
  const { gradients } = await session.step(fixed[0]!, flat);
  const importance = [...gradients];
  const train = options({ importance, steps: 120, batches: () => fixed, gateLearningRate: 0.1 });
  const before = await lossOf(lowestSkipped(startState(train).logAlphas, 2));
  const { logAlphas, history } = await trainMask(train);
  const after = await lossOf(lowestSkipped(logAlphas, 2));
  expect(after).toBeLessThan(before - 0.05);
  expect(Math.abs(history.at(-1)!.expectedSparsity - 0.25)).toBeLessThan(0.1);
});

describe('swaps', () => {
  test('find the best pair of all when there is room to try', async () => {
    const logAlphas = [...Array(BLOCKS).keys()];
    let best = Number.POSITIVE_INFINITY;
    for (let a = 0; a < BLOCKS; a++) {
      for (let b = a + 1; b < BLOCKS; b++) {
        const runs = Uint8Array.from(flat, (_, i) => (i === a || i === b ? 0 : 1));
        best = Math.min(best, await lossOf({ runs }));
      }
    }
    const found = await searchSwaps(lowestSkipped(logAlphas, 2), {
      cost: lossOf,
      logAlphas,
      evaluationsMax: 100,
    });
    expect(found.cost).toBeLessThanOrEqual(found.startCost);
    expect(found.cost).toBe(await lossOf(found.mask));
    expect(found.mask.runs.filter((runs) => runs === 0)).toHaveLength(2);
    expect(found.cost).toBeCloseTo(best, 6);
  });

  test('stop when the evaluations are spent', async () => {
    let calls = 0;
    const cost = async () => -calls++;
    const logAlphas = [...Array(BLOCKS).keys()];
    const found = await searchSwaps(lowestSkipped(logAlphas, 3), { cost, logAlphas, evaluationsMax: 7 });
    expect([calls, found.evaluations]).toEqual([7, 7]);
  });

  test('more blocks than there are cannot be skipped', () => {
    expect(() => lowestSkipped([1, 2], 3)).toThrow(RangeError);
  });
});
