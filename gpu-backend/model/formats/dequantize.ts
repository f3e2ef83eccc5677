/**
 * GGUF's tensor types, and their conversion to fp32. Block layouts and formulas: ggml-common.h and ggml-quants.c of
 * https://github.com/ggml-org/ggml. The product of a block's scale and a quant is exact in double precision, so rounding it
 * to fp32 gives the same bits as the reference.
 */

/** Fills `out` (a multiple of `blockSize` floats) from the blocks in `bytes`, which begin at an even byte of their buffer. */
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

/** Names of unsupported types, for error messages. */
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

export const elementsOf = (shape: readonly number[]): number =>
  shape.reduce((product, size) => product * size, 1);

/** What so many elements take, which are whole blocks. */
export const bytesOf = ({ blockSize, blockBytes }: TensorType, elements: number): number =>
  (elements / blockSize) * blockBytes;

export function tensorTypeName(id: number): string {
  const supported = Object.values(TENSOR_TYPES).map((type) => type.name);
  return `${OTHER_TYPES[id] ?? `number ${id}`} (supported: ${supported.join(', ')})`;
}

/* Plain floats, and blocks of 32. */

function dequantizeF32(bytes: Uint8Array, out: Float32Array): void {
  new Uint8Array(out.buffer, out.byteOffset, out.byteLength).set(bytes.subarray(0, out.byteLength));
}

function dequantizeF16(bytes: Uint8Array, out: Float32Array): void {
  out.set(new Float16Array(bytes.buffer, bytes.byteOffset, out.length));
}

/** bfloat16 is the upper half of an fp32. */
function dequantizeBF16(bytes: Uint8Array, out: Float32Array): void {
  const bits = new Uint32Array(out.buffer, out.byteOffset, out.length);
  const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, bits.length);
  for (let i = 0; i < bits.length; i++) bits[i] = halves[i]! << 16;
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

/*
 * The K types of ggml (super-blocks of 256 values, in sub-blocks whose scales are quantized too), and the two four-bit IQ
 * types, whose codes index a fixed table (ggml-quants.c).
 */

/** x = d·scale·q − dmin·minimum, q of 2 bits; 128 values share 32 bytes; scale and minimum of 4 bits for 16 values. */
function dequantizeQ2K(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 84, o += 256) {
    const d = half(bytes, at + 80);
    const dmin = half(bytes, at + 82);
    for (let i = 0; i < 256; i++) {
      const packed = bytes[at + (i >> 4)]!;
      const q = (bytes[at + 16 + 32 * (i >> 7) + (i & 31)]! >> (2 * ((i >> 5) & 3))) & 3;
      out[o + i] = d * (packed & 15) * q - dmin * (packed >> 4);
    }
  }
}

/** x = d·(scale − 32)·q, q of 2 bits, less 4 where its bit of `hmask` is not set; a scale of 6 bits for 16 values. */
function dequantizeQ3K(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 110, o += 256) {
    const d = half(bytes, at + 108);
    for (let group = 0; group < 16; group++) {
      const low = (bytes[at + 96 + (group & 7)]! >> (4 * (group >> 3))) & 15;
      const high = (bytes[at + 104 + (group & 3)]! >> (2 * (group >> 2))) & 3;
      const scale = d * ((low | (high << 4)) - 32);
      for (let i = 16 * group; i < 16 * group + 16; i++) {
        const q = (bytes[at + 32 + 32 * (i >> 7) + (i & 31)]! >> (2 * ((i >> 5) & 3))) & 3;
        const kept = (bytes[at + (i & 31)]! >> (i >> 5)) & 1;
        out[o + i] = scale * (q - (kept === 1 ? 0 : 4));
      }
    }
  }
}

/**
 * Eight 6-bit scales and eight 6-bit minimums in 12 bytes, as `get_scale_min_k4` unpacks them.
 * Fills `scales[0..7]` and `minimums[0..7]`.
 */
function unpackScales(bytes: Uint8Array, at: number, scales: Uint8Array, minimums: Uint8Array): void {
  for (let j = 0; j < 4; j++) {
    const low = bytes[at + j]!;
    const middle = bytes[at + j + 4]!;
    const packed = bytes[at + j + 8]!;
    scales[j] = low & 63;
    minimums[j] = middle & 63;
    scales[j + 4] = (packed & 15) | ((low >> 6) << 4);
    minimums[j + 4] = (packed >> 4) | ((middle >> 6) << 4);
  }
}

/** x = d·scale·q − dmin·minimum, q of 4 bits; 64 values share 32 bytes, low nibbles first. */
function dequantizeQ4K(bytes: Uint8Array, out: Float32Array): void {
  withMinimums(bytes, out, { block_bytes: 144, codesAt: 16, fifthAt: undefined });
}

/** Like Q4_K, with a fifth bit: bits 2·group and 2·group + 1 of 32 bytes. */
function dequantizeQ5K(bytes: Uint8Array, out: Float32Array): void {
  withMinimums(bytes, out, { block_bytes: 176, codesAt: 48, fifthAt: 16 });
}

type MinimumsLayout = {
  readonly block_bytes: number;
  readonly codesAt: number;
  readonly fifthAt: number | undefined;
};

function withMinimums(
  bytes: Uint8Array,
  out: Float32Array,
  { block_bytes, codesAt, fifthAt }: MinimumsLayout,
): void {
  const scales = new Uint8Array(8);
  const minimums = new Uint8Array(8);
  for (let at = 0, o = 0; o < out.length; at += block_bytes, o += 256) {
    const d = half(bytes, at);
    const dmin = half(bytes, at + 2);
    unpackScales(bytes, at + 4, scales, minimums);
    for (let group = 0; group < 4; group++) {
      const dLow = d * scales[2 * group]!;
      const mLow = dmin * minimums[2 * group]!;
      const dHigh = d * scales[2 * group + 1]!;
      const mHigh = dmin * minimums[2 * group + 1]!;
      const from = at + codesAt + 32 * group;
      const to = o + 64 * group;
      for (let l = 0; l < 32; l++) {
        const q = bytes[from + l]!;
        const fifth = fifthAt === undefined ? 0 : bytes[at + fifthAt + l]! >> (2 * group);
        out[to + l] = dLow * ((q & 15) | ((fifth & 1) << 4)) - mLow;
        out[to + l + 32] = dHigh * ((q >> 4) | ((fifth & 2) << 3)) - mHigh;
      }
    }
  }
}

/** x = d·scale·(q − 32), q of 6 bits: four in `ql`, two in `qh`; a signed scale for every 16 values. */
function dequantizeQ6K(bytes: Uint8Array, out: Float32Array): void {
  const signed = new Int8Array(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let at = 0, o = 0; o < out.length; at += 210, o += 256) {
    const d = half(bytes, at + 208);
    for (let part = 0; part < 2; part++) {
      const ql = at + 64 * part;
      const qh = at + 128 + 32 * part;
      const scale = at + 192 + 8 * part;
      const to = o + 128 * part;
      for (let l = 0; l < 32; l++) {
        const s = scale + (l >> 4);
        const low = bytes[ql + l]!;
        const low32 = bytes[ql + l + 32]!;
        const high = bytes[qh + l]!;
        out[to + l] = d * signed[s]! * (((low & 15) | ((high & 3) << 4)) - 32);
        out[to + l + 32] = d * signed[s + 2]! * (((low32 & 15) | (((high >> 2) & 3) << 4)) - 32);
        out[to + l + 64] = d * signed[s + 4]! * (((low >> 4) | (((high >> 4) & 3) << 4)) - 32);
        out[to + l + 96] = d * signed[s + 6]! * (((low32 >> 4) | ((high >> 6) << 4)) - 32);
      }
    }
  }
}

/** The values of an IQ4 type's four-bit codes. */
const IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113] as const;

/** x = d·value of q; the low nibbles are the first half of the block of 32. */
function dequantizeIQ4NL(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 18, o += 32) iq4Block(bytes, at + 2, half(bytes, at), out, o);
}

/** x = d·(scale − 32)·value of q, in super-blocks of eight blocks with scales of 6 bits: four apart from two. */
function dequantizeIQ4XS(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 136, o += 256) {
    const d = half(bytes, at);
    const high = bytes[at + 2]! | (bytes[at + 3]! << 8);
    for (let block = 0; block < 8; block++) {
      const low = (bytes[at + 4 + (block >> 1)]! >> (4 * (block & 1))) & 15;
      const scale = low | (((high >> (2 * block)) & 3) << 4);
      iq4Block(bytes, at + 8 + 16 * block, d * (scale - 32), out, o + 32 * block);
    }
  }
}

function iq4Block(bytes: Uint8Array, at: number, scale: number, out: Float32Array, o: number): void {
  for (let j = 0; j < 16; j++) {
    const q = bytes[at + j]!;
    out[o + j] = scale * IQ4_VALUES[q & 15]!;
    out[o + j + 16] = scale * IQ4_VALUES[q >> 4]!;
  }
}

/* The scales of blocks, in half precision: a table of all 65,536 values, as each block has one or two. */

let table: Float32Array | undefined;

function half(bytes: Uint8Array, at: number): number {
  table ??= Float32Array.from(
    new Float16Array(Uint16Array.from({ length: 65_536 }, (_, bits) => bits).buffer),
  );
  return table[bytes[at]! | (bytes[at + 1]! << 8)]!;
}
