/**
 * The real model against figures from PyTorch and transformers (`fixtures/make_reference.py`): SmolLM2-135M-
 * Instruct, dense and with 7 attention and 8 FFN blocks out.
 */
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Runner } from '../../../gpu-backend/engine/runner.ts';
import { openRunner } from '../../../gpu-backend/engine/runner.ts';
import { argmax, divergence, logSumExp } from '../../../gpu-backend/logits.ts';
import { emitModel } from '../../../gpu-backend/model/emit.ts';
import { openGguf } from '../../../gpu-backend/model/formats/gguf.ts';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../../shared/mask/mask.ts';
import { installedModel, testModelFile } from '../../support/installed-model.ts';
import reference from './fixtures/reference.json' with { type: 'json' };

const { ids, skipAttention, skipFfn } = reference;
const DENSE = denseMask(60);
const MASKED = maskFromSkippedLayers(60, { skipAttention, skipFfn });
const CASES = [
  ['dense', DENSE, reference.dense],
  ['masked', MASKED, reference.masked],
] as const;

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

/** How many tokens a run takes that begins at this position. */
type Pieces = (start: number) => number;
const ofEach =
  (count: number): Pieces =>
  () =>
    count;

/** Calls `see` with the logits of every position. */
async function feed(
  runner: Runner,
  tokenIds: number[],
  mask: Mask,
  pieces: Pieces,
  see: (logits: Float32Array, position: number) => void,
) {
  const V = runner.config.vocabularySize;
  const cache = runner.newCache();
  for (let start = 0; start < tokenIds.length; start += pieces(start)) {
    const part = tokenIds.slice(start, start + pieces(start));
    const plan = { mask, kv: 'preserve' } as const;
    const logits = await runner.run({ cache, tokenIds: part, plan, logitRows: part.map((_, i) => i) });
    part.forEach((_, i) => {
      see(logits.subarray(i * V, (i + 1) * V), start + i);
    });
  }
}

const STRETCH = 250;

/** Negative log-likelihood of each stretch of predictions. */
async function windows(
  runner: Runner,
  mask: Mask,
  pieces: Pieces,
  see: (logits: Float32Array, position: number) => void = () => {},
): Promise<number[]> {
  const sums = [0, 0, 0, 0];
  await feed(runner, ids, mask, pieces, (logits, position) => {
    see(logits, position);
    const next = ids[position + 1];
    if (next !== undefined) sums[Math.floor(position / STRETCH)]! += logSumExp(logits) - logits[next]!;
  });
  return sums;
}

describe('fp32 equals transformers', () => {
  test.each(CASES)(
    '%s: top logits within 1e-3 over 1,000 positions, and the likelihood of every stretch',
    async (_name, mask, expected) => {
      let worst = 0;
      const found = await windows(exact, mask, ofEach(128), (logits, position) => {
        const row = expected.rows.indexOf(position);
        expected.topIds[row]?.forEach((id, i) => {
          worst = Math.max(worst, Math.abs(logits[id]! - expected.topLogits[row]![i]!));
        });
        if (row >= 0) expect(argmax(logits)).toBe(expected.topIds[row]![0]);
      });
      expect(worst).toBeLessThan(1e-3);
      found.forEach((nll, i) => {
        expect(Math.abs(nll / expected.nll[i]! - 1)).toBeLessThan(1e-4);
      });
    },
    60_000,
  );
});

test.each(CASES)(
  '%s: tokens of an answer, attended head by head, have the logits of a piece within 1e-3',
  async (_name, mask) => {
    const expected: Float32Array[] = [];
    await feed(exact, ids.slice(0, 190), mask, ofEach(190), (logits, position) => {
      if (position >= 150) expected.push(logits.slice());
    });
    let worst = 0;
    await feed(
      exact,
      ids.slice(0, 190),
      mask,
      (start) => (start === 0 ? 150 : 1),
      (logits, position) => {
        if (position < 150) return;
        const row = expected[position - 150]!;
        row.forEach((value, id) => {
          worst = Math.max(worst, Math.abs(value - logits[id]!));
        });
        expect(argmax(logits)).toBe(argmax(row));
      },
    );
    expect(worst).toBeLessThan(1e-3);
  },
  60_000,
);

/** Of each stretch; the others come one by one. */
const PIECE_TOKENS = 150;

describe('8 bits', () => {
  test.each(CASES)(
    '%s, in pieces and token by token over 1,000 positions: no drift, every stretch within 0.01 of transformers',
    async (_name, mask, expected) => {
      const found = await windows(quantized, mask, (start) => (start % STRETCH === 0 ? PIECE_TOKENS : 1));
      found.forEach((nll, i) => {
        expect(Math.abs(nll / expected.nll[i]! - 1)).toBeLessThan(0.01);
      });
    },
    120_000,
  );

  test('2,000 positions of real text: mean KL to fp32 under 0.01, top-1 agreement over 97 %', async () => {
    const { openModelText } = await import('../../../gpu-backend/model/tokenizer/model-text.ts');
    const installed = await installedModel();
    const { tokenizer } = await openModelText(installed.folder, installed.manifest);
    const text = await readFile(
      new URL('../../../node_modules/commander/Readme.md', import.meta.url),
      'utf8',
    );
    const tokenIds = [...tokenizer.encode(text)].slice(0, 2000);
    const figures = await compare(tokenIds, DENSE);
    expect(tokenIds.length).toBe(2000);
    expect(figures.kl).toBeLessThan(0.01);
    expect(figures.agreement).toBeGreaterThan(0.97);
  }, 120_000);
});

describe('K and V in half precision', () => {
  let halved: Runner;
  beforeAll(async () => {
    halved = await openRunner(exactFolder, exact.config, { threads: 1, kvType: 'f16' });
  }, 60_000);
  afterAll(() => halved.close());

  test.each(CASES)(
    '%s: logits over 300 positions of real text are within 0.05 of fp32',
    async (_name, mask) => {
      const expected: Float32Array[] = [];
      await feed(exact, ids.slice(0, 300), mask, ofEach(150), (logits, position) => {
        if (position % 5 === 4) expected.push(logits.slice());
      });
      let [worst, kl, agreed] = [0, 0, 0];
      await feed(halved, ids.slice(0, 300), mask, ofEach(150), (logits, position) => {
        if (position % 5 !== 4) return;
        const row = expected[(position - 4) / 5]!;
        row.forEach((value, id) => {
          worst = Math.max(worst, Math.abs(value - logits[id]!));
        });
        kl += divergence(row, logits, row.length) / 60;
        if (argmax(row) === argmax(logits)) agreed += 1 / 60;
      });
      expect(worst).toBeLessThan(0.05);
      expect(kl).toBeLessThan(1e-5);
      expect(agreed).toBeGreaterThan(0.98);
    },
    60_000,
  );

  test('greedy answers to beginnings of real texts are the same', async () => {
    for (const [from, to] of [
      [0, 40],
      [300, 420],
    ]) {
      const answers = [exact, halved].map((runner) => greedy(runner, ids.slice(from, to), 12));
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

async function compare(tokenIds: number[], mask: Mask): Promise<{ kl: number; agreement: number }> {
  const expected: Float32Array[] = [];
  let kl = 0;
  let agreed = 0;
  // By stretches, so that logits of 2,000 positions (400 MB) are never held at once.
  for (let start = 0; start < tokenIds.length; start += STRETCH) {
    const part = tokenIds.slice(start, start + STRETCH);
    expected.length = 0;
    await feed(exact, part, mask, ofEach(STRETCH), (logits) => expected.push(logits.slice()));
    await feed(quantized, part, mask, ofEach(STRETCH), (logits, i) => {
      kl += divergence(expected[i]!, logits, logits.length);
      if (argmax(expected[i]!) === argmax(logits)) agreed++;
    });
  }
  return { kl: kl / tokenIds.length, agreement: agreed / tokenIds.length };
}
