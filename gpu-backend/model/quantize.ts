/**
 * Weights in the layout of ONNX Runtime's MatMulNBits: a row of `[out, in]` is cut into blocks of inputs, each
 * with one fp32 scale; values are stored unsigned around an implied zero point of 2^(bits-1).
 * At 8 bits the rounding error is at most 1/254 of a block's largest weight.
 */

/**
 * Inputs a block. At 8 bits, 64 where the width allows it: half the scales to read (decoding is bound by bytes
 * read) for 5 % fewer bytes a token than 32. At 4 bits the error decides, so 32.
 */
export const quantBlock = (bits: 4 | 8, columns: number): 32 | 64 =>
  bits === 8 && columns % 64 === 0 ? 64 : 32;

export type QuantizedRows = {
  /** `[out, in/block, block·bits/8]` bytes; with 4 bits the even input sits in the low half. */
  readonly values: Uint8Array;
  /** `[out, in/block]`. */
  readonly scales: Float32Array;
};

/** `weights` is row-major `[rows, columns]`. @throws RangeError unless a row is whole blocks. */
export function quantizeRows(
  weights: Float32Array,
  rows: number,
  columns: number,
  bits: 4 | 8,
): QuantizedRows {
  const size = quantBlock(bits, columns);
  if (columns % size !== 0) throw new RangeError(`${columns} inputs are not a multiple of ${size}`);
  const values = new Uint8Array((rows * columns * bits) / 8);
  const scales = new Float32Array((rows * columns) / size);
  const low = -(2 ** (bits - 1));
  const high = -low - 1;
  for (let block = 0; block < scales.length; block++) {
    const start = block * size;
    const scale = blockScale(weights.subarray(start, start + size), bits);
    scales[block] = scale;
    const inverse = scale === 0 ? 0 : 1 / scale;
    for (let i = start; i < start + size; i++) {
      const quantized = Math.max(low, Math.min(high, Math.round(weights[i]! * inverse))) - low;
      if (bits === 8) values[i] = quantized;
      else values[i >> 1]! |= i % 2 === 0 ? quantized : quantized << 4;
    }
  }
  return { values, scales };
}

/** 8 bits: the largest magnitude over 127. 4 bits: the extreme value takes the code -8, as Q4_0 does. */
function blockScale(block: Float32Array, bits: 4 | 8): number {
  let extreme = 0;
  for (const weight of block) if (Math.abs(weight) > Math.abs(extreme)) extreme = weight;
  return Math.fround(bits === 8 ? Math.abs(extreme) / 127 : extreme / -8);
}
