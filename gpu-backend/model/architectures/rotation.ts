/**
 * Orthogonal changes of basis (QuaRot, arXiv 2404.00456): of the residual stream, folded into the weights, and of values inside of
 * layers.
 *
 * Quantized products also quantize activations. A few channels of the residual stream are far larger than the rest, and take
 * the precision from the channels that share their scale. In a rotated basis no channel is an outlier.
 * The model computes the same function: RMS norms commute with a rotation once their weights are folded into the matrices
 * that follow them. Where blocks end with a norm, the graph rotates behind it, in blocks of neighbours, as the whole stream would
 * take too many multiply-adds.
 */
import type { ModelConfig } from '../model-source.ts';

/** Rotates every row of `rows` `[count, width]` in place: row ← row · Q, Q = Hadamard(2^k) ⊗ DCT(width / 2^k). */
export function rotateRows(rows: Float32Array, width: number): void {
  const { power, rest } = factors(width);
  const dct = dctMatrix(rest);
  changeRows(rows, width, (row) => {
    hadamard(row, power, rest);
    applyDct(row, power, rest, dct);
  });
}

/** The inverse of {@link rotateRows}: row ← row · Qᵀ. The Hadamard transform inverts itself; the DCT's inverse is its transpose. */
export function unrotateRows(rows: Float32Array, width: number): void {
  const { power, rest } = factors(width);
  const dct = transposedSquare(dctMatrix(rest), rest);
  changeRows(rows, width, (row) => {
    applyDct(row, power, rest, dct);
    hadamard(row, power, rest);
  });
}

/** Changes each row in double precision. */
function changeRows(rows: Float32Array, width: number, change: (row: Float64Array) => void): void {
  const scratch = new Float64Array(width);
  for (let start = 0; start < rows.length; start += width) {
    for (let i = 0; i < width; i++) scratch[i] = rows[start + i]!;
    change(scratch);
    for (let i = 0; i < width; i++) rows[start + i] = scratch[i]!;
  }
}

/** Columns that are rotated together, as neighbours share cache lines. */
const COLUMNS_TOGETHER = 8;

/** Rotates every column of `matrix` `[width, columns]` in place: matrix ← Qᵀ · matrix. */
export function rotateColumns(matrix: Float32Array, width: number): Float32Array {
  const columns = matrix.length / width;
  const { power, rest } = factors(width);
  const dct = dctMatrix(rest);
  const scratch = Array.from({ length: COLUMNS_TOGETHER }, () => new Float64Array(width));
  for (let from = 0; from < columns; from += COLUMNS_TOGETHER) {
    const count = Math.min(COLUMNS_TOGETHER, columns - from);
    for (let row = 0; row < width; row++) {
      const at = row * columns + from;
      for (let k = 0; k < count; k++) scratch[k]![row] = matrix[at + k]!;
    }
    for (let k = 0; k < count; k++) {
      hadamard(scratch[k]!, power, rest);
      applyDct(scratch[k]!, power, rest, dct);
    }
    for (let row = 0; row < width; row++) {
      const at = row * columns + from;
      for (let k = 0; k < count; k++) matrix[at + k] = scratch[k]![row]!;
    }
  }
  return matrix;
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

/**
 * Fast Walsh-Hadamard transform, orthonormal, over the block index of `power` blocks of `rest` values. Each pass does two
 * butterfly stages, which halves the memory traffic and gives the same sums.
 */
function hadamard(values: Float64Array, power: number, rest: number): void {
  const scale = 1 / Math.sqrt(power);
  let half = rest;
  if (half === 1 && values.length >= 4) {
    // The first pass is unrolled: with inner loops of one iteration it would take half of the time.
    for (let i = 0; i < values.length; i += 4) {
      const a = values[i]!;
      const b = values[i + 1]!;
      const c = values[i + 2]!;
      const d = values[i + 3]!;
      values[i] = a + b + (c + d);
      values[i + 1] = a - b + (c - d);
      values[i + 2] = a + b - (c + d);
      values[i + 3] = a - b - (c - d);
    }
    half = 4;
  }
  for (; 4 * half <= values.length; half *= 4) {
    for (let start = 0; start < values.length; start += 4 * half) {
      for (let i = start; i < start + half; i++) {
        const a = values[i]!;
        const b = values[i + half]!;
        const c = values[i + 2 * half]!;
        const d = values[i + 3 * half]!;
        values[i] = a + b + (c + d);
        values[i + half] = a - b + (c - d);
        values[i + 2 * half] = a + b - (c + d);
        values[i + 3 * half] = a - b - (c - d);
      }
    }
  }
  if (half < values.length) {
    for (let i = 0; i < half; i++) {
      const a = values[i]!;
      const b = values[i + half]!;
      values[i] = a + b;
      values[i + half] = a - b;
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

/*
 * The basis of the residual stream in an imported model: the file's own, or the rotated basis (the first lines of this file
 * say why). Matrices are `[outputs, inputs]`; they may be changed in place.
 */

export type Matrix = { readonly rows: Float32Array; readonly outputs: number; readonly inputs: number };

export type Basis = {
  /** A matrix that multiplies the normalized stream: QKV, gate and up, the head. `norm` is the RMS norm's weight. */
  reads(matrix: Matrix, norm: Float32Array): Matrix;
  /** How many neighbours of the stream are rotated together; 1: none. */
  readonly stream: number;
  /** The same of a block's last product: 1 where a norm is behind it, as the graph rotates behind the norm. */
  readonly written: number;
  /** A matrix whose product is added to the stream, or goes to a norm before that: attention's output, down. */
  writes(matrix: Matrix): Matrix;
  /** The embedding's rows, which begin the stream. */
  embeds(matrix: Matrix): Matrix;
  /** The RMS norm's weight that remains after folding. */
  norm(norm: Float32Array): Float32Array;
  /** How many neighbours are rotated together in rows of `width` values inside of a layer (last part of this file); 1: none. */
  inside(width: number): number;
  /**
   * For a tied embedding that is stored once with the head: the matrix `[H, H]` (input-major) that turns a row of the head
   * into the stream's first value; undefined when they are equal.
   */
  embeddingFromHead(norm: Float32Array): Float32Array | undefined;
};

export const fileBasis: Basis = {
  stream: 1,
  written: 1,
  reads: (matrix) => matrix,
  writes: (matrix) => matrix,
  embeds: (matrix) => matrix,
  norm: (norm) => norm,
  inside: () => 1,
  embeddingFromHead: () => undefined,
};

/**
 * The stream x becomes x·Q. A matrix that reads x becomes W·diag(g)·Q, with the norm's weights g. A matrix that writes x
 * becomes Qᵀ·W. With `rotatesInside`, values inside of a layer are rotated as well.
 */
export function rotatedBasis(config: StreamConfig, rotatesInside: boolean): Basis {
  const { hiddenSize, postNorms } = config;
  const stream = streamBlock(config);
  const written = postNorms ? 1 : stream;
  return {
    stream,
    written,
    inside: (width) => (rotatesInside ? blockWidth(width) : 1),
    reads(matrix, norm) {
      scaleColumns(matrix.rows, norm);
      rotateRows(matrix.rows, stream);
      return matrix;
    },
    writes(matrix) {
      rotateOutputs(matrix.rows, matrix.inputs, written);
      return matrix;
    },
    embeds(matrix) {
      rotateRows(matrix.rows, stream);
      return matrix;
    },
    norm: (norm) => new Float32Array(norm.length).fill(1),
    // The head has E·diag(g)·Q, the stream begins with E·Q: multiply by Qᵀ·diag(1/g)·Q.
    embeddingFromHead(norm) {
      const matrix = new Float32Array(hiddenSize * hiddenSize);
      norm.forEach((weight, i) => {
        matrix[i * hiddenSize + i] = 1 / weight;
      });
      rotateRows(matrix, stream);
      rotateOutputs(matrix, hiddenSize, stream);
      return matrix;
    },
  };
}

type StreamConfig = Pick<ModelConfig, 'hiddenSize' | 'postNorms'>;

/** How many neighbours of the stream are rotated together. */
export const streamBlock = ({ hiddenSize, postNorms }: StreamConfig): number =>
  postNorms ? blockWidth(hiddenSize) : hiddenSize;

export function scaleColumns(rows: Float32Array, scale: Float32Array): void {
  const inputs = scale.length;
  for (let start = 0; start < rows.length; start += inputs)
    for (let i = 0; i < inputs; i++) rows[start + i]! *= scale[i]!;
}

/*
 * Rotations inside of a layer: V of each head, which attention passes on unchanged to the output's matrix, and what an FFN
 * computes before down. A few of these values are far larger than the others of their row, which lose their codes' precision.
 * V's rotation is folded into the weights on both sides. The FFN's is a product in the graph (`column-products.ts`), as its
 * activation is not linear. Neighbours are rotated in blocks, since a whole row takes too many multiply-adds.
 */

/** A wider block takes more multiply-adds, and gains little (LOG.md). */
const BLOCK_MAX = 64;

/** A power of two: such a rotation is symmetric and undoes itself. */
const blockWidth = (width: number): number => Math.min(BLOCK_MAX, width & -width);

/** The rotation of `size` neighbours, `[size, size]`. */
export function rotationMatrix(size: number): Float32Array {
  const matrix = Float32Array.from({ length: size * size }, (_, i) => (i % (size + 1) === 0 ? 1 : 0));
  rotateRows(matrix, size);
  return matrix;
}

/** Changes a matrix in place for inputs that are rotated, `size` neighbours together. */
export function rotateInputs(rows: Float32Array, size: number): void {
  if (size > 1) rotateRows(rows, size);
}

/** Changes a matrix `[outputs, inputs]` in place so that its outputs are rotated, `size` neighbours together. */
export function rotateOutputs(rows: Float32Array, inputs: number, size: number): void {
  if (size === 1) return;
  for (let at = 0; at < rows.length; at += size * inputs)
    rotateColumns(rows.subarray(at, at + size * inputs), size);
}
