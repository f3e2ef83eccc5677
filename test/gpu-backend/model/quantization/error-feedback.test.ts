/** Rounding with error feedback: what it gains on inputs that go together, measured by the error that it says it minimizes. */
import { afterAll, beforeAll, expect, test } from 'vitest';
import {
  quantizeWithFeedback,
  roundColumnsWithFeedback,
} from '../../../../gpu-backend/model/quantization/error-feedback.ts';
import { openProducts, type Products } from '../../../../gpu-backend/model/quantization/layer-steps.ts';
import {
  type ColumnCodes,
  dequantize,
  type MatrixCodes,
  type QuantCodes,
  type QuantForm,
  roundMatrix,
  roundRows,
} from '../../../../gpu-backend/model/quantization/quantize.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';

let products: Products;
beforeAll(async () => {
  products = await openProducts(1);
});
afterAll(() => products[Symbol.asyncDispose]());

const [N, K] = [40, 192];
const FORMS: QuantForm[] = [
  { bits: 4, blockSize: 32 },
  { bits: 4, blockSize: 64 },
];

/** Weights, and second moments of inputs that share a few directions. */
function problem(seed: number, directions: number) {
  const random = createRandom(seed);
  const rows = Float32Array.from({ length: N * K }, () => random.normal());
  const mix = Float64Array.from({ length: directions * K }, () => random.normal());
  const moments = new Float64Array(K * K);
  for (let sample = 0; sample < 600; sample++) {
    const shared = Array.from({ length: directions }, () => random.normal());
    const x = Float64Array.from({ length: K }, (_, i) =>
      shared.reduce((sum, value, d) => sum + value * mix[d * K + i]!, 0.3 * random.normal()),
    );
    for (let i = 0; i < K; i++) {
      for (let j = 0; j < K; j++) moments[i * K + j]! += x[i]! * x[j]!;
    }
  }
  return { matrix: { rows, outputs: N, inputs: K }, moments };
}

/** tr((W − Q)·H·(W − Q)ᵀ), by the book. */
function weightedError(rows: Float32Array, codes: MatrixCodes, moments: Float64Array): number {
  const back = dequantize(codes);
  let total = 0;
  for (let n = 0; n < N; n++) {
    for (let i = 0; i < K; i++) {
      for (let j = 0; j < K; j++) {
        const [a, b] = [n * K + i, n * K + j];
        total += (rows[a]! - back[a]!) * moments[i * K + j]! * (rows[b]! - back[b]!);
      }
    }
  }
  return total;
}

test.each(FORMS)(
  '$bits bits in blocks of $blockSize: less error, and less again with every pass',
  async (form) => {
    const { matrix, moments } = problem(1, 12);
    const errorOf = (codes: QuantCodes) => weightedError(matrix.rows, codes, moments);
    const plain = errorOf(roundRows(matrix.rows, N, K, form));
    const after: number[] = [];
    for (const passes of [0, 1, 2])
      after.push(errorOf(await quantizeWithFeedback(matrix, { moments, form, passes, products })));
    expect(after[0]!).toBeLessThan(0.35 * plain);
    expect(after[1]!).toBeLessThan(after[0]!);
    expect(after[2]!).toBeLessThan(after[1]!);
  },
);

test('inputs that have nothing to do with each other: the better grid alone', async () => {
  const { matrix } = problem(2, 1);
  const moments = new Float64Array(K * K);
  for (let i = 0; i < K; i++) moments[i * K + i] = 1 + (i % 5);
  const form = FORMS[0]!;
  const codes = await quantizeWithFeedback(matrix, { moments, form, passes: 1, products });
  const plain = roundRows(matrix.rows, N, K, form);
  expect(weightedError(matrix.rows, codes, moments)).toBeLessThan(
    0.95 * weightedError(matrix.rows, plain, moments),
  );
});

test('weights that are on a grid already come out as they went in', async () => {
  const { moments } = problem(3, 12);
  const form = FORMS[0]!;
  const random = createRandom(4);
  // Codes of the whole range in every block, on grids with exact scales.
  const grid: QuantCodes = {
    ...form,
    rows: N,
    columns: K,
    codes: Uint8Array.from({ length: N * K }, (_, i) => (i % 32 < 2 ? (i % 32) * 15 : random.below(16))),
    scales: Float32Array.from({ length: (N * K) / 32 }, () => 2 ** -random.below(4)),
    zeroPoints: Uint8Array.from({ length: (N * K) / 32 }, () => random.below(16)),
  };
  const rows = dequantize(grid);
  const codes = await quantizeWithFeedback(
    { rows, outputs: N, inputs: K },
    { moments, form, passes: 0, products },
  );
  expect(codes).toEqual(grid);
});

test('the same again is the same', async () => {
  const { matrix, moments } = problem(5, 12);
  const options = { moments, form: FORMS[0]!, passes: 1, products };
  expect(await quantizeWithFeedback(matrix, options)).toEqual(await quantizeWithFeedback(matrix, options));
});

test('an input that is always 0, and moments of nothing, are no trouble', async () => {
  const { matrix, moments } = problem(6, 12);
  for (let i = 0; i < K; i++) {
    moments[7 * K + i] = 0;
    moments[i * K + 7] = 0;
  }
  for (const some of [moments, new Float64Array(K * K)]) {
    const codes = await quantizeWithFeedback(matrix, { moments: some, form: FORMS[0]!, passes: 1, products });
    expect(dequantize(codes).every(Number.isFinite)).toBe(true);
  }
});

test('by column: less error than to nearest, the same scales, and the same again', async () => {
  const { matrix, moments } = problem(7, 12);
  const plain = roundMatrix(matrix.rows, N, K, 'columns');
  const codes = await roundColumnsWithFeedback(matrix, { moments, products });
  expect(codes.scales).toEqual(plain.scales);
  expect(weightedError(matrix.rows, codes, moments)).toBeLessThan(
    0.35 * weightedError(matrix.rows, plain, moments),
  );
  expect(await roundColumnsWithFeedback(matrix, { moments, products })).toEqual(codes);
});

test('by column: weights that have codes keep them; an odd number of inputs, and moments of nothing, are no trouble', async () => {
  const [rows, inputs] = [5, 70];
  const random = createRandom(8);
  const grid: ColumnCodes = {
    rows,
    columns: inputs,
    codes: Int8Array.from({ length: rows * inputs }, (_, i) =>
      i % inputs === 0 ? 127 : random.below(255) - 127,
    ),
    scales: Float32Array.from({ length: rows }, (_, row) => 2 ** -row),
  };
  const matrix = { rows: dequantize(grid), outputs: rows, inputs };
  const moments = new Float64Array(inputs * inputs);
  for (let i = 0; i < inputs; i++) moments[i * inputs + i] = i;
  expect(await roundColumnsWithFeedback(matrix, { moments, products })).toEqual(grid);
  expect(await roundColumnsWithFeedback(matrix, { moments: moments.fill(0), products })).toEqual(grid);
});
