/**
 * Weights in the layout of ONNX Runtime's MatMulNBits: a row of `[out, in]` is cut into blocks of 32 inputs, each
 * with one fp32 scale. 8 bits carry a zero point a block, so a block's 256 codes span exactly its own range;
 * 4 bits are symmetric around 8. What blocks of 64, symmetric codes and other choices cost in precision is in
 * LOG.md.
 */
export const QUANT_BLOCK = 32;

type QuantizedRows = {
  /** `[out, in/32, 32·bits/8]` bytes; with 4 bits the even input sits in the low half. */
  readonly values: Uint8Array;
  /** `[out, in/32]`. */
  readonly scales: Float32Array;
  /** `[out, in/32]`, 8 bits only. */
  readonly zeroPoints: Uint8Array | undefined;
};

/** `weights` is row-major `[rows, columns]`. @throws RangeError unless a row is whole blocks. */
export function quantizeRows(
  weights: Float32Array,
  rows: number,
  columns: number,
  bits: 4 | 8,
): QuantizedRows {
  if (columns % QUANT_BLOCK !== 0) {
    throw new RangeError(`${columns} inputs are not a multiple of ${QUANT_BLOCK}`);
  }
  return bits === 8 ? quantize8(weights, rows * columns) : quantize4(weights, rows * columns);
}

function quantize8(weights: Float32Array, count: number): QuantizedRows {
  const values = new Uint8Array(count);
  const scales = new Float32Array(count / QUANT_BLOCK);
  const zeroPoints = new Uint8Array(count / QUANT_BLOCK);
  for (let block = 0; block < scales.length; block++) {
    const start = block * QUANT_BLOCK;
    const { low, high } = range(weights, start);
    const scale = Math.fround((high - low) / 255);
    const inverse = scale === 0 ? 0 : 1 / scale;
    const zeroPoint = Math.round(-low * inverse);
    scales[block] = scale;
    zeroPoints[block] = zeroPoint;
    for (let i = start; i < start + QUANT_BLOCK; i++) {
      values[i] = Math.max(0, Math.min(255, Math.round(weights[i]! * inverse) + zeroPoint));
    }
  }
  return { values, scales, zeroPoints };
}

/** The block's range, widened to hold 0, which must have a code of its own. */
function range(weights: Float32Array, start: number): { low: number; high: number } {
  let low = 0;
  let high = 0;
  for (let i = start; i < start + QUANT_BLOCK; i++) {
    const weight = weights[i]!;
    if (weight < low) low = weight;
    if (weight > high) high = weight;
  }
  return { low, high };
}

/** The block's extreme value takes the code -8, as GGUF's Q4_0 does. */
function quantize4(weights: Float32Array, count: number): QuantizedRows {
  const values = new Uint8Array(count / 2);
  const scales = new Float32Array(count / QUANT_BLOCK);
  for (let block = 0; block < scales.length; block++) {
    const start = block * QUANT_BLOCK;
    const { low, high } = range(weights, start);
    const scale = Math.fround((-low > high ? low : high) / -8);
    const inverse = scale === 0 ? 0 : 1 / scale;
    scales[block] = scale;
    for (let i = start; i < start + QUANT_BLOCK; i++) {
      const code = Math.max(0, Math.min(15, Math.round(weights[i]! * inverse) + 8));
      values[i >> 1]! |= i % 2 === 0 ? code : code << 4;
    }
  }
  return { values, scales, zeroPoints: undefined };
}
