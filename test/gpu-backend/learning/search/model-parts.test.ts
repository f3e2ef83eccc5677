/** What masks are searched by, on a small random model: how far they are from the dense model, no more and no less. */
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { batchSamples } from '../../../../gpu-backend/learning/gates/batches.ts';
import { openTeacher } from '../../../../gpu-backend/learning/gates/teacher.ts';
import { openRunJournal, type RunJournal } from '../../../../gpu-backend/learning/journal.ts';
import { openModelParts } from '../../../../gpu-backend/learning/search/model-parts.ts';
import { openLocalUnits } from '../../../../gpu-backend/learning/units/unit-computer.ts';
import type { InstalledModel } from '../../../../gpu-backend/model/store.ts';
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

async function openParts(model: InstalledModel, journal: RunJournal) {
  const asked = { model, surrogates: undefined, threads: 1 };
  const units = await openLocalUnits({ ...asked, rounding: 'blocks', signal: undefined });
  return {
    parts: await openModelParts({ ...asked, targets: 'dense' }, units, journal),
    [Symbol.asyncDispose]: () => units[Symbol.asyncDispose](),
  };
}

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
  const journal = await openRunJournal(join(folder, 'state.jsonl'), 'key', () => {});
  await using opened = await openParts(model, journal);
  const { parts } = opened;
  const [batch] = batchSamples([{ tokenIds: Int32Array.from(TOKENS), scoreFrom: 0 }], TOKENS.length);
  const teacher = await openTeacher(model.folder, model.manifest.config, { threads: 1 });
  const { entropy } = await teacher.teach(batch!);
  await teacher.close();
  expect((await parts.loss(batch!, DENSE)) - entropy).toBeCloseTo(0, 4);
  const kl = (await parts.loss(batch!, RUNS)) - entropy;
  const whole = await naiveKl();
  expect(kl).toBeLessThanOrEqual(whole + 1e-5);
  expect(kl).toBeGreaterThan(0.5 * whole);
  expect((await parts.step(batch!, RUNS)).loss).toBeCloseTo(kl + entropy, 4);
});

it('blocks are timed after as many tokens as are asked for, and no more than the model has room for', async () => {
  const model = await installTinyModel(join(folder, 'timed'), 'f32', { contextTokens: 400 });
  const journal = await openRunJournal(join(folder, 'times.jsonl'), 'key', () => {});
  await using opened = await openParts(model, journal);
  const timed = (context: number) => opened.parts.budget({ sparsity: 0.25, cost: 'time', context });
  await expect(timed(390)).rejects.toMatchObject({ code: 'invalid_argument' });
  // Longer than the piece that the cache is filled with at a time.
  const { blockWeights } = await timed(300);
  expect(Math.min(...blockWeights)).toBeGreaterThan(0);
}, 60_000);

it('a sample is scored once under each mask, whatever else is asked with it', async () => {
  const model = await installTinyModel(join(folder, 'scored'), 'f32');
  const path = join(folder, 'scores.jsonl');
  const lines = async () => (await readFile(path, 'utf8')).trim().split('\n').length;
  const sample = { tokenIds: Int32Array.from(TOKENS), scoreFrom: 0 };
  const [dense, mask] = [DENSE, RUNS].map((runs) => ({ runs: Uint8Array.from(runs) }));
  const open = async () => openParts(model, await openRunJournal(path, 'key', () => {}));
  await using first = await open();
  const { parts } = first;
  const [masked] = await parts.score(sample, [mask!]);
  expect(masked!.kl / masked!.positions).toBeCloseTo(await naiveKl(), 4);
  expect(await lines()).toBe(2);
  const both = await parts.score(sample, [mask!, dense!]);
  expect(both).toEqual([masked, { ...both[1]!, kl: 0, klEven: 0, equalTops: 39, positions: 39 }]);
  expect(await lines()).toBe(3);
  await using again = await open();
  expect(await again.parts.score(sample, [dense!, mask!])).toEqual([both[1], masked]);
  expect(await lines()).toBe(3);
}, 60_000);
