/** The K types of ggml: super-blocks of 256, in sub-blocks whose scales are quantized too (ggml-quants.c). */
import { halfToFloat } from './half.ts';

const half = (bytes: Uint8Array, at: number): number => halfToFloat(bytes[at]! | (bytes[at + 1]! << 8));

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
export function dequantizeQ4K(bytes: Uint8Array, out: Float32Array): void {
  const scales = new Uint8Array(8);
  const minimums = new Uint8Array(8);
  for (let at = 0, o = 0; o < out.length; at += 144, o += 256) {
    const d = half(bytes, at);
    const dmin = half(bytes, at + 2);
    unpackScales(bytes, at + 4, scales, minimums);
    for (let group = 0; group < 4; group++) {
      const dLow = d * scales[2 * group]!;
      const mLow = dmin * minimums[2 * group]!;
      const dHigh = d * scales[2 * group + 1]!;
      const mHigh = dmin * minimums[2 * group + 1]!;
      const from = at + 16 + 32 * group;
      const to = o + 64 * group;
      for (let l = 0; l < 32; l++) {
        const q = bytes[from + l]!;
        out[to + l] = dLow * (q & 15) - mLow;
        out[to + l + 32] = dHigh * (q >> 4) - mHigh;
      }
    }
  }
}

/** As Q4_K with a fifth bit: bit 2·group and 2·group + 1 of 32 bytes. */
export function dequantizeQ5K(bytes: Uint8Array, out: Float32Array): void {
  const scales = new Uint8Array(8);
  const minimums = new Uint8Array(8);
  for (let at = 0, o = 0; o < out.length; at += 176, o += 256) {
    const d = half(bytes, at);
    const dmin = half(bytes, at + 2);
    unpackScales(bytes, at + 4, scales, minimums);
    for (let group = 0; group < 4; group++) {
      const dLow = d * scales[2 * group]!;
      const mLow = dmin * minimums[2 * group]!;
      const dHigh = d * scales[2 * group + 1]!;
      const mHigh = dmin * minimums[2 * group + 1]!;
      const from = at + 48 + 32 * group;
      const to = o + 64 * group;
      for (let l = 0; l < 32; l++) {
        const q = bytes[from + l]!;
        const high = bytes[at + 16 + l]! >> (2 * group);
        out[to + l] = dLow * ((q & 15) | ((high & 1) << 4)) - mLow;
        out[to + l + 32] = dHigh * ((q >> 4) | ((high & 2) << 3)) - mHigh;
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
