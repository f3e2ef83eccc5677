/** How far the moments of a text are trusted. */
import { expect, test } from 'vitest';
import { shrink } from '../../../../gpu-backend/model/quantization/calibration.ts';
import { quantizeWithFeedback } from '../../../../gpu-backend/model/quantization/error-feedback.ts';
import { openProducts } from '../../../../gpu-backend/model/quantization/layer-steps.ts';
import { dequantize } from '../../../../gpu-backend/model/quantization/quantize.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';

const [N, K] = [48, 192];
const random = createRandom(8);

/** Inputs that share a few directions, and their moments. */
const mix = Float64Array.from({ length: 10 * K }, () => random.normal());
function moments(samples: number, shared = 1): Float64Array {
  const sums = new Float64Array(K * K);
  for (let sample = 0; sample < samples; sample++) {
    const directions = Array.from({ length: 10 }, () => shared * random.normal());
    const x = Float64Array.from({ length: K }, (_, i) =>
      directions.reduce((sum, value, d) => sum + value * mix[d * K + i]!, random.normal()),
    );
    for (let i = 0; i < K; i++) {
      for (let j = 0; j < K; j++) sums[i * K + j]! += x[i]! * x[j]!;
    }
  }
  return sums;
}

const sum = (a: Float64Array, b: Float64Array) => a.map((value, i) => value + b[i]!);
const kept = (shrunk: Float64Array, whole: Float64Array) => shrunk[1]! / whole[1]!;

test('what both halves have in common stays, what is chance becomes small, the diagonal stays', () => {
  const half = moments(400);
  const equal = shrink(half, half, K);
  expect(kept(equal, sum(half, half))).toBeCloseTo(0.95, 6);
  const [a, b] = [moments(400, 0), moments(400, 0)];
  const apart = shrink(a, b, K);
  expect(kept(apart, sum(a, b))).toBeCloseTo(0.4, 6);
  for (let i = 0; i < K; i++) expect(apart[i * K + i]).toBe(a[i * K + i]! + b[i * K + i]!);
});

test('a text without a second half, and inputs that are always 0, are no trouble', () => {
  const one = moments(50);
  for (let i = 0; i < K; i++) {
    one[3 * K + i] = 0;
    one[i * K + 3] = 0;
  }
  for (const other of [new Float64Array(K * K), one])
    expect(shrink(one, other, K).every(Number.isFinite)).toBe(true);
});

test('on little text, shrunk moments give less error on other text', async () => {
  await using products = await openProducts(1);
  const rows = Float32Array.from({ length: N * K }, () => random.normal());
  const matrix = { rows, outputs: N, inputs: K };
  const [a, b] = [moments(120), moments(120)];
  const other = moments(3000);
  const errorOf = async (on: Float64Array): Promise<number> => {
    const form = { bits: 4, blockSize: 32 } as const;
    const back = dequantize(await quantizeWithFeedback(matrix, { moments: on, form, passes: 1, products }));
    const errors = rows.map((weight, i) => weight - back[i]!);
    const gradient = await products.multiply(errors, Float32Array.from(other), K);
    return errors.reduce((total, error, i) => total + error * gradient[i]!, 0);
  };
  expect(await errorOf(shrink(a, b, K))).toBeLessThan(0.95 * (await errorOf(sum(a, b))));
});
