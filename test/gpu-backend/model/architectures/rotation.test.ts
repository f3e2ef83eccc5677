/** Rotations inside of a layer leave what it computes as it is. */
import { expect, test } from 'vitest';
import {
  rotatedBasis,
  rotateInputs,
  rotateOutputs,
  rotationMatrix,
} from '../../../../gpu-backend/model/architectures/rotation.ts';
import { layerMatrices } from '../../../../gpu-backend/model/matrices.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { furthest } from '../../../support/furthest.ts';
import { randomLlama } from '../../../support/random-llama.ts';

const random = createRandom(5);
const normals = (count: number) => Float32Array.from({ length: count }, () => random.normal());

/** W·x in double precision, W `[x.length·n, x.length]`. */
function product(rows: Float32Array, x: Float32Array): Float32Array {
  return Float32Array.from({ length: rows.length / x.length }, (_, output) =>
    x.reduce((sum, value, i) => sum + rows[output * x.length + i]! * value, 0),
  );
}

test.each([2, 16, 64])(
  'a matrix of %i neighbours is symmetric, orthogonal, and spreads one value evenly',
  (size) => {
    const matrix = rotationMatrix(size);
    const values = normals(3 * size);
    const twice = values.slice();
    rotateInputs(twice, size);
    expect(furthest(twice.subarray(0, size), product(matrix, values.subarray(0, size)))).toBeLessThan(1e-6);
    rotateInputs(twice, size);
    expect(furthest(twice, values)).toBeLessThan(1e-6);
    const single = new Float32Array(size);
    single[size - 1] = 1;
    rotateInputs(single, size);
    for (const value of single) expect(Math.abs(value)).toBeCloseTo(1 / Math.sqrt(size), 6);
  },
);

test('rotated outputs are those of the matrix, rotated', () => {
  const [outputs, inputs, size] = [12, 7, 4];
  const matrix = normals(outputs * inputs);
  const x = normals(inputs);
  const expected = product(matrix, x);
  rotateInputs(expected, size);
  const changed = matrix.slice();
  rotateOutputs(changed, inputs, size);
  expect(furthest(product(changed, x), expected)).toBeLessThan(1e-6);
});

test.each([
  ['a plain Llama', {}],
  ['biases of V', { attentionBias: 'qkv' }],
] as const)('%s: attention passes on V, and down undoes what the graph rotates', async (_, changes) => {
  const source = randomLlama(changes);
  const { config } = source;
  const { hiddenSize: H, headCount: N, kvHeadCount: G, headSize: D, ffnSize: F } = config;
  const plain = rotatedBasis(config, false);
  const rotating = rotatedBasis(config, true);
  expect([plain.inside(D), plain.inside(F)]).toEqual([1, 1]);
  expect(rotating.inside(D)).toBeGreaterThan(1);
  const [own, rotated] = [await layerMatrices(source, plain, 1), await layerMatrices(source, rotating, 1)];
  // One position attends to itself alone: each query head gets the V of its group.
  const x = normals(H);
  const attended = ({ qkv, output, extras }: typeof own) => {
    const from = (N + G) * D;
    const bias = extras.qkvBias?.subarray(from);
    const v = product(qkv.rows.subarray(from * H), x).map((value, i) => value + (bias?.[i] ?? 0));
    const heads = Float32Array.from(
      { length: N * D },
      (_, i) => v[Math.floor(i / D / (N / G)) * D + (i % D)]!,
    );
    return product(output.rows, heads);
  };
  expect(furthest(attended(rotated), attended(own))).toBeLessThan(1e-4);
  expect(furthest(rotated.output.rows, own.output.rows)).toBeGreaterThan(1e-3);
  const inner = normals(F);
  const expected = product(own.down.rows, inner);
  rotateInputs(inner, rotating.inside(F));
  expect(furthest(product(rotated.down.rows, inner), expected)).toBeLessThan(1e-4);
  for (const name of ['gateUp', 'attentionNorm', 'ffnNorm'] as const)
    expect(rotated[name]).toEqual(own[name]);
});
