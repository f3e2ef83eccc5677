/** What a seed gave once it must give for ever: answers and learned masks are promised to be the same again. */
import { expect, it } from 'vitest';
import { createRandom, permutation, seededRandom } from '../../gpu-backend/random.ts';

it('served tokens are drawn as ever, from both halves of a seed', () => {
  const random = seededRandom(2 ** 40 + 5);
  const draws = Array.from({ length: 3 }, () => random() * 2 ** 32);
  expect(draws).toEqual([4078013159, 1278107658, 3954047787]);
});

it('everything offline draws as ever', () => {
  const random = createRandom(7);
  expect([random.next() * 2 ** 32, random.below(1000)]).toEqual([50271532, 61]);
  expect(random.normal()).toBeCloseTo(-0.8642530248729361, 15);
  expect([...permutation(6, createRandom(7))]).toEqual([4, 1, 2, 3, 5, 0]);
});
