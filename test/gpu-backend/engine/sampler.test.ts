/** Sampling against its definition, on small rows of logits. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { PLAIN_SAMPLING, type Sampling } from '../../../gpu-backend/engine/engine.ts';
import type { SamplerState } from '../../../gpu-backend/engine/sampler.ts';
import { sample, tokenLogprob } from '../../../gpu-backend/engine/sampler.ts';
import { seededRandom } from '../../../gpu-backend/random.ts';

const PROBABILITIES = [0.5, 0.25, 0.15, 0.1];
const LOGITS = PROBABILITIES.map(Math.log);

const state = (changes: Partial<SamplerState> = {}): SamplerState => ({
  generated: new Map(),
  prompt: new Set(),
  forbidden: [],
  random: seededRandom(1),
  ...changes,
});

/** Shares of 20,000 draws: a share's standard error is at most 0.0036. */
function shares(sampling: Partial<Sampling>, changes: Partial<SamplerState> = {}, logits = LOGITS): number[] {
  const counts = logits.map(() => 0);
  const shared = state(changes);
  for (let i = 0; i < 20_000; i++)
    counts[sample(Float32Array.from(logits), { ...PLAIN_SAMPLING, ...sampling }, shared)]!++;
  return counts.map((count) => count / 20_000);
}

function expectShares(found: number[], expected: number[]): void {
  found.forEach((share, i) => {
    if (expected[i] === 0) expect(share).toBe(0);
    else expect(Math.abs(share - expected[i]!)).toBeLessThan(0.015);
  });
}

describe('draws follow the distribution', () => {
  test.each<[string, Partial<Sampling>, number[]]>([
    ['plain', {}, PROBABILITIES],
    ['temperature 2', { temperature: 2 }, normalized(PROBABILITIES.map(Math.sqrt))],
    ['top_k', { topK: 2 }, [2 / 3, 1 / 3, 0, 0]],
    ['top_k larger than the vocabulary', { topK: 100 }, PROBABILITIES],
    ['top_p keeps the token that crosses it', { topP: 0.6 }, [2 / 3, 1 / 3, 0, 0]],
    ['tiny top_p keeps the best', { topP: 1e-9 }, [1, 0, 0, 0]],
    ['top_p counts within top_k', { topK: 2, topP: 0.5 }, [1, 0, 0, 0]],
    ['min_p', { minP: 0.4 }, [2 / 3, 1 / 3, 0, 0]],
    ['min_p with top_p', { minP: 0.25, topP: 0.95 }, normalized([0.5, 0.25, 0.15, 0])],
    ['bias', { logitBias: [[0, -100]] }, [0, 0.5, 0.3, 0.2]],
  ])('%s', (_name, sampling, expected) => expectShares(shares(sampling), expected));

  test('top_p keeps no more than the tokens that just reach it', () => {
    expectShares(shares({ topP: 0.5 }, {}, [0, 0, 0, 0]), [0.5, 0.5, 0, 0]);
    expectShares(shares({ topK: 3, topP: 2 / 3 }, {}, [0, 0, 0, 0]), [0.5, 0.5, 0, 0]);
  });

  test('penalties on what was generated', () => {
    const generated = new Map([[0, 2]]);
    const penalized = normalized([0.5 * Math.exp(-0.5 - 2 * 0.25), 0.25, 0.15, 0.1]);
    expectShares(shares({ presencePenalty: 0.5, frequencyPenalty: 0.25 }, { generated }), penalized);
  });

  test('repetition_penalty counts the prompt too, whatever the sign', () => {
    const logits = [2, -1, 0.5];
    const expected = normalized([1, -2, 0.5].map(Math.exp));
    const seen = { prompt: new Set([0]), generated: new Map([[1, 1]]) };
    expectShares(shares({ repetitionPenalty: 2 }, seen, logits), expected);
  });

  test('forbidden tokens never come', () =>
    expectShares(shares({}, { forbidden: [0, 3] }), [0, 0.625, 0.375, 0]));
});

test('greedy takes the first of equals, and ids outside the vocabulary are harmless', () => {
  const sampling = { ...PLAIN_SAMPLING, temperature: 0, logitBias: [[99, 5]] as const };
  expect(sample(Float32Array.from([1, 3, 3]), sampling, state({ forbidden: [77] }))).toBe(1);
});

test('whatever a request may ask for, a token is drawn that has a chance', () => {
  const tokens = 8;
  const double = (min: number, max: number) => fc.double({ min, max, noNaN: true });
  const id = fc.nat({ max: tokens - 1 });
  const sampling: fc.Arbitrary<Sampling> = fc.record({
    temperature: double(0, 2),
    topP: double(Number.MIN_VALUE, 1),
    topK: fc.nat({ max: 10 }),
    minP: double(0, 1),
    presencePenalty: double(-2, 2),
    frequencyPenalty: double(-2, 2),
    repetitionPenalty: fc.oneof(double(Number.MIN_VALUE, 10), double(Number.MIN_VALUE, 1e-30)),
    logitBias: fc.array(fc.tuple(id, double(-100, 100))),
    seed: fc.constant(1),
  });
  const logits = fc.array(double(-1e4, 1e4), { minLength: tokens, maxLength: tokens });
  const seen = fc.record({
    prompt: fc.array(id),
    generated: fc.array(fc.tuple(id, fc.integer({ min: 1, max: 1e6 }))),
  });
  const row = fc.record({ logits, seen, sampling, forbidden: fc.array(id, { maxLength: tokens - 1 }) });
  fc.assert(
    fc.property(
      row,
      double(0, 1 - 2 ** -53),
      ({ logits: values, seen: { prompt, generated }, sampling: by, forbidden }, drawn) => {
        const changes = {
          prompt: new Set(prompt),
          generated: new Map(generated),
          forbidden,
          random: () => drawn,
        };
        const changed = Float32Array.from(values);
        const found = sample(changed, by, state(changes));
        expect(changed[found], String(found)).toBeGreaterThan(Number.NEGATIVE_INFINITY);
        expect(changed.every((value) => value < Number.POSITIVE_INFINITY)).toBe(true);
      },
    ),
    { numRuns: 1_500 },
  );
});

test('top_k, top_p and min_p keep what a sort of the whole vocabulary keeps', () => {
  const row = fc.record({
    seed: fc.nat(),
    spread: fc.double({ min: 0.01, max: 40, noNaN: true }),
    temperature: fc.double({ min: 0.05, max: 2, noNaN: true }),
    topK: fc.constantFrom(0, 1, 7, 60, 5000),
    topP: fc.constantFrom(0.05, 0.5, 0.9, 0.999, 1),
    minP: fc.constantFrom(0, 0.02, 0.3),
  });
  const property = fc.property(row, ({ seed, spread, temperature, topK, topP, minP }) => {
    fc.pre(topK > 0 || topP < 1 || minP > 0);
    const random = seededRandom(seed);
    const logits = Float32Array.from({ length: 700 }, () => spread * random());
    const drawn = random();
    const sampling = { ...PLAIN_SAMPLING, temperature, topK, topP, minP };
    const found = sample(logits.slice(), sampling, state({ random: () => drawn }));
    expect(found).toBe(drawnFromSorted(logits, sampling, drawn));
  });
  fc.assert(property, { numRuns: 600, seed: 1 });
});

/** The definition: everything sorted, then cut. */
function drawnFromSorted(
  logits: Float32Array,
  { temperature, topK, topP, minP }: Sampling,
  drawn: number,
): number {
  const best = Math.max(...logits);
  const sum = (some: readonly { weight: number }[]) => some.reduce((total, { weight }) => total + weight, 0);
  let kept = [...logits]
    .map((logit, id) => ({ id, weight: Math.exp((logit - best) / temperature) }))
    .sort((a, b) => b.weight - a.weight || a.id - b.id);
  if (topK > 0) kept = kept.slice(0, topK);
  const total = sum(kept);
  const crossing = kept.findIndex((_, i) => sum(kept.slice(0, i + 1)) >= topP * total);
  if (topP < 1) kept = kept.slice(0, crossing + 1);
  kept = kept.filter(({ weight }) => weight >= minP);
  let left = drawn * sum(kept);
  for (const { id, weight } of kept) {
    left -= weight;
    if (left < 0) return id;
  }
  return kept.at(-1)!.id;
}

test('equal seeds give equal draws, neighbouring seeds do not', () => {
  const draws = (seed: number) => Array.from({ length: 20 }, seededRandom(seed));
  expect(draws(7)).toEqual(draws(7));
  expect(draws(7)).not.toEqual(draws(8));
  expect(draws(1)).not.toEqual(draws(1 + 2 ** 32));
  const many = Array.from({ length: 10_000 }, seededRandom(3));
  expect(Math.abs(many.reduce((sum, value) => sum + value, 0) / 10_000 - 0.5)).toBeLessThan(0.02);
});

test('log-probabilities with the likeliest alternatives, best first', () => {
  const found = tokenLogprob(Float32Array.from(LOGITS.map((logit) => logit + 3)), 2, 2);
  expect(found.logprob).toBeCloseTo(Math.log(0.15), 5);
  expect(found.top.map(({ tokenId }) => tokenId)).toEqual([0, 1]);
  expect(found.top[0]!.logprob).toBeCloseTo(Math.log(0.5), 5);
  expect(tokenLogprob(Float32Array.from(LOGITS), 0, 0).top).toEqual([]);
  const equal = tokenLogprob(Float32Array.from([1, 3, 3, 3]), 0, 2).top;
  expect(equal.map(({ tokenId }) => tokenId)).toEqual([1, 2]);
});

function normalized(weights: number[]): number[] {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}
