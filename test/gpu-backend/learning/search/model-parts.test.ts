/** What masks are searched by, on a small random model: how far they are from the dense model, no more and no less. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { nextTokenBatch } from '../../../../gpu-backend/learning/gates/batches.ts';
import { openRunJournal } from '../../../../gpu-backend/learning/journal.ts';
import { openModelParts } from '../../../../gpu-backend/learning/search/model-parts.ts';
import { naiveLlama } from '../../../support/naive-llama.ts';
import { randomLlama } from '../../../support/random-llama.ts';
import { installTinyModel } from '../../../support/tiny-model.ts';

const TOKENS = Array.from({ length: 40 }, (_, i) => (i * 131 + 17) % 250);
const DENSE = Array(8).fill(1);
const RUNS = [1, 0, 0, 1, 1, 0, 1, 1];

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-parts-'));
});
afterAll(() => rm(folder, { recursive: true }));

/** Mean over positions of the KL between the two models' whole distributions. */
async function naiveKl(): Promise<number> {
  const source = randomLlama({ tiedEmbeddings: false });
  const [dense, masked] = [await naiveLlama(source), await naiveLlama(source)];
  let sum = 0;
  for (const token of TOKENS.slice(0, -1)) {
    const p = logSoftmax(dense.next(token, { runs: Uint8Array.from(DENSE) }));
    const q = logSoftmax(masked.next(token, { runs: Uint8Array.from(RUNS) }));
    sum += p.reduce((kl, logP, i) => kl + Math.exp(logP) * (logP - q[i]!), 0);
  }
  return sum / (TOKENS.length - 1);
}

function logSoftmax(logits: ArrayLike<number>): number[] {
  const values = Array.from(logits);
  const most = Math.max(...values);
  const logSum = most + Math.log(values.reduce((sum, value) => sum + Math.exp(value - most), 0));
  return values.map((value) => value - logSum);
}

it('against the dense model, what the likeliest tokens leave to all others counts too', async () => {
  const model = await installTinyModel(join(folder, 'model'), 'f32');
  const journal = await openRunJournal(join(folder, 'state.jsonl'), 'key');
  await using parts = await openModelParts(model, undefined, { threads: 1, targets: 'dense' }, journal);
  const batch = await parts.teacher.teach(nextTokenBatch(TOKENS, 1));
  expect((await parts.loss(batch, DENSE)) - batch.entropy).toBeCloseTo(0, 4);
  const kl = (await parts.loss(batch, RUNS)) - batch.entropy;
  const whole = await naiveKl();
  expect(kl).toBeLessThanOrEqual(whole + 1e-5);
  expect(kl).toBeGreaterThan(0.5 * whole);
  expect((await parts.step(batch, RUNS)).loss).toBeCloseTo(kl + batch.entropy, 4);
});
