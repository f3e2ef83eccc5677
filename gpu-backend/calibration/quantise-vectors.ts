/** Token vectors as int8 with one scale a token: a quarter of fp32, and no loss that routing could notice. */

export type QuantisedVectors = { readonly scales: Float32Array; readonly vectors: Int8Array };

/** `vectors` is `[V, dimensions]`; each row is scaled so that its largest number becomes ±127. */
export function quantiseVectors(vectors: Float32Array, dimensions: number): QuantisedVectors {
  const size = vectors.length / dimensions;
  const scales = new Float32Array(size);
  const quantised = new Int8Array(vectors.length);
  for (let row = 0; row < size; row++) {
    const values = vectors.subarray(row * dimensions, (row + 1) * dimensions);
    let largest = 0;
    for (const value of values) largest = Math.max(largest, Math.abs(value));
    const scale = largest / 127;
    scales[row] = scale;
    if (scale === 0) continue;
    for (let i = 0; i < dimensions; i++) quantised[row * dimensions + i] = Math.round(values[i]! / scale);
  }
  return { scales, vectors: quantised };
}
