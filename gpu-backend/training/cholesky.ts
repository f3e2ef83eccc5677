/** Linear equations with a positive definite matrix, on plain arrays: ml-matrix takes five times as long for 576². */

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
