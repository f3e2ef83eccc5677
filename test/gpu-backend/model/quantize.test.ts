/** Codes as ONNX Runtime reads them, and the rotation that comes before. */
import { expect, test } from 'vitest';
import { rotateColumns, rotateRows } from '../../../gpu-backend/model/architectures/rotation.ts';
import { QUANT_BLOCK, quantizeRows } from '../../../gpu-backend/model/quantize.ts';
import { seededRandom } from '../../../gpu-backend/random.ts';

const random = seededRandom(5);
const noise = (count: number, spread = 1) =>
  Float32Array.from({ length: count }, () => (random() - 0.5) * spread);

test('8 bits: every weight within half a step of its block, zero exact', () => {
  const weights = noise(4 * 64);
  weights[3] = 0;
  weights[40] = 9;
  const { values, scales, zeroPoints } = quantizeRows(weights, 4, 64, 8);
  weights.forEach((weight, i) => {
    const block = Math.floor(i / QUANT_BLOCK);
    const back = (values[i]! - zeroPoints![block]!) * scales[block]!;
    expect(Math.abs(back - weight)).toBeLessThanOrEqual(scales[block]! * 0.5001 + 1e-7);
    if (weight === 0) expect(back).toBe(0);
  });
});

test.each([
  ['all positive', (i: number) => 1 + i / 32],
  ['all negative', (i: number) => -1 - i / 32],
  ['all equal', () => 0.3],
  ['all zero', () => 0],
])('8 bits, a block that is %s', (_name, value) => {
  const weights = Float32Array.from({ length: 32 }, (_, i) => value(i));
  const { values, scales, zeroPoints } = quantizeRows(weights, 1, 32, 8);
  weights.forEach((weight, i) => {
    expect(Math.abs((values[i]! - zeroPoints![0]!) * scales[0]! - weight)).toBeLessThanOrEqual(
      scales[0]! * 0.51,
    );
  });
});

test('4 bits: two codes a byte, the even one low, the extreme weight exact', () => {
  const weights = noise(64);
  weights[10] = -3;
  const { values, scales } = quantizeRows(weights, 1, 64, 4);
  const code = (i: number) => (i % 2 === 0 ? values[i >> 1]! & 15 : values[i >> 1]! >> 4);
  expect((code(10) - 8) * scales[0]!).toBeCloseTo(-3, 6);
  weights.forEach((weight, i) => {
    const scale = Math.abs(scales[i >> 5]!);
    expect(Math.abs((code(i) - 8) * scales[i >> 5]! - weight)).toBeLessThanOrEqual(scale * 1.01);
  });
});

test('a row that is no whole number of blocks is refused', () => {
  expect(() => quantizeRows(new Float32Array(40), 1, 40, 8)).toThrow(RangeError);
});

test.each([64, 96, 576])(
  'the rotation of width %i keeps products and lengths, and spreads an outlier',
  (width) => {
    const x = noise(width);
    const w = noise(width);
    const dot = (a: Float32Array, b: Float32Array) => a.reduce((sum, value, i) => sum + value * b[i]!, 0);
    const [rx, rw] = [x.slice(), w.slice()];
    rotateRows(rx, width);
    rotateRows(rw, width);
    expect(dot(rx, rw)).toBeCloseTo(dot(x, w), 4);
    // As a column, through the transposed function.
    expect(dot(rotateColumns(x, width), rx)).toBeCloseTo(dot(x, x), 4);
    const outlier = new Float32Array(width);
    outlier[5] = 1;
    rotateRows(outlier, width);
    expect(Math.max(...outlier.map(Math.abs))).toBeLessThan(0.6);
    expect(dot(outlier, outlier)).toBeCloseTo(1, 5);
  },
);
