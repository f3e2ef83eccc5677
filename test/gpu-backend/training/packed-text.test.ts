import { describe, expect, it } from 'vitest';
import { permutation, seededRandom } from '../../../gpu-backend/calibration/random.ts';
import { kindsInTurn } from '../../../gpu-backend/training/packed-text.ts';

describe('the order of rows', () => {
  it('takes one of every kind in turn, until only the largest has any left', () => {
    const kinds = ['many', 'many', 'few', 'many', 'many', 'some', 'some'];
    expect(kindsInTurn([3, 1, 6, 0, 2, 4, 5], kinds)).toEqual([3, 6, 2, 1, 5, 0, 4]);
  });

  it('is an order of all of them', () => {
    const kinds = Array.from({ length: 500 }, (_, i) => (i % 50 === 0 ? 'rare' : `kind ${i % 3}`));
    const order = kindsInTurn(permutation(kinds.length, seededRandom(7)), kinds);
    expect(order.toSorted((a, b) => a - b)).toEqual(kinds.map((_, i) => i));
    // Ten rows of the rare kind and four kinds in all: a quarter of the first forty.
    expect(order.slice(0, 40).filter((index) => kinds[index] === 'rare')).toHaveLength(10);
  });
});
