/** Samples side by side in batches: every position keeps its own text, whatever its neighbours are. */
import { describe, expect, it, test } from 'vitest';
import {
  batchSamples,
  kindsInTurn,
  nextTokenTargets,
} from '../../../../gpu-backend/learning/gates/batches.ts';
import { createRandom, permutation } from '../../../../gpu-backend/random.ts';

const sample = (first: number, length: number, scoreFrom = 0) => ({
  tokenIds: Int32Array.from({ length }, (_, i) => first + i),
  scoreFrom,
});

test('similar lengths share a batch, tokens are bounded, padding is not scored', () => {
  const samples = [sample(100, 9), sample(200, 3, 1), sample(300, 8), sample(400, 4), sample(500, 30)];
  const batches = batchSamples(samples, 18);
  expect(batches.map(({ sequences, tokenIds }) => [sequences, tokenIds.length / sequences])).toEqual([
    [2, 4],
    [2, 9],
    [1, 30],
  ]);
  expect([...batches[0]!.tokenIds]).toEqual([200, 201, 202, 202, 400, 401, 402, 403]);
  expect([...batches[0]!.scoredRows]).toEqual([1, 4, 5, 6]);
  expect([...batches[0]!.nextIds]).toEqual([202, 401, 402, 403]);
  const targets = nextTokenTargets(batches[1]!);
  Array.from(targets.scoredRows).forEach((row, i) => {
    expect(targets.targetIds[i]).toBe(batches[1]!.tokenIds[row]! + 1);
  });
  expect(batches.reduce((sum, { scoredRows }) => sum + scoredRows.length, 0)).toBe(8 + 1 + 7 + 3 + 29);
});

describe('the order of rows', () => {
  it('takes one of every kind in turn, until only the largest has any left', () => {
    const kinds = ['many', 'many', 'few', 'many', 'many', 'some', 'some'];
    expect(kindsInTurn([3, 1, 6, 0, 2, 4, 5], kinds)).toEqual([3, 6, 2, 1, 5, 0, 4]);
  });

  it('is an order of all of them', () => {
    const kinds = Array.from({ length: 500 }, (_, i) => (i % 50 === 0 ? 'rare' : `kind ${i % 3}`));
    const order = kindsInTurn(permutation(kinds.length, createRandom(7)), kinds);
    expect(order.toSorted((a, b) => a - b)).toEqual(kinds.map((_, i) => i));
    // Ten rows of the rare kind and four kinds in all: a quarter of the first forty.
    expect(order.slice(0, 40).filter((index) => kinds[index] === 'rare')).toHaveLength(10);
  });
});
