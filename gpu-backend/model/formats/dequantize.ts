/**
 * Tensor types of GGUF and their values in fp32. Block layouts and formulas: ggml-common.h and ggml-quants.c of
 * https://github.com/ggml-org/ggml. Products of a block's scale and a quant are exact in double precision, so
 * that one rounding to fp32 gives what the reference gives, bit for bit.
 */
import {
  dequantizeIQ4NL,
  dequantizeIQ4XS,
  dequantizeQ2K,
  dequantizeQ3K,
  dequantizeQ4K,
  dequantizeQ5K,
  dequantizeQ6K,
  half,
} from './k-quants.ts';

/** Fills `out` (a multiple of `blockSize` floats) from the blocks in `bytes`. */
type Dequantize = (bytes: Uint8Array, out: Float32Array) => void;
export type TensorType = {
  readonly name: string;
  /** Elements of one block. */
  readonly blockSize: number;
  readonly blockBytes: number;
  readonly dequantize: Dequantize;
};

const TENSOR_TYPES: Readonly<Record<number, TensorType>> = {
  0: { name: 'F32', blockSize: 1, blockBytes: 4, dequantize: dequantizeF32 },
  1: { name: 'F16', blockSize: 1, blockBytes: 2, dequantize: dequantizeF16 },
  2: { name: 'Q4_0', blockSize: 32, blockBytes: 18, dequantize: dequantizeQ4_0 },
  3: { name: 'Q4_1', blockSize: 32, blockBytes: 20, dequantize: dequantizeQ4_1 },
  6: { name: 'Q5_0', blockSize: 32, blockBytes: 22, dequantize: dequantizeQ5_0 },
  7: { name: 'Q5_1', blockSize: 32, blockBytes: 24, dequantize: dequantizeQ5_1 },
  8: { name: 'Q8_0', blockSize: 32, blockBytes: 34, dequantize: dequantizeQ8_0 },
  10: { name: 'Q2_K', blockSize: 256, blockBytes: 84, dequantize: dequantizeQ2K },
  11: { name: 'Q3_K', blockSize: 256, blockBytes: 110, dequantize: dequantizeQ3K },
  12: { name: 'Q4_K', blockSize: 256, blockBytes: 144, dequantize: dequantizeQ4K },
  13: { name: 'Q5_K', blockSize: 256, blockBytes: 176, dequantize: dequantizeQ5K },
  14: { name: 'Q6_K', blockSize: 256, blockBytes: 210, dequantize: dequantizeQ6K },
  20: { name: 'IQ4_NL', blockSize: 32, blockBytes: 18, dequantize: dequantizeIQ4NL },
  23: { name: 'IQ4_XS', blockSize: 256, blockBytes: 136, dequantize: dequantizeIQ4XS },
  30: { name: 'BF16', blockSize: 1, blockBytes: 2, dequantize: dequantizeBF16 },
};

/** Types that exist and that we do not read, for the message. */
const OTHER_TYPES: Readonly<Record<number, string>> = {
  16: 'IQ2_XXS',
  17: 'IQ2_XS',
  18: 'IQ3_XXS',
  19: 'IQ1_S',
  21: 'IQ3_S',
  22: 'IQ2_S',
  9: 'Q8_1',
  15: 'Q8_K',
  24: 'I8',
  25: 'I16',
  26: 'I32',
  27: 'I64',
  28: 'F64',
  29: 'IQ1_M',
  34: 'TQ1_0',
  35: 'TQ2_0',
  39: 'MXFP4',
  40: 'NVFP4',
  41: 'Q1_0',
};

export const tensorType = (id: number): TensorType | undefined => TENSOR_TYPES[id];

export function tensorTypeName(id: number): string {
  const supported = Object.values(TENSOR_TYPES).map((type) => type.name);
  return `${OTHER_TYPES[id] ?? `number ${id}`} (supported: ${supported.join(', ')})`;
}

/* Plain floats, and blocks of 32. */

function dequantizeF32(bytes: Uint8Array, out: Float32Array): void {
  new Uint8Array(out.buffer, out.byteOffset, out.byteLength).set(bytes.subarray(0, out.byteLength));
}

function dequantizeF16(bytes: Uint8Array, out: Float32Array): void {
  for (let i = 0; i < out.length; i++) out[i] = half(bytes, 2 * i);
}

/** bfloat16 is the upper half of an fp32. */
function dequantizeBF16(bytes: Uint8Array, out: Float32Array): void {
  const bits = new Uint32Array(out.buffer, out.byteOffset, out.length);
  if (bytes.byteOffset % 2 === 0) {
    const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, bits.length);
    for (let i = 0; i < bits.length; i++) bits[i] = halves[i]! << 16;
    return;
  }
  for (let i = 0; i < bits.length; i++) bits[i] = (bytes[2 * i]! << 16) | (bytes[2 * i + 1]! << 24);
}

/** x = d·(q − 8); the low nibbles are the first half of the block. */
function dequantizeQ4_0(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 18, o += 32) {
    const d = half(bytes, at);
    for (let j = 0; j < 16; j++) {
      const q = bytes[at + 2 + j]!;
      out[o + j] = d * ((q & 15) - 8);
      out[o + j + 16] = d * ((q >> 4) - 8);
    }
  }
}

/** x = d·q + m. */
function dequantizeQ4_1(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 20, o += 32) {
    const d = half(bytes, at);
    const m = half(bytes, at + 2);
    for (let j = 0; j < 16; j++) {
      const q = bytes[at + 4 + j]!;
      out[o + j] = d * (q & 15) + m;
      out[o + j + 16] = d * (q >> 4) + m;
    }
  }
}

const fifthBits = (bytes: Uint8Array, at: number): number =>
  bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24);

/** x = d·(q − 16); four bits in nibbles, the fifth in a word of its own. */
function dequantizeQ5_0(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 22, o += 32) {
    const d = half(bytes, at);
    const high = fifthBits(bytes, at + 2);
    for (let j = 0; j < 16; j++) {
      const q = bytes[at + 6 + j]!;
      out[o + j] = d * (((q & 15) | (((high >>> j) & 1) << 4)) - 16);
      out[o + j + 16] = d * (((q >> 4) | (((high >>> (j + 16)) & 1) << 4)) - 16);
    }
  }
}

/** x = d·q + m, five bits. */
function dequantizeQ5_1(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 24, o += 32) {
    const d = half(bytes, at);
    const m = half(bytes, at + 2);
    const high = fifthBits(bytes, at + 4);
    for (let j = 0; j < 16; j++) {
      const q = bytes[at + 8 + j]!;
      out[o + j] = d * ((q & 15) | (((high >>> j) & 1) << 4)) + m;
      out[o + j + 16] = d * ((q >> 4) | (((high >>> (j + 16)) & 1) << 4)) + m;
    }
  }
}

/** x = d·q, q a signed byte. */
function dequantizeQ8_0(bytes: Uint8Array, out: Float32Array): void {
  const signed = new Int8Array(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let at = 0, o = 0; o < out.length; at += 34, o += 32) {
    const d = half(bytes, at);
    for (let j = 0; j < 32; j++) out[o + j] = d * signed[at + 2 + j]!;
  }
}
