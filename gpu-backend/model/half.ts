/** IEEE half precision to float, by a table: quantized blocks ask for one or two of 65,536 values each. */

let table: Float32Array | undefined;

/** `bits`: 0 to 65,535. */
export function halfToFloat(bits: number): number {
  table ??= Float32Array.from({ length: 65_536 }, (_, value) => decode(value));
  return table[bits]!;
}

function decode(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
