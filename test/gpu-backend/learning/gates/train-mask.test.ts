/** Learning one mask, on a small random model: it starts at the target, is the same every time, and helps. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { nextTokenBatch } from '../../../../gpu-backend/learning/gates/batches.ts';
import type { GateSession } from '../../../../gpu-backend/learning/gates/gate-session.ts';
import { openGateSession } from '../../../../gpu-backend/learning/gates/gate-session.ts';
import { expectedSparsity, normalizedWeights } from '../../../../gpu-backend/learning/gates/hard-concrete.ts';
import type { TrainingOptions } from '../../../../gpu-backend/learning/gates/train-mask.ts';
import { startState, trainMask } from '../../../../gpu-backend/learning/gates/train-mask.ts';
import { createBudget, masksByScore } from '../../../../gpu-backend/learning/search/budget.ts';
import type { Mask } from '../../../../shared/mask/mask.ts';
import { emitFromMemory, randomLlama } from '../../../support/random-llama.ts';

const BLOCKS = 8;
const flat = Array<number>(BLOCKS).fill(1);
let folder: string;
let session: GateSession;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-train-'));
  const source = randomLlama({ tiedEmbeddings: false });
  await emitFromMemory(source, 'f32', folder, () => {});
  session = await openGateSession(folder, source.config, { threads: 1 });
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
  importance: flat,
  blockWeights: flat,
  targetSparsity: 0.25,
  steps: 12,
  seed: 5,
  parts: 2,
  sample: (step, index, gates) => session.step(part(step, index), gates),
  signal: undefined,
  ...changes,
});

const everyCount = { min: 0, max: BLOCKS / 2 };
const budget = createBudget({
  layerCount: BLOCKS / 2,
  targetSparsity: 0.25,
  weights: { attention: 1, ffn: 1 },
  attention: everyCount,
  ffn: everyCount,
});
const lowest = (scores: readonly number[]): Mask => masksByScore(scores, budget, 1)[0]!;

const lossOf = async ({ runs }: Mask): Promise<number> => {
  const losses = await Promise.all(fixed.map((batch) => session.step(batch, runs)));
  return losses.reduce((sum, { loss }) => sum + loss, 0) / losses.length;
};

test('a unit of sparsity costs from the first step what the last block to go is worth by its weight', () => {
  const importance = [3, 1, 4, 1.5, 5, 9, 2, 6];
  expect(startState(options({ importance })).multipliers).toEqual([-12, 0]);
  const paid = startState(options({ importance, blockWeights: [1, 3, 1, 3, 1, 3, 1, 3] }));
  expect(paid.multipliers[0]).toBeCloseTo(-8, 12);
  expect(startState(options({ importance: importance.map((worth) => -worth) })).multipliers[0]).toBeCloseTo(
    0,
    12,
  );
});

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

test('learning beats the ranking that it started from, and stays near the target', async () => {
  // Blocks that the loss would gladly do without are ranked as the most important.
  const { gradients } = await session.step(fixed[0]!, flat);
  const importance = [...gradients];
  const train = options({
    importance,
    steps: 120,
    sample: (_, index, gates) => session.step(fixed[index]!, gates),
  });
  const before = await lossOf(lowest(startState(train).logAlphas));
  const { logAlphas, history } = await trainMask(train);
  const after = await lossOf(lowest(logAlphas));
  expect(after).toBeLessThan(before - 0.05);
  expect(Math.abs(history.at(-1)!.expectedSparsity - 0.25)).toBeLessThan(0.1);
});
