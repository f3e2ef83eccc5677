/**
 * An orthogonal change of basis of the residual stream, folded into the weights (QuaRot, arXiv 2404.00456).
 *
 * 8-bit products quantize activations too, a block at a time, and a few channels of the residual stream are
 * far larger than the rest: they cost their block its precision. In a rotated basis no channel stands out.
 * The result is the same function: RMS norms commute with a rotation once their weights are folded into the
 * matrices behind them.
 */

/** Rotates every row of `rows` `[count, width]` in place: row ← row · Q, Q = Hadamard(2^k) ⊗ DCT(width / 2^k). */
export function rotateRows(rows: Float32Array, width: number): void {
  const { power, rest } = factors(width);
  const dct = dctMatrix(rest);
  const scratch = new Float64Array(width);
  for (let start = 0; start < rows.length; start += width) {
    for (let i = 0; i < width; i++) scratch[i] = rows[start + i]!;
    hadamard(scratch, power, rest);
    applyDct(scratch, power, rest, dct);
    for (let i = 0; i < width; i++) rows[start + i] = scratch[i]!;
  }
}

/** The inverse of {@link rotateRows}: row ← row · Qᵀ. A Hadamard transform undoes itself, the transposed DCT the DCT. */
export function unrotateRows(rows: Float32Array, width: number): void {
  const { power, rest } = factors(width);
  const dct = transposedSquare(dctMatrix(rest), rest);
  const scratch = new Float64Array(width);
  for (let start = 0; start < rows.length; start += width) {
    for (let i = 0; i < width; i++) scratch[i] = rows[start + i]!;
    applyDct(scratch, power, rest, dct);
    hadamard(scratch, power, rest);
    for (let i = 0; i < width; i++) rows[start + i] = scratch[i]!;
  }
}

/** Rotates every column of `matrix` `[width, columns]` in place: matrix ← Qᵀ · matrix. */
export function rotateColumns(matrix: Float32Array, width: number): Float32Array {
  const columns = matrix.length / width;
  const transposed = transpose(matrix, width, columns);
  rotateRows(transposed, width);
  return transpose(transposed, columns, width);
}

export function transpose(matrix: Float32Array, rows: number, columns: number): Float32Array {
  const out = new Float32Array(matrix.length);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++)
      out[column * rows + row] = matrix[row * columns + column]!;
  }
  return out;
}

/** width = power · rest, power the largest power of two. */
function factors(width: number): { power: number; rest: number } {
  const power = width & -width;
  return { power, rest: width / power };
}

/** The orthonormal DCT-II of size n: `[n, n]`, rows are frequencies. */
function dctMatrix(n: number): Float64Array {
  const matrix = new Float64Array(n * n);
  for (let k = 0; k < n; k++) {
    const scale = Math.sqrt((k === 0 ? 1 : 2) / n);
    for (let i = 0; i < n; i++) matrix[k * n + i] = scale * Math.cos((Math.PI * (i + 0.5) * k) / n);
  }
  return matrix;
}

function transposedSquare(matrix: Float64Array, n: number): Float64Array {
  return matrix.map((_, i) => matrix[(i % n) * n + Math.floor(i / n)]!);
}

/** Fast Walsh-Hadamard transform over the index of `power` blocks of `rest` values, orthonormal. */
function hadamard(values: Float64Array, power: number, rest: number): void {
  const scale = 1 / Math.sqrt(power);
  for (let half = rest; half < values.length; half *= 2) {
    for (let start = 0; start < values.length; start += 2 * half) {
      for (let i = start; i < start + half; i++) {
        const a = values[i]!;
        const b = values[i + half]!;
        values[i] = a + b;
        values[i + half] = a - b;
      }
    }
  }
  for (let i = 0; i < values.length; i++) values[i]! *= scale;
}

/** The DCT within each of the `power` blocks. */
function applyDct(values: Float64Array, power: number, rest: number, dct: Float64Array): void {
  if (rest === 1) return;
  const block = new Float64Array(rest);
  for (let start = 0; start < power * rest; start += rest) {
    for (let k = 0; k < rest; k++) {
      let sum = 0;
      for (let i = 0; i < rest; i++) sum += values[start + i]! * dct[k * rest + i]!;
      block[k] = sum;
    }
    for (let k = 0; k < rest; k++) values[start + k] = block[k]!;
  }
}
