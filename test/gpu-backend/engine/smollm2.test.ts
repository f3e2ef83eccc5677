/**
 * The real model against figures from PyTorch and transformers (`fixtures/make_reference.py`): SmolLM2-135M-
 * Instruct, dense and with 7 attention and 8 FFN blocks out.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { openRunner } from '../../../gpu-backend/engine/runner.ts';
import type { Runner } from '../../../gpu-backend/engine/runner-interface.ts';
import { argmax, divergence, logSumExp } from '../../../gpu-backend/logits.ts';
import { emitModel } from '../../../gpu-backend/model/emit.ts';
import { openGguf } from '../../../gpu-backend/model/formats/gguf.ts';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../../shared/mask/mask.ts';
import { installedModel, testModelFile } from '../../support/installed-model.ts';
import reference from './fixtures/reference.json' with { type: 'json' };

const { ids, skipAttention, skipFfn } = reference;
const STRETCH = 250;
const DENSE = denseMask(60);
const MASKED = maskFromSkippedLayers(60, { skipAttention, skipFfn });
/** What drifts over many positions does so under any mask: half of them do for the second. */
const CASES = [
  ['dense', DENSE, firstOf(reference.dense, 500)],
  ['masked', MASKED, firstOf(reference.masked, 250)],
] as const;

type Expected = typeof reference.dense;
function firstOf({ rows, topIds, topLogits, nll, ...rest }: Expected, positions: number): Expected {
  const count = rows.filter((position) => position < positions).length;
  const cut = <T>(values: readonly T[]) => values.slice(0, count);
  return {
    ...rest,
    rows: cut(rows),
    topIds: cut(topIds),
    topLogits: cut(topLogits),
    nll: nll.slice(0, positions / STRETCH),
  };
}

/** The model in fp32: its folder, and a runner on it. */
let exactFolder: string;
let exact: Runner;
let quantized: Runner;
beforeAll(async () => {
  exactFolder = await mkdtemp(join(tmpdir(), 'maskroute-model-'));
  const source = await openGguf(testModelFile);
  await emitModel(source, 'f32', exactFolder, () => {});
  await source.close();
  exact = await openRunner(exactFolder, source.config, { threads: 1 });
  const { folder, manifest } = await installedModel();
  quantized = await openRunner(folder, manifest.config, { threads: 1 });
}, 120_000);
afterAll(async () => {
  await exact.close();
  await quantized.close();
  await rm(exactFolder, { recursive: true });
});

/** Runs these tokens, in pieces of so many, behind what the cache has; the logits of each. */
async function feed(
  runner: Runner,
  cache: ReturnType<Runner['newCache']>,
  mask: Mask,
  tokenIds: readonly number[],
  pieces: readonly number[],
): Promise<Float32Array[]> {
  const V = runner.config.vocabularySize;
  const found: Float32Array[] = [];
  for (const piece of pieces) {
    const part = tokenIds.slice(found.length, found.length + piece);
    const plan = { mask, kv: 'preserve' } as const;
    const logits = await runner.run({ cache, tokenIds: part, plan, logitRows: part.map((_, i) => i) });
    part.forEach((_, i) => {
      found.push(logits.subarray(i * V, (i + 1) * V));
    });
  }
  return found;
}

/** A long piece, and then token by token. */
const MIXED = [STRETCH - 8, ...Array(8).fill(1)];
/** The KL of eight bits to fp32 is taken at every so many positions: a row of logits takes as long as its token. */
const COMPARED_EVERY = 4;

/** Of all positions: negative log-likelihoods by stretch, how far 8 bits are from fp32, and fp32's logits where a test needs them. */
type Pass = {
  readonly exact: readonly number[];
  readonly quantized: readonly number[];
  readonly kl: number;
  readonly agreement: number;
  readonly rows: ReadonlyMap<number, Float32Array>;
};

/** Both models side by side, a stretch at a time: the logits of all positions (400 MB) are never held at once. */
async function pass(mask: Mask, expected: Expected): Promise<Pass> {
  const kept = new Set([...expected.rows, ...HALVED_ROWS, ...ANSWER_ROWS]);
  const [ofExact, ofQuantized] = [exact.newCache(), quantized.newCache()];
  const sums = { exact: [] as number[], quantized: [] as number[] };
  const positions = STRETCH * expected.nll.length;
  const compared = expected.nll.length * Math.ceil(STRETCH / COMPARED_EVERY);
  let [kl, agreed] = [0, 0];
  const rows = new Map<number, Float32Array>();
  for (let start = 0; start < positions; start += STRETCH) {
    const part = ids.slice(start, start + STRETCH);
    const ofStretch = await feed(exact, ofExact, mask, part, [STRETCH]);
    const found = await feed(quantized, ofQuantized, mask, part, MIXED);
    sums.exact.push(likelihood(ofStretch, start));
    sums.quantized.push(likelihood(found, start));
    ofStretch.forEach((logits, i) => {
      // A copy: the others of its piece need not stay.
      if (kept.has(start + i)) rows.set(start + i, logits.slice());
      if (argmax(logits) === argmax(found[i]!)) agreed += 1 / positions;
      if (i % COMPARED_EVERY === 0) kl += divergence(logits, found[i]!, logits.length) / compared;
    });
  }
  return { ...sums, kl, agreement: agreed, rows };
}

function likelihood(logits: readonly Float32Array[], start: number): number {
  return logits.reduce((sum, row, i) => {
    const next = ids[start + i + 1];
    return next === undefined ? sum : sum + logSumExp(row) - row[next]!;
  }, 0);
}

const passes = new Map<Mask, Promise<Pass>>();
function passOf(mask: Mask, expected: Expected): Promise<Pass> {
  const known = passes.get(mask) ?? pass(mask, expected);
  passes.set(mask, known);
  return known;
}

/** Where K and V in half precision are held against fp32. */
const HALVED_TOKENS = 150;
const HALVED_ROWS = Array.from({ length: HALVED_TOKENS / 5 }, (_, i) => 5 * i + 4);

/** Where tokens one by one are held against a piece. */
const [ANSWER_START, ANSWER_END] = [80, 96];
const ANSWER_ROWS = Array.from({ length: ANSWER_END - ANSWER_START }, (_, i) => ANSWER_START + i);

describe('fp32 equals transformers', () => {
  test.each(CASES)(
    '%s: top logits within 1e-3, and the likelihood of every stretch',
    async (_name, mask, expected) => {
      const { exact: found, rows } = await passOf(mask, expected);
      let worst = 0;
      expected.rows.forEach((position, row) => {
        const logits = rows.get(position)!;
        expected.topIds[row]!.forEach((id, i) => {
          worst = Math.max(worst, Math.abs(logits[id]! - expected.topLogits[row]![i]!));
        });
        expect(argmax(logits)).toBe(expected.topIds[row]![0]);
      });
      expect(worst).toBeLessThan(1e-3);
      found.forEach((nll, i) => {
        expect(Math.abs(nll / expected.nll[i]! - 1)).toBeLessThan(1e-4);
      });
    },
    120_000,
  );
});

test.each(CASES)(
  '%s: tokens of an answer, attended head by head, have the logits of a piece within 1e-3',
  async (_name, mask, reference) => {
    const { rows } = await passOf(mask, reference);
    const pieces = [ANSWER_START, ...ANSWER_ROWS.map(() => 1)];
    const mixed = await feed(exact, exact.newCache(), mask, ids.slice(0, ANSWER_END), pieces);
    let worst = 0;
    for (const position of ANSWER_ROWS) {
      const [expected, found] = [rows.get(position)!, mixed[position]!];
      found.forEach((value, id) => {
        worst = Math.max(worst, Math.abs(value - expected[id]!));
      });
      expect(argmax(found)).toBe(argmax(expected));
    }
    expect(worst).toBeLessThan(1e-3);
  },
  60_000,
);

describe('8 bits', () => {
  test.each(CASES)(
    '%s, in pieces and token by token: no drift, every stretch within 0.01 of transformers',
    async (_name, mask, expected) => {
      const { quantized: found } = await passOf(mask, expected);
      expect(found).toHaveLength(expected.nll.length);
      found.forEach((nll, i) => {
        expect(Math.abs(nll / expected.nll[i]! - 1)).toBeLessThan(0.01);
      });
    },
    120_000,
  );

  test.each([
    [...CASES[0], 0.97],
    [...CASES[1], 0.93],
  ] as const)(
    '%s, real text: mean KL to fp32 under 0.01, and mostly the same likeliest token',
    async (_name, mask, expected, least) => {
      const { kl, agreement } = await passOf(mask, expected);
      expect(kl).toBeLessThan(0.01);
      expect(agreement).toBeGreaterThan(least);
    },
    120_000,
  );
});

describe('K and V in half precision', () => {
  let halved: Runner;
  beforeAll(async () => {
    halved = await openRunner(exactFolder, exact.config, { threads: 1, kvType: 'f16' });
  }, 60_000);
  afterAll(() => halved.close());

  test.each(CASES)(
    '%s: logits over 150 positions of real text are within 0.05 of fp32',
    async (_name, mask, reference) => {
      const { rows } = await passOf(mask, reference);
      const part = ids.slice(0, HALVED_TOKENS);
      const found = await feed(halved, halved.newCache(), mask, part, [100, 50]);
      let [worst, kl, agreed] = [0, 0, 0];
      for (const position of HALVED_ROWS) {
        const [row, logits] = [rows.get(position)!, found[position]!];
        row.forEach((value, id) => {
          worst = Math.max(worst, Math.abs(value - logits[id]!));
        });
        kl += divergence(row, logits, row.length) / HALVED_ROWS.length;
        if (argmax(row) === argmax(logits)) agreed += 1 / HALVED_ROWS.length;
      }
      expect(worst).toBeLessThan(0.05);
      expect(kl).toBeLessThan(1e-5);
      expect(agreed).toBeGreaterThan(0.98);
    },
    60_000,
  );

  test('greedy answers to beginnings of real texts are the same', async () => {
    for (const [from, to] of [
      [0, 40],
      [300, 360],
    ]) {
      const answers = [exact, halved].map((runner) => greedy(runner, ids.slice(from, to), 6));
      expect(await answers[1]).toEqual(await answers[0]);
    }
  }, 60_000);
});

async function greedy(runner: Runner, prompt: readonly number[], count: number): Promise<number[]> {
  const cache = runner.newCache();
  const answer: number[] = [];
  let tokenIds = prompt;
  while (answer.length < count) {
    const logitRows = [tokenIds.length - 1];
    const plan = { mask: DENSE, kv: 'preserve' } as const;
    answer.push(argmax(await runner.run({ cache, tokenIds, plan, logitRows })));
    tokenIds = answer.slice(-1);
  }
  return answer;
}
