/** Codes as ONNX Runtime reads them, and the rotation that comes before. */
import { expect, test } from 'vitest';
import { rotateColumns, rotateRows } from '../../../../gpu-backend/model/architectures/rotation.ts';
import {
  dequantize,
  packRows,
  type QuantForm,
  roundRows,
  unpackRows,
} from '../../../../gpu-backend/model/quantization/quantize.ts';
import { seededRandom } from '../../../../gpu-backend/random.ts';

const random = seededRandom(5);
const noise = (count: number, spread = 1) =>
  Float32Array.from({ length: count }, () => (random() - 0.5) * spread);

const FORMS: QuantForm[] = [
  { bits: 8, blockSize: 32 },
  { bits: 8, blockSize: 64 },
  { bits: 4, blockSize: 32 },
  { bits: 4, blockSize: 64 },
];

test.each(FORMS)('$bits bits in blocks of $blockSize: within a step of the block, zero exact', (form) => {
  const weights = noise(3 * 192);
  weights[3] = 0;
  weights[40] = 9;
  const codes = roundRows(weights, 3, 192, form);
  dequantize(codes).forEach((back, i) => {
    const scale = codes.scales[Math.floor(i / form.blockSize)]!;
    // Half a step of rounding, and as much where the zero point moved the range.
    expect(Math.abs(back - weights[i]!)).toBeLessThanOrEqual(scale * 1.001 + 1e-7);
    if (weights[i] === 0) expect(back).toBe(0);
  });
});

test.each([
  ['all positive', (i: number) => 1 + i / 32],
  ['all negative', (i: number) => -1 - i / 32],
  ['all equal', () => 0.3],
  ['all zero', () => 0],
])('a block that is %s', (_name, value) => {
  const weights = Float32Array.from({ length: 32 }, (_, i) => value(i));
  for (const bits of [4, 8] as const) {
    const codes = roundRows(weights, 1, 32, { bits, blockSize: 32 });
    dequantize(codes).forEach((back, i) => {
      expect(Math.abs(back - weights[i]!)).toBeLessThanOrEqual(codes.scales[0]! * 0.51);
    });
  }
});

test('4 bits are packed two a byte, the even one low, zero points too, a row at a time', () => {
  // Three blocks a row: the last byte of a row's zero points is half empty.
  const codes = {
    ...({ bits: 4, blockSize: 32, rows: 2, columns: 96 } as const),
    codes: Uint8Array.from({ length: 192 }, (_, i) => (i * 7 + 3) % 16),
    scales: noise(6),
    zeroPoints: Uint8Array.from([1, 2, 3, 4, 5, 6]),
  };
  const packed = packRows(codes);
  expect([...packed.zeroPoints]).toEqual([0x21, 0x03, 0x54, 0x06]);
  packed.values.forEach((byte, i) => {
    expect(byte).toBe(codes.codes[2 * i]! + 16 * codes.codes[2 * i + 1]!);
  });
  // Half a byte a code, an fp32 scale a block, half a byte a zero point in whole bytes a row.
  expect([packed.values, packed.scales, packed.zeroPoints].map(({ byteLength }) => byteLength)).toEqual([
    96, 24, 4,
  ]);
});

test.each(FORMS)('$bits bits in blocks of $blockSize: what is packed comes back', (form) => {
  const codes = roundRows(noise(5 * 192), 5, 192, form);
  expect(unpackRows(packRows(codes), 5, 192, form)).toEqual(codes);
});

test('a row that is no whole number of blocks is refused', () => {
  expect(() => roundRows(new Float32Array(40), 1, 40, { bits: 8, blockSize: 32 })).toThrow(RangeError);
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
