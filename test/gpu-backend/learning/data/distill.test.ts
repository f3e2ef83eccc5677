/** Distillation on a little real text, which does not grow. */
import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import type { SentenceEncoder } from '../../../../gpu-backend/encoder/sentence-encoder.ts';
import { finish } from '../../../../gpu-backend/event-loop.ts';
import { distill, quantiseVectors } from '../../../../gpu-backend/learning/data/distill.ts';
import {
  type FitOptions,
  type FitTexts,
  fitVectors,
  principalAxes,
  project,
} from '../../../../gpu-backend/learning/data/fit-vectors.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { normalise } from '../../../../shared/embedding/encoder.ts';
import { loadStaticEncoder } from '../../../../shared/embedding/static-encoder.ts';
import { loadWordPiece } from '../../../../shared/embedding/wordpiece.ts';
import { openTestTeacher, TEACHER_TIMEOUT_ms } from '../../../support/teacher.ts';

const dot = (a: Float32Array, b: Float32Array) => a.reduce((sum, value, i) => sum + value * b[i]!, 0);
const FIT: FitOptions = {
  dimensions: 8,
  epochs: 40,
  learningRate: 0.02,
  batchTexts: 16,
  seed: 1,
  tokenDropout: 0,
};

/** Texts whose targets are sums of hidden token vectors: a fit can be perfect. */
function plantedTexts(vocabularySize: number, count: number): FitTexts {
  const random = createRandom(3);
  const hidden = Float32Array.from({ length: vocabularySize * 8 }, () => random.normal());
  const tokenIds = Int32Array.from({ length: count * 6 }, () => random.below(vocabularySize));
  const offsets = Uint32Array.from({ length: count + 1 }, (_, i) => 6 * i);
  const targets = new Float32Array(count * 8);
  tokenIds.forEach((id, at) => {
    for (let i = 0; i < 8; i++) targets[Math.floor(at / 6) * 8 + i]! += hidden[id * 8 + i]!;
  });
  for (let text = 0; text < count; text++) normalise(targets.subarray(text * 8, text * 8 + 8));
  return { tokenIds, offsets, targets };
}

function fitted(texts: FitTexts, changes: Partial<FitOptions>) {
  const random = createRandom(9);
  const vectors = Float32Array.from({ length: 50 * 8 }, () => 0.3 * random.normal());
  const losses: number[] = [];
  finish(fitVectors(vectors, texts, { ...FIT, ...changes, onEpoch: (_, loss) => void losses.push(loss) }));
  return { vectors, losses };
}

describe('the fit of token vectors', () => {
  it('finds vectors whose sums point where they should', () => {
    const { losses } = fitted(plantedTexts(50, 600), {});
    expect(losses[0]).toBeGreaterThan(0.1);
    expect(losses.at(-1)).toBeLessThan(0.001);
  });

  it('is the same for the same seed, with tokens left out as well', () => {
    const texts = plantedTexts(50, 100);
    const run = (seed: number) => fitted(texts, { epochs: 3, tokenDropout: 0.5, seed });
    expect(run(1)).toEqual(run(1));
    expect(run(1).vectors).not.toEqual(run(2).vectors);
  });
});

describe('principal axes', () => {
  it('are orthonormal and keep what lies in fewer dimensions whole', () => {
    const random = createRandom(4);
    const plane = Float32Array.from({ length: 200 }, () => random.normal());
    const values = Float32Array.from({ length: 100 * 5 }, (_, at) => {
      const [point, i] = [Math.floor(at / 5), at % 5];
      return plane[2 * point]! * (i + 1) + plane[2 * point + 1]! * (i % 2);
    });
    const points = { count: 100, dimensions: 5, values };
    const axes = principalAxes(points, 2);
    const row = (i: number) => axes.axes.subarray(5 * i, 5 * i + 5);
    expect([dot(row(0), row(0)), dot(row(1), row(1)), dot(row(0), row(1))].map((x) => Math.abs(x))).toEqual([
      expect.closeTo(1, 5),
      expect.closeTo(1, 5),
      expect.closeTo(0, 5),
    ]);
    const flat = project(points, axes).values;
    const squares = (some: Float32Array) => dot(some, some);
    expect(squares(flat) / squares(values)).toBeCloseTo(1, 5);
    expect(() => principalAxes(points, 6)).toThrow(RangeError);
  });
});

it('a quantised row is off by half a step at most, and a row of zeros stays one', () => {
  const vectors = Float32Array.from([0.5, -1.27, 0.004, 0, 0, 0]);
  const { scales, vectors: quantised } = quantiseVectors(vectors, 3);
  expect([...quantised]).toEqual([50, -127, 0, 0, 0, 0]);
  expect(scales[0]).toBeCloseTo(0.01);
  expect(scales[1]).toBe(0);
});

/** More are embedded longer, and show the same. */
const TEXTS = 180;

it(
  'a distilled table is nearer to the full encoder than its first vectors, on text that it has not seen',
  async () => {
    const file = new URL('fixtures/sentences.txt', import.meta.url);
    const texts = (await readFile(file, 'utf8')).trimEnd().split('\n').slice(0, TEXTS);
    const unseen = texts.filter((_, i) => i % 5 === 0);
    const seen = texts.filter((_, i) => i % 5 !== 0);
    const teacher = quickTeacher(await openTestTeacher(), texts);
    try {
      const target = await teacher.embed(unseen);
      const cosines: number[] = [];
      for (const epochs of [0, 6]) {
        const { table, report } = await distill(teacher, seen, { dimensions: 128, epochs, seed: 1 });
        expect(report.texts).toBe(seen.length);
        const student = loadStaticEncoder(table);
        expect(student.spec).toMatchObject({ id: 'static', pooling: 'weighted-mean', dimensions: 128 });
        cosines.push(await relation(await student.embed(unseen), target));
      }
      expect(cosines[1]).toBeGreaterThan(cosines[0]! + 0.02);
      const few = seen.slice(0, 9);
      await expect(
        distill(teacher, few, { dimensions: 8, epochs: 1, seed: 1 }, AbortSignal.abort()),
      ).rejects.toThrow();
      const stop = new AbortController();
      const onProgress = (stage: string) => {
        if (stage === 'fit') setImmediate(() => stop.abort());
      };
      await expect(
        distill(teacher, few, { dimensions: 8, epochs: 1000, seed: 1, onProgress }, stop.signal),
        'Ctrl-C while it fits',
      ).rejects.toThrow('abort');
      await expect(distill(teacher, few, { dimensions: 385, epochs: 1, seed: 1 })).rejects.toMatchObject({
        code: 'invalid_argument',
        message: expect.stringContaining('384 dim'),
      });
    } finally {
      await teacher.close();
    }
  },
  TEACHER_TIMEOUT_ms,
);

/** Tokens of the table. All 30,000 take twice as long. */
const VOCABULARY = 16_000;

/** The real one without what costs time: most tokens that the texts do not hold, and the same texts once more. */
function quickTeacher(teacher: SentenceEncoder, texts: readonly string[]): SentenceEncoder {
  const whole = teacher.wordPiece!;
  const { clsTokenId, sepTokenId, unkTokenId, tokenIds } = whole.pieces;
  const held = new Set([clsTokenId, sepTokenId, unkTokenId, ...texts.flatMap((text) => tokenIds(text))]);
  const others = [...whole.vocabulary.keys()].filter((id) => !held.has(id));
  const ids = [...held, ...others.slice(0, VOCABULARY - held.size)];
  const vocabulary = ids.map((id) => whole.vocabulary[id]!);
  let answers: Promise<Float32Array[]> | undefined;
  const embedded = new Map<string, Float32Array>();
  return {
    ...teacher,
    wordPiece: { vocabulary, pieces: loadWordPiece(vocabulary) },
    async embed(some, signal) {
      const unknown = some.filter((text) => !embedded.has(text));
      const vectors = unknown.length === 0 ? [] : await teacher.embed(unknown, signal);
      unknown.forEach((text, i) => {
        embedded.set(text, vectors[i]!);
      });
      return some.map((text) => embedded.get(text)!);
    },
    async embedTokens(sequences, signal) {
      const known = sequences.slice(0, held.size);
      answers ??= teacher.embedTokens(
        known.map((sequence) => sequence.map((id) => ids[id]!)),
        signal,
      );
      const vectors = await answers;
      return sequences.map((_, i) => vectors[i]?.slice() ?? new Float32Array(384));
    },
  };
}

/** Correlation of the pairwise cosines under two encoders: the spaces differ, the relations should not. */
async function relation(a: readonly Float32Array[], b: readonly Float32Array[]): Promise<number> {
  const pairs = a.flatMap((_, i) =>
    Array.from({ length: i }, (_, j) => [dot(a[i]!, a[j]!), dot(b[i]!, b[j]!)]),
  );
  const mean = (k: 0 | 1) => pairs.reduce((sum, pair) => sum + pair[k]!, 0) / pairs.length;
  const [x, y] = [mean(0), mean(1)];
  const moment = (f: (p: number, q: number) => number) =>
    pairs.reduce((sum, [p, q]) => sum + f(p! - x, q! - y), 0) / pairs.length;
  return moment((p, q) => p * q) / Math.sqrt(moment((p) => p * p) * moment((_, q) => q * q));
}
