/** Principal axes of a set of vectors: fewer dimensions for the static encoder at the least loss. */
import { EigenvalueDecomposition, Matrix } from 'ml-matrix';
import type { Points } from './kmeans.ts';

export type PrincipalAxes = {
  readonly inputs: number;
  readonly outputs: number;
  /** Row-major `[outputs, inputs]`, orthonormal, by falling share of the squared length. */
  readonly axes: Float32Array;
  /** Share of the vectors' squared length that the axes keep, 0 to 1. */
  readonly kept: number;
};

/** Axes of the second moment, not of the covariance: cosines are taken about the origin. */
export function principalAxes(points: Points, outputs: number): PrincipalAxes {
  const inputs = points.dimensions;
  if (outputs > inputs) throw new RangeError(`${outputs} axes of ${inputs} dimensions`);
  const { eigenvectorMatrix, realEigenvalues } = new EigenvalueDecomposition(secondMoment(points), {
    assumeSymmetric: true,
  });
  const order = realEigenvalues.map((_, i) => i).sort((a, b) => realEigenvalues[b]! - realEigenvalues[a]!);
  const axes = new Float32Array(outputs * inputs);
  for (let row = 0; row < outputs; row++) {
    for (let i = 0; i < inputs; i++) axes[row * inputs + i] = eigenvectorMatrix.get(i, order[row]!);
  }
  const sum = (some: number[]) => some.reduce((total, index) => total + realEigenvalues[index]!, 0);
  return { inputs, outputs, axes, kept: sum(order.slice(0, outputs)) / sum(order) };
}

/** `[count, outputs]` from `[count, inputs]`. */
export function project(points: Points, { inputs, outputs, axes }: PrincipalAxes): Points {
  if (points.dimensions !== inputs)
    throw new RangeError(`${points.dimensions} dimensions for axes of ${inputs}`);
  const values = new Float32Array(points.count * outputs);
  for (let point = 0; point < points.count; point++) {
    for (let row = 0; row < outputs; row++) {
      let sum = 0;
      for (let i = 0; i < inputs; i++) sum += axes[row * inputs + i]! * points.values[point * inputs + i]!;
      values[point * outputs + row] = sum;
    }
  }
  return { count: points.count, dimensions: outputs, values };
}

function secondMoment({ count, dimensions, values }: Points): Matrix {
  const sums = new Float64Array(dimensions * dimensions);
  for (let point = 0; point < count; point++) {
    const start = point * dimensions;
    for (let r = 0; r < dimensions; r++) {
      const value = values[start + r]!;
      const row = r * dimensions;
      for (let c = r; c < dimensions; c++) sums[row + c] = sums[row + c]! + value * values[start + c]!;
    }
  }
  const matrix = new Matrix(dimensions, dimensions);
  for (let r = 0; r < dimensions; r++) {
    for (let c = r; c < dimensions; c++) {
      matrix.set(r, c, sums[r * dimensions + c]!);
      matrix.set(c, r, sums[r * dimensions + c]!);
    }
  }
  return matrix;
}
