/**
 * Training steps with surrogates on a small random model: loss against plain loops, gradients by gates and by tables
 * against finite differences, what is skipped, and what a step of descent moves.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { GateBatch } from '../../../../gpu-backend/learning/gates/batches.ts';
import { nextTokenBatch } from '../../../../gpu-backend/learning/gates/batches.ts';
import type { GateSession, LossSession } from '../../../../gpu-backend/learning/gates/gate-session.ts';
import { openGateSession, openLossSession } from '../../../../gpu-backend/learning/gates/gate-session.ts';
import { openTeacher } from '../../../../gpu-backend/learning/gates/teacher.ts';
import type { SurrogateSession } from '../../../../gpu-backend/learning/surrogates/distill-surrogates.ts';
import {
  descend,
  openSurrogateSession,
  startDescent,
} from '../../../../gpu-backend/learning/surrogates/distill-surrogates.ts';
import type { SurrogateTable } from '../../../../gpu-backend/model/surrogates.ts';
import { SURROGATE_PARTS } from '../../../../gpu-backend/model/surrogates.ts';
import { naiveLlama } from '../../../support/naive-llama.ts';
import {
  emitFromMemory,
  RANDOM_TABLE_ID,
  randomLlama,
  randomSurrogates,
} from '../../../support/random-llama.ts';

const source = randomLlama({ tiedEmbeddings: false });
const { config } = source;
const table = randomSurrogates(config, 32);
const TOKENS = Array.from({ length: 48 }, (_, i) => (i * 131 + 17) % config.vocabularySize);
const RUNS = [1, 0, 0, 1, 1, 0, 1, 1];
const batch = nextTokenBatch(TOKENS, 2);
/** One target everywhere makes gradients that do not cancel. */
const oneTarget = { ...batch, targetIds: Array.from(batch.targetIds, () => 7) };

let folder: string;
let gates: GateSession;
let losses: LossSession;
let tails: LossSession;
let surrogates: SurrogateSession;
let taught: GateBatch & { entropy: number };
/** What the loss sessions read: a copy, changed in place by finite differences. */
const live: SurrogateTable = {
  ...table,
  a: table.a.slice(),
  b: table.b.slice(),
  bias: table.bias.slice(),
  first: table.first.slice(),
};

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-surrogates-'));
  await emitFromMemory(source, 'f32', folder, () => {});
  const options = { threads: 1, surrogates: live };
  gates = await openGateSession(folder, config, options);
  losses = await openLossSession(folder, config, options);
  tails = await openLossSession(folder, config, { ...options, tail: true });
  surrogates = await openSurrogateSession(folder, config, { rank: 32, threads: 1 });
  const teacher = await openTeacher(folder, config, { threads: 1 });
  taught = await teacher.teach(batch);
  await teacher.close();
}, 60_000);
afterAll(async () => {
  await Promise.all([gates, losses, tails, surrogates].map((session) => session.close()));
  await rm(folder, { recursive: true });
});

const dot = (a: ArrayLike<number>, b: ArrayLike<number>) =>
  Array.from(a).reduce((sum, x, i) => sum + x * b[i]!, 0);
const cosine = (a: ArrayLike<number>, b: ArrayLike<number>) => dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));

test('loss: the naive one, forward only and with gradients', async () => {
  let sum = 0;
  for (const start of [0, 24]) {
    const naive = await naiveLlama(source, table);
    for (let i = start; i < start + 23; i++) {
      const logits = naive.next(TOKENS[i]!, { runs: Uint8Array.from(RUNS), surrogates: RANDOM_TABLE_ID });
      const most = Math.max(...logits);
      const logSum = most + Math.log(logits.reduce((total, value) => total + Math.exp(value - most), 0));
      sum += logSum - logits[TOKENS[i + 1]!]!;
    }
  }
  expect(await losses.loss(batch, RUNS)).toBeCloseTo(sum / 46, 4);
  expect((await gates.step(batch, RUNS)).loss).toBeCloseTo(sum / 46, 4);
});

test('gate gradients: finite differences of h + z·block(h) + (1−z)·surrogate(h)', async () => {
  const at = [...Array(8).keys()].map((i) => 0.3 + 0.07 * i);
  const { gradients } = await gates.step(oneTarget, at);
  const differences: number[] = [];
  for (const i of at.keys()) {
    const lossAt = (shift: number) =>
      losses.loss(
        oneTarget,
        at.map((z, j) => (j === i ? z + shift : z)),
      );
    differences.push(((await lossAt(0.01)) - (await lossAt(-0.01))) / 0.02);
  }
  expect(cosine(gradients, differences)).toBeGreaterThan(0.9995);
});

test('a gate at 0 has no derivative, and its surrogate still counts', async () => {
  const { gradients } = await gates.step(batch, RUNS);
  expect(RUNS.flatMap((z, i) => (z === 0 ? [gradients[i]] : []))).toEqual([0, 0, 0]);
  live.bias.fill(3);
  expect(await losses.loss(batch, RUNS)).not.toBeCloseTo((await gates.step(batch, Array(8).fill(1))).loss, 2);
  live.bias.set(table.bias);
});

test.each(SURROGATE_PARTS)('gradients by %s: finite differences, with a teacher’s tail', async (part) => {
  const { gradients } = await surrogates.step(taught, RUNS, table);
  const width = table[part].length / 8;
  const [found, differences]: [number[], number[]] = [[], []];
  for (const block of [1, 2, 5]) {
    const values = live[part].subarray(block * width, (block + 1) * width);
    const gradient = gradients[part].subarray(block * width, (block + 1) * width);
    // Along the gradient, and along every third number alone.
    for (const direction of [Array.from(gradient), Array.from(gradient, (_, i) => (i % 3 === 0 ? 1 : 0))]) {
      const size = Math.sqrt(dot(direction, direction));
      const h = 0.02;
      const start = values.slice();
      const lossAt = async (shift: number) => {
        for (let i = 0; i < width; i++) values[i] = start[i]! + (shift * direction[i]!) / size;
        return tails.loss(taught, RUNS);
      };
      differences.push(((await lossAt(h)) - (await lossAt(-h))) / (2 * h));
      found.push(dot(gradient, direction) / size);
      values.set(start);
    }
  }
  expect(cosine(found, differences)).toBeGreaterThan(0.999);
  expect(dot(found, found) / dot(found, differences)).toBeCloseTo(1, 1);
});

test('blocks that run have no gradient', async () => {
  const { gradients } = await surrogates.step(taught, RUNS, table);
  for (const part of SURROGATE_PARTS) {
    const width = table[part].length / 8;
    RUNS.forEach((runs, block) => {
      const moves = gradients[part].subarray(block * width, (block + 1) * width).some((value) => value !== 0);
      expect(moves).toBe(runs === 0);
    });
  }
});

test('the dense model is at a distance of 0 from what it taught', async () => {
  expect((await tails.loss(taught, Array(8).fill(1))) - taught.entropy).toBeCloseTo(0, 4);
});

test('descending lowers the loss, moves skipped blocks alone, and its mean follows', async () => {
  const descent = startDescent(table);
  const before = (await surrogates.step(taught, RUNS, table)).loss;
  for (let step = 0; step < 8; step++) {
    const { gradients } = await surrogates.step(taught, RUNS, descent.table);
    descend(descent, gradients, RUNS, 0.02);
  }
  const after = (await surrogates.step(taught, RUNS, descent.table)).loss;
  expect(after).toBeLessThan(before - 0.01);
  const average = (await surrogates.step(taught, RUNS, descent.average)).loss;
  expect(average).toBeLessThan(before);
  const width = table.a.length / 8;
  expect(descent.table.a.subarray(0, width)).toEqual(table.a.subarray(0, width));
  expect([...descent.moves]).toEqual(RUNS.map((runs) => (runs === 0 ? 8 : 0)));
});
