/** Products by column in the runtime, against plain loops: how exact they are, and that rows keep to themselves. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { multiplyPairs } from '../../../../gpu-backend/model/architectures/column-products.ts';
import {
  type Linear,
  linear,
  multiply,
  storeCodes,
  storedRows,
  withRotation,
} from '../../../../gpu-backend/model/architectures/projections.ts';
import { rotateInputs } from '../../../../gpu-backend/model/architectures/rotation.ts';
import {
  type ColumnCodes,
  dequantize,
  roundMatrix,
} from '../../../../gpu-backend/model/quantization/quantize.ts';
import { WeightsFile } from '../../../../gpu-backend/model/weights-file.ts';
import { GraphBuilder } from '../../../../gpu-backend/onnx/graph.ts';
import { createSessionIn, floats, type Session, tensor } from '../../../../gpu-backend/onnx/session.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { furthest } from '../../../support/furthest.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-columns-'));
});
afterAll(() => rm(folder, { recursive: true }));

const random = createRandom(17);
const normals = (count: number) => Float32Array.from({ length: count }, () => random.normal());

/** Outputs `y` (one code), `some` (rows 3 to 9 of the matrix), `pairs` (of normalized rows) and `rotated_product` (of rotated inputs). */
async function openProduct(codes: ColumnCodes): Promise<Session> {
  const { rows: N, columns: K } = codes;
  const name = `${N}-${K}-${random.below(1e9)}`;
  const file = new WeightsFile(join(folder, `${name}.bin`), `${name}.bin`);
  const stored = storeCodes(file, codes);
  const forRotated = withRotation(file, stored, ROTATED);
  file.close();
  const g = new GraphBuilder('products');
  const x = g.input('x', 'f32', ['B', 'T', K]);
  const all = linear(g, 'all', stored) as Extract<Linear, { kind: 'q8-columns' }>;
  multiply(g, x, all, 'y');
  multiply(g, x, linear(g, 'rows', storedRows(stored, 3, 9)), 'some');
  multiplyPairs(g, x, all, 'pairs');
  g.node('Identity', [multiply(g, x, linear(g, 'rotated', forRotated))], ['rotated_product']);
  for (const [output, width] of [
    ['y', N],
    ['some', 6],
    ['pairs', N],
    ['rotated_product', N],
  ] as const)
    g.output({ name: output }, 'f32', ['B', 'T', width]);
  return createSessionIn(folder, g.graph, { threads: 1 });
}

/** So many inputs are rotated together. */
const ROTATED = 32;
const OUTPUTS = ['y', 'some', 'pairs', 'rotated_product'] as const;

async function products(session: Session, x: Float32Array, K: number, sequences = 1) {
  const shape = [sequences, x.length / K / sequences, K];
  const found = await session.run({ x: tensor('f32', x, shape) }, OUTPUTS);
  const all = OUTPUTS.map((name) => [name, floats(found[name]!)] as const);
  return Object.fromEntries(all) as Record<(typeof OUTPUTS)[number], Float32Array>;
}

/** `[T, N]` in double precision. */
function naive(x: Float32Array, codes: ColumnCodes): Float32Array {
  const { rows: N, columns: K } = codes;
  const weights = dequantize(codes);
  return Float32Array.from({ length: (x.length / K) * N }, (_, i) => {
    const [t, n] = [Math.floor(i / N), i % N];
    let sum = 0;
    for (let k = 0; k < K; k++) sum += x[t * K + k]! * weights[n * K + k]!;
    return sum;
  });
}

/** Rows with a mean square of 1. */
function normalized(x: Float32Array, K: number): Float32Array {
  return x.map((value, i) => {
    const row = x.subarray(i - (i % K), i - (i % K) + K);
    return value / Math.sqrt(row.reduce((sum, one) => sum + one * one, 0) / K);
  });
}

const largest = (values: Float32Array) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

// The second matrix is larger than what is multiplied twice.
describe.each([
  [20, 192],
  [2100, 1024],
])('a matrix of %i outputs and %i inputs', (N, K) => {
  let codes: ColumnCodes;
  let session: Session;
  beforeAll(async () => {
    codes = roundMatrix(normals(N * K), N, K, 'columns') as ColumnCodes;
    session = await openProduct(codes);
  });
  afterAll(() => session.release());

  test('is multiplied within a hundredth with one code, rotated or not, and within two thousandths with two; so are some of its rows', async () => {
    const x = normalized(normals(3 * K), K);
    const expected = naive(x, codes);
    const { y, some, pairs, rotated_product } = await products(session, x, K);
    expect(furthest(y, expected) / largest(expected)).toBeLessThan(1e-2);
    expect(furthest(pairs, expected) / largest(expected)).toBeLessThan(2e-3);
    const x_rotated = x.slice();
    rotateInputs(x_rotated, ROTATED);
    const expected_rotated = naive(x_rotated, codes);
    expect(furthest(rotated_product, expected_rotated) / largest(expected_rotated)).toBeLessThan(1e-2);
    const rows = Float32Array.from({ length: 18 }, (_, i) => y[Math.floor(i / 6) * N + 3 + (i % 6)]!);
    expect(furthest(some, rows) / largest(rows)).toBeLessThan(1e-6);
  });

  test('a row has the same bits alone, in company and in any sequence, and no rows give none', async () => {
    const x = normalized(normals(6 * K), K);
    const together = await products(session, x, K);
    for (const row of [0, 3, 5]) {
      const alone = await products(session, x.subarray(row * K, (row + 1) * K), K);
      for (const output of ['y', 'pairs', 'rotated_product'] as const)
        expect(alone[output]).toEqual(together[output].subarray(row * N, (row + 1) * N));
    }
    expect(await products(session, x, K, 2)).toEqual(together);
    for (const found of Object.values(await products(session, new Float32Array(0), K)))
      expect(found).toHaveLength(0);
  });

  test('rows of any size keep their precision beside each other; zeros stay zeros', async () => {
    const sizes = [1e-6, 1, 1e6, 0];
    const base = normals(4 * K);
    const x = base.map((value, i) => value * sizes[Math.floor(i / K)]!);
    const { y } = await products(session, x, K);
    const expected = naive(x, codes);
    sizes.forEach((size, row) => {
      const ofRow = (values: Float32Array) => values.subarray(row * N, (row + 1) * N);
      const own = ofRow(expected);
      expect(furthest(ofRow(y), own)).toBeLessThanOrEqual(1e-2 * largest(own));
      if (size === 0) expect(largest(ofRow(y))).toBe(0);
    });
  });

  test('the largest codes that there are do not overflow', async () => {
    const full: ColumnCodes = {
      rows: N,
      columns: K,
      codes: Int8Array.from({ length: N * K }, (_, i) => (Math.floor(i / K) % 2 === 0 ? 127 : -127)),
      scales: new Float32Array(N).fill(0.01),
    };
    const extreme = await openProduct(full);
    // More than normalized rows can be: the largest code everywhere, and the smallest.
    const x = Float32Array.from({ length: 2 * K }, (_, i) => (i < K ? 1 : -1) * Math.sqrt(K));
    const { y, pairs } = await products(extreme, x, K);
    await extreme.release();
    const expected = naive(x, full);
    for (const found of [y, pairs]) expect(furthest(found, expected) / largest(expected)).toBeLessThan(1e-5);
  });
});

test('an output without weights, and one with a single weight', async () => {
  const K = 64;
  const weights = new Float32Array(10 * K);
  weights[K + 5] = -3;
  const codes = roundMatrix(weights, 10, K, 'columns') as ColumnCodes;
  expect(dequantize(codes)).toEqual(weights);
  const session = await openProduct(codes);
  const x = normalized(normals(K), K);
  const { y, pairs } = await products(session, x, K);
  await session.release();
  expect(y[0]).toBe(0);
  // Half a step of the row's largest value.
  expect(Math.abs(y[1]! + 3 * x[5]!)).toBeLessThan((3 * largest(x)) / 127 / 2 + 1e-6);
  expect(pairs[1]!).toBeCloseTo(-3 * x[5]!, 2);
});
