/**
 * Fits token vectors to sentence vectors: the normalised sum of a text's token vectors should point where the
 * full encoder points. Loss 1 − cos, Adam (Kingma and Ba, 2015) on the rows that a batch touches, linear decay.
 *
 * In every epoch each text is fitted without a random part of its tokens (dropout). Without dropout the fit is closer
 * to the teacher, but the meaning is spread over words that happen to occur together. With it every word must carry its
 * own meaning, and prompts of one kind cluster far better.
 *
 * {@link principalAxes} reduces the teacher's dimensions to those of the static encoder. Shapes: N texts, V tokens, D
 * dimensions.
 */
import { EigenvalueDecomposition, Matrix } from 'ml-matrix';
import { highestFirst } from '../../measure.ts';
import { createRandom, permutation } from '../../random.ts';
import type { Points } from './kmeans.ts';

export type FitTexts = {
  /** Token ids of all texts, one after the other. */
  readonly tokenIds: Int32Array;
  /** Where each text starts in `tokenIds`, and the end: `[N + 1]`. */
  readonly offsets: Uint32Array;
  /** Unit vectors to fit, `[N, D]`. */
  readonly targets: Float32Array;
};

export type FitOptions = {
  readonly dimensions: number;
  readonly epochs: number;
  readonly learningRate: number;
  readonly batchTexts: number;
  readonly seed: number;
  /** Share of a text's tokens that a step leaves out, 0 to less than 1. */
  readonly tokenDropout: number;
  readonly onEpoch?: (epoch: number, meanLoss: number) => void;
};

const BETA_1 = 0.9;
const BETA_2 = 0.99;
const EPSILON = 1e-8;

/** The state of Adam and of one batch; rows of tokens outside the batch do not change. */
type State = {
  readonly vectors: Float32Array;
  readonly gradient: Float32Array;
  readonly momentum: Float32Array;
  readonly variance: Float32Array;
  /** Updates of each row so far, for the bias correction. */
  readonly updates: Uint32Array;
  readonly touched: Set<number>;
};

/** Changes `vectors` (`[V, D]`) in place. A step for each batch: many texts take minutes. */
export function* fitVectors(
  vectors: Float32Array,
  texts: FitTexts,
  options: FitOptions,
): Generator<void, void> {
  const { dimensions, epochs, learningRate, batchTexts, seed, tokenDropout } = options;
  const count = texts.offsets.length - 1;
  const random = createRandom(seed);
  const state: State = {
    vectors,
    gradient: new Float32Array(vectors.length),
    momentum: new Float32Array(vectors.length),
    variance: new Float32Array(vectors.length),
    updates: new Uint32Array(vectors.length / dimensions),
    touched: new Set(),
  };
  const stepsTotal = epochs * Math.ceil(count / batchTexts);
  let step = 0;
  for (let epoch = 0; epoch < epochs; epoch++) {
    const order = permutation(count, random);
    let loss = 0;
    for (let from = 0; from < count; from += batchTexts) {
      for (const text of order.subarray(from, from + batchTexts)) {
        const all = texts.tokenIds.subarray(texts.offsets[text], texts.offsets[text + 1]);
        const ids = all.filter(() => random.next() >= tokenDropout);
        const target = texts.targets.subarray(text * dimensions, (text + 1) * dimensions);
        loss += accumulate(state, ids, target);
      }
      update(state, dimensions, learningRate * (1 - step / stepsTotal));
      step++;
      yield;
    }
    options.onEpoch?.(epoch, loss / count);
  }
}

/** Adds the gradient of one text's loss to its tokens' rows; returns the loss. */
function accumulate(state: State, ids: Int32Array, target: Float32Array): number {
  const dimensions = target.length;
  const sum = new Float64Array(dimensions);
  for (const id of ids) {
    for (let i = 0, at = id * dimensions; i < dimensions; i++) sum[i] = sum[i]! + state.vectors[at + i]!;
  }
  let squares = 0;
  let dot = 0;
  for (let i = 0; i < dimensions; i++) {
    squares += sum[i]! * sum[i]!;
    dot += sum[i]! * target[i]!;
  }
  if (squares === 0) return 1;
  const length = Math.sqrt(squares);
  const cosine = dot / length;
  // d(1 − cos)/d sum = (cos · sum/|sum| − target) / |sum|, the same for every token of the text.
  for (let i = 0; i < dimensions; i++) sum[i] = ((cosine * sum[i]!) / length - target[i]!) / length;
  for (const id of ids) {
    state.touched.add(id);
    for (let i = 0, at = id * dimensions; i < dimensions; i++) {
      state.gradient[at + i] = state.gradient[at + i]! + sum[i]!;
    }
  }
  return 1 - cosine;
}

/** One step of Adam on the touched rows. */
function update(state: State, dimensions: number, learningRate: number): void {
  const { vectors, gradient, momentum, variance, updates, touched } = state;
  for (const row of touched) {
    const t = updates[row]! + 1;
    updates[row] = t;
    const correction1 = 1 / (1 - BETA_1 ** t);
    const correction2 = 1 / (1 - BETA_2 ** t);
    for (let i = row * dimensions; i < (row + 1) * dimensions; i++) {
      const g = gradient[i]!;
      gradient[i] = 0;
      momentum[i] = BETA_1 * momentum[i]! + (1 - BETA_1) * g;
      variance[i] = BETA_2 * variance[i]! + (1 - BETA_2) * g * g;
      const size = Math.sqrt(variance[i]! * correction2) + EPSILON;
      vectors[i] = vectors[i]! - (learningRate * momentum[i]! * correction1) / size;
    }
  }
  touched.clear();
}

export type PrincipalAxes = {
  readonly inputs: number;
  readonly outputs: number;
  /** Row-major `[outputs, inputs]`, orthonormal, the axis with the largest share of the squared length first. */
  readonly axes: Float32Array;
};

/**
 * The axes that keep most of the squared length: eigenvectors of the second moment, not of the covariance, since
 * cosines are taken about the origin.
 */
export function principalAxes(points: Points, outputs: number): PrincipalAxes {
  const inputs = points.dimensions;
  if (outputs > inputs) throw new RangeError(`${outputs} axes of ${inputs} dimensions`);
  const { eigenvectorMatrix, realEigenvalues } = new EigenvalueDecomposition(secondMoment(points), {
    assumeSymmetric: true,
  });
  const order = highestFirst(realEigenvalues.keys(), (i) => realEigenvalues[i]!);
  const axes = new Float32Array(outputs * inputs);
  for (let row = 0; row < outputs; row++) {
    for (let i = 0; i < inputs; i++) axes[row * inputs + i] = eigenvectorMatrix.get(i, order[row]!);
  }
  return { inputs, outputs, axes };
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
