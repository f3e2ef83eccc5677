/**
 * In which basis the residual stream of an emitted model lives: the file's own, or a rotated one (see
 * `rotation.ts` for why). Matrices are `[outputs, inputs]`; they may be changed in place.
 */
import { rotateColumns, rotateRows } from './rotation.ts';

export type Matrix = { readonly rows: Float32Array; readonly outputs: number; readonly inputs: number };

export type Basis = {
  /** A matrix that multiplies the normalized stream: QKV, gate and up, the head. `norm` is the RMS norm's weight. */
  reads(matrix: Matrix, norm: Float32Array): Matrix;
  /** A matrix whose product is added to the stream: attention's output, down. */
  writes(matrix: Matrix): Matrix;
  /** The embedding's rows, which begin the stream. */
  embeds(matrix: Matrix): Matrix;
  /** What is left of an RMS norm's weight. */
  norm(norm: Float32Array): Float32Array;
  /**
   * Tied embeddings are stored as the head reads them. `[H, H]` (input-major) that turns such a row into the
   * stream's first value, or undefined when the row is that value.
   */
  embeddingFromHead(norm: Float32Array): Float32Array | undefined;
};

export const fileBasis: Basis = {
  reads: (matrix) => matrix,
  writes: (matrix) => matrix,
  embeds: (matrix) => matrix,
  norm: (norm) => norm,
  embeddingFromHead: () => undefined,
};

/** The stream x becomes x·Q. Norm weights g fold into what reads: W·diag(g)·Q; what writes becomes Qᵀ·W. */
export function rotatedBasis(hiddenSize: number): Basis {
  return {
    reads(matrix, norm) {
      scaleColumns(matrix, norm);
      rotateRows(matrix.rows, hiddenSize);
      return matrix;
    },
    writes: (matrix) => ({ ...matrix, rows: rotateColumns(matrix.rows, hiddenSize) }),
    embeds(matrix) {
      rotateRows(matrix.rows, hiddenSize);
      return matrix;
    },
    norm: (norm) => new Float32Array(norm.length).fill(1),
    // The head holds E·diag(g)·Q, the stream begins with E·Q: Qᵀ·diag(1/g)·Q leads from one to the other.
    embeddingFromHead(norm) {
      const matrix = new Float32Array(hiddenSize * hiddenSize);
      norm.forEach((weight, i) => {
        matrix[i * hiddenSize + i] = 1 / weight;
      });
      rotateRows(matrix, hiddenSize);
      return rotateColumns(matrix, hiddenSize);
    },
  };
}

function scaleColumns({ rows, inputs }: Matrix, scale: Float32Array): void {
  for (let i = 0; i < rows.length; i++) rows[i]! *= scale[i % inputs]!;
}
