/**
 * Surrogates in closed form: reduced-rank ridge regression of a block's output y on its normalized input x̂.
 *
 * With C the covariance of x̂ (plus a ridge) and S that of x̂ and y, the full-rank solution is W = C⁻¹S; the best of
 * rank r in the metric of C projects it on the r first right singular vectors of C^½W (Izenman, 1975). Those are the
 * eigenvectors of (C^½W)ᵀC^½W = WᵀS, so no root of C is taken. The tests' golden figures come the long way.
 */
import { EigenvalueDecomposition, Matrix } from 'ml-matrix';
import { highestFirst } from '../../measure.ts';
import type { SurrogateTable } from '../../model/surrogates.ts';
import type { BlockMoments, Moments } from './moments.ts';

/** Ridge, in units of the mean variance of an input channel. */
const RIDGE = 1e-2;

/** Fits the table, in the basis of the moments; a step for each block. `onBlock`: called with the number of blocks that are done. */
export function* fitSurrogates(
  { blocks, sequences }: Moments,
  hiddenSize: number,
  rank: number,
  onBlock: (done: number) => void,
): Generator<void, SurrogateTable> {
  const blockCount = blocks.length;
  const table = {
    blockCount,
    hiddenSize,
    rank,
    a: new Float32Array(blockCount * hiddenSize * rank),
    b: new Float32Array(blockCount * rank * hiddenSize),
    bias: new Float32Array(blockCount * hiddenSize),
    first: new Float32Array(blockCount * hiddenSize),
  };
  for (const [block, moments] of blocks.entries()) {
    const { a, b, bias } = fitBlock(moments, hiddenSize, rank);
    table.a.set(a, block * a.length);
    table.b.set(b, block * b.length);
    table.bias.set(bias, block * hiddenSize);
    table.first.set(
      moments.first.map((sum) => sum / sequences),
      block * hiddenSize,
    );
    onBlock(block + 1);
    yield;
  }
  return table;
}

type BlockFit = { readonly a: Float64Array; readonly b: Float64Array; readonly bias: Float64Array };

export function fitBlock({ xx, xy }: BlockMoments, H: number, rank: number): BlockFit {
  const count = xx[(H + 1) * H + H]!;
  const meanX = Float64Array.from({ length: H }, (_, i) => xx[H * (H + 1) + i]! / count);
  const meanY = Float64Array.from({ length: H }, (_, j) => xy[H * H + j]! / count);
  const C = new Float64Array(H * H);
  const S = new Float64Array(H * H);
  let trace = 0;
  for (let i = 0; i < H; i++) {
    for (let j = 0; j < H; j++) {
      C[i * H + j] = xx[i * (H + 1) + j]! / count - meanX[i]! * meanX[j]!;
      S[i * H + j] = xy[i * H + j]! / count - meanX[i]! * meanY[j]!;
    }
    trace += C[i * H + i]!;
  }
  for (let i = 0; i < H; i++) C[i * H + i]! += (RIDGE * trace) / H;
  const W = solvePositive(C, S, H);
  const V = principalColumns(transposedProduct(W, S, H), H, rank);
  const { a, b } = balanced(product(W, V, H, H, rank), V, H, rank);
  const bias = meanY;
  const inner = product(meanX, a, 1, H, rank);
  const shift = product(inner, b, 1, rank, H);
  for (let j = 0; j < H; j++) bias[j]! -= shift[j]!;
  return { a, b, bias };
}

/** The first `rank` eigenvectors of a symmetric matrix, as columns `[n, rank]`. */
function principalColumns(symmetric: Float64Array, n: number, rank: number): Float64Array {
  const matrix = Matrix.from1DArray(n, n, symmetric);
  const { eigenvectorMatrix, realEigenvalues } = new EigenvalueDecomposition(matrix, {
    assumeSymmetric: true,
  });
  const order = highestFirst(realEigenvalues.keys(), (i) => realEigenvalues[i]!);
  const columns = new Float64Array(n * rank);
  for (let i = 0; i < n; i++)
    for (let k = 0; k < rank; k++) columns[i * rank + k] = eigenvectorMatrix.get(i, order[k]!);
  return columns;
}

/** Rescales columns of A and rows of B = Vᵀ to equal lengths, which suits gradient descent. A·B stays. */
function balanced(
  a: Float64Array,
  V: Float64Array,
  H: number,
  rank: number,
): { a: Float64Array; b: Float64Array } {
  const b = new Float64Array(rank * H);
  for (let k = 0; k < rank; k++) {
    let square = 0;
    for (let i = 0; i < H; i++) square += a[i * rank + k]! ** 2;
    const scale = square ** 0.25;
    for (let i = 0; i < H; i++) {
      b[k * H + i] = V[i * rank + k]! * scale;
      if (scale > 0) a[i * rank + k]! /= scale;
    }
  }
  return { a, b };
}

/** `[rows, inner]` · `[inner, columns]`. */
function product(
  left: Float64Array,
  right: Float64Array,
  rows: number,
  inner: number,
  columns: number,
): Float64Array {
  const out = new Float64Array(rows * columns);
  for (let i = 0; i < rows; i++) {
    for (let k = 0; k < inner; k++) {
      const value = left[i * inner + k]!;
      for (let j = 0; j < columns; j++) out[i * columns + j]! += value * right[k * columns + j]!;
    }
  }
  return out;
}

/** The symmetric part of Wᵀ·S, both `[n, n]`; the other part is only rounding. */
function transposedProduct(W: Float64Array, S: Float64Array, n: number): Float64Array {
  const out = new Float64Array(n * n);
  for (let k = 0; k < n; k++) {
    for (let i = 0; i < n; i++) {
      const value = W[k * n + i]!;
      for (let j = 0; j < n; j++) out[i * n + j]! += value * S[k * n + j]!;
    }
  }
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < i; j++) {
      const mean = (out[i * n + j]! + out[j * n + i]!) / 2;
      out[i * n + j] = mean;
      out[j * n + i] = mean;
    }
  }
  return out;
}

/* Linear equations with a positive definite matrix, on plain arrays: ml-matrix takes five times as long for 576². */

/** X with C·X = S, C `[n, n]` symmetric and positive definite, S `[n, m]`. @throws RangeError when C is not. */
export function solvePositive(C: Float64Array, S: Float64Array, n: number): Float64Array {
  const L = factor(C, n);
  const m = S.length / n;
  const X = S.slice();
  // L·Z = S, then Lᵀ·X = Z, a row of X at a time.
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < i; k++) subtractRow(X, i, k, L[i * n + k]!, m);
    divideRow(X, i, L[i * n + i]!, m);
  }
  for (let i = n - 1; i >= 0; i--) {
    for (let k = i + 1; k < n; k++) subtractRow(X, i, k, L[k * n + i]!, m);
    divideRow(X, i, L[i * n + i]!, m);
  }
  return X;
}

/** Lower triangular L with L·Lᵀ = C. */
function factor(C: Float64Array, n: number): Float64Array {
  const L = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = C[i * n + j]!;
      for (let k = 0; k < j; k++) sum -= L[i * n + k]! * L[j * n + k]!;
      if (i !== j) L[i * n + j] = sum / L[j * n + j]!;
      else if (sum > 0) L[i * n + i] = Math.sqrt(sum);
      else throw new RangeError('the matrix is not positive definite');
    }
  }
  return L;
}

function subtractRow(X: Float64Array, to: number, from: number, factor: number, m: number): void {
  const [a, b] = [to * m, from * m];
  for (let j = 0; j < m; j++) X[a + j]! -= factor * X[b + j]!;
}

function divideRow(X: Float64Array, row: number, divisor: number, m: number): void {
  for (let j = row * m; j < (row + 1) * m; j++) X[j]! /= divisor;
}
