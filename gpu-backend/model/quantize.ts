/**
 * Weights in the layout of ONNX Runtime's MatMulNBits: a row of `[out, in]` is cut into blocks of 32 inputs,
 * each with one fp32 scale; values are stored unsigned around an implied zero point of 2^(bits-1).
 * At 8 bits the rounding error is at most 1/254 of a block's largest weight.
 */
export const QUANT_BLOCK = 32;

export type QuantizedRows = {
  /** `[out, in/32, 32·bits/8]` bytes; with 4 bits the even input sits in the low half. */
  readonly values: Uint8Array;
  /** `[out, in/32]`. */
  readonly scales: Float32Array;
};

/** `weights` is row-major `[rows, columns]`. @throws RangeError unless columns divide by 32. */
export function quantizeRows(
  weights: Float32Array,
  rows: number,
  columns: number,
  bits: 4 | 8,
): QuantizedRows {
  if (columns % QUANT_BLOCK !== 0)
    throw new RangeError(`${columns} inputs are not a multiple of ${QUANT_BLOCK}`);
  const blockCount = (rows * columns) / QUANT_BLOCK;
  const values = new Uint8Array((rows * columns * bits) / 8);
  const scales = new Float32Array(blockCount);
  const low = -(2 ** (bits - 1));
  const high = -low - 1;
  for (let block = 0; block < blockCount; block++) {
    const start = block * QUANT_BLOCK;
    const scale = blockScale(weights, start, bits);
    scales[block] = scale;
    const inverse = scale === 0 ? 0 : 1 / scale;
    for (let i = 0; i < QUANT_BLOCK; i++) {
      const quantized = Math.max(low, Math.min(high, Math.round(weights[start + i]! * inverse))) - low;
      if (bits === 8) values[start + i] = quantized;
      else values[(start + i) >> 1]! |= i % 2 === 0 ? quantized : quantized << 4;
    }
  }
  return { values, scales };
}

/** 8 bits: the largest magnitude over 127. 4 bits: the extreme value takes the code -8, as Q4_0 does. */
function blockScale(weights: Float32Array, start: number, bits: 4 | 8): number {
  let extreme = 0;
  for (let i = start; i < start + QUANT_BLOCK; i++) {
    if (Math.abs(weights[i]!) > Math.abs(extreme)) extreme = weights[i]!;
  }
  return Math.fround(bits === 8 ? Math.abs(extreme) / 127 : extreme / -8);
}
