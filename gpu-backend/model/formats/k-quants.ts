/**
 * The K types of ggml (super-blocks of 256 values, in sub-blocks whose scales are quantized too), and the two IQ types
 * of four bits, whose codes stand for values of a fixed table (ggml-quants.c).
 */

/** x = d·scale·q − dmin·minimum, q of 2 bits; 128 values share 32 bytes; scale and minimum of 4 bits for 16 values. */
export function dequantizeQ2K(bytes: Uint8Array, out: Float32Array): void {
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
export function dequantizeQ3K(bytes: Uint8Array, out: Float32Array): void {
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
export const dequantizeQ4K = (bytes: Uint8Array, out: Float32Array): void =>
  withMinimums(bytes, out, { block_bytes: 144, codesAt: 16, fifthAt: undefined });

/** As Q4_K with a fifth bit: bit 2·group and 2·group + 1 of 32 bytes. */
export const dequantizeQ5K = (bytes: Uint8Array, out: Float32Array): void =>
  withMinimums(bytes, out, { block_bytes: 176, codesAt: 48, fifthAt: 16 });

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
export function dequantizeQ6K(bytes: Uint8Array, out: Float32Array): void {
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

/** What the four bits of an IQ4 type stand for. */
const IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113] as const;

/** x = d·value of q; the low nibbles are the first half of the block of 32. */
export function dequantizeIQ4NL(bytes: Uint8Array, out: Float32Array): void {
  for (let at = 0, o = 0; o < out.length; at += 18, o += 32) iq4Block(bytes, at + 2, half(bytes, at), out, o);
}

/** x = d·(scale − 32)·value of q, in super-blocks of eight blocks with scales of 6 bits: four apart from two. */
export function dequantizeIQ4XS(bytes: Uint8Array, out: Float32Array): void {
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

/* IEEE half precision to float, by a table: quantized blocks ask for one or two of 65,536 values each. */

let table: Float32Array | undefined;

export function half(bytes: Uint8Array, at: number): number {
  table ??= Float32Array.from({ length: 65_536 }, (_, value) => decode(value));
  return table[bytes[at]! | (bytes[at + 1]! << 8)]!;
}

function decode(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
