/**
 * Rounds a matrix W `[N, K]` to few bits with error feedback: the codes Q minimize the error of its product with real
 * inputs, tr((W − Q)·H·(W − Q)ᵀ), H = the inputs' second moments (GPTQ, arXiv 2210.17323).
 *
 * With H = RᵀR, R upper triangular, the error of a row is Σ_j R_jj²·(c_j − q_j)², where c_j = w_j + Σ_{i>j} R_ji/R_jj·(w_i − q_i)
 * is the value of column j that compensates the errors of the columns after it. So columns are rounded from the last to the
 * first, each to the code nearest to its c_j (Babai's nearest plane, which is GPTQ run backwards). A block's scale and zero
 * point are chosen in its turn, for these compensating values.
 * Then each block is solved again against the errors of all other blocks, in several passes; that never raises the error.
 * By column, the scales are those of the weights, and columns are rounded once: at 8 bits that is enough.
 *
 * Limits: N·K² multiply-adds a pass in ONNX Runtime, N·K·blockSize·3 here; K³/6 for R. H and R take 16·K² bytes.
 */
import type { Matrix } from '../architectures/rotation.ts';
import type { Products } from './layer-steps.ts';
import {
  blocksOf,
  type ColumnCodes,
  checkForm,
  columnCode,
  columnScales,
  type QuantCodes,
  type QuantForm,
} from './quantize.ts';

/** Damping, a share of the mean second moment: an input that the text hardly uses must not seem free of error. */
const DAMPING = 0.01;

type FeedbackOptions = {
  /** `[K, K]`, symmetric. */
  readonly moments: Float64Array;
  readonly form: QuantForm;
  /** Refinement passes over all blocks, after the first. */
  readonly passes: number;
  readonly products: Products;
  /** Told after each visit of a block which fraction of them is done. */
  readonly onProgress?: (fraction: number) => void;
};

export async function quantizeWithFeedback(
  { rows: weights, outputs, inputs }: Matrix,
  { moments, form, passes, products, onProgress }: FeedbackOptions,
): Promise<QuantCodes> {
  checkForm(inputs, form);
  const damped = damp(moments, inputs);
  const work: Work = {
    weights,
    outputs,
    inputs,
    form,
    errors: new Float32Array(weights.length),
    codes: {
      ...form,
      rows: outputs,
      columns: inputs,
      codes: new Uint8Array(weights.length),
      scales: new Float32Array(weights.length / form.blockSize),
      zeroPoints: new Uint8Array(weights.length / form.blockSize),
    },
  };
  const factor = await factorize(damped, inputs, products);
  const blocks = blocksOf(inputs, form);
  for (let visit = 0; visit < blocks * (1 + passes); visit++) {
    const block = blocks - 1 - (visit % blocks);
    if (visit < blocks) await firstVisit(work, factor, block, products);
    else await visitAgain(work, damped, block, products);
    onProgress?.((visit + 1) / (blocks * (1 + passes)));
  }
  return work.codes;
}

/** Inputs whose feedback is computed in one product. */
const COLUMNS_TOGETHER = 32;

/** As {@link quantizeWithFeedback}, to codes by column. */
export async function roundColumnsWithFeedback(
  { rows: weights, outputs, inputs: K }: Matrix,
  { moments, products }: Pick<FeedbackOptions, 'moments' | 'products'>,
): Promise<ColumnCodes> {
  const scales = columnScales(weights, outputs, K);
  const codes = new Int8Array(weights.length);
  const errors = new Float32Array(weights.length);
  const factor = await factorize(damp(moments, K), K, products);
  for (let end = K; end > 0; end -= COLUMNS_TOGETHER) {
    const from = Math.max(0, end - COLUMNS_TOGETHER);
    const B = end - from;
    const rows = upperRows(factor, K, from, B);
    const square = columnsOf(rows, K, from, B);
    const feedback = await products.multiply(errors, rows, K);
    for (let row = 0; row < outputs; row++) {
      const at = row * K + from;
      for (let j = B - 1; j >= 0; j--) {
        let owed = feedback[row * B + j]!;
        for (let i = j + 1; i < B; i++) owed += square[j * B + i]! * errors[at + i]!;
        const code = columnCode(weights[at + j]! + owed / square[j * B + j]!, scales[row]!);
        codes[at + j] = code;
        errors[at + j] = weights[at + j]! - code * scales[row]!;
      }
    }
  }
  return { rows: outputs, columns: K, codes, scales };
}

type Work = {
  readonly weights: Float32Array;
  readonly outputs: number;
  readonly inputs: number;
  readonly form: QuantForm;
  /** W − Q where columns are rounded, 0 elsewhere, `[N, K]`. */
  readonly errors: Float32Array;
  readonly codes: QuantCodes;
};

async function firstVisit(
  work: Work,
  factor: Float32Array,
  block: number,
  products: Products,
): Promise<void> {
  const { weights, outputs, inputs: K, form } = work;
  const { blockSize: B } = form;
  const from = block * B;
  const rows = upperRows(factor, K, from, B);
  const feedback = await products.multiply(work.errors, rows, K);
  const solver = new BlockSolver(form, columnsOf(rows, K, from, B));
  const target = new Float64Array(B);
  for (let row = 0; row < outputs; row++) {
    const at = row * K + from;
    for (let j = B - 1; j >= 0; j--) {
      // The block's weights, with the errors of later blocks compensated: codes equal to them would have no error.
      let wanted = weights[at + j]! + feedback[row * B + j]! / solver.diagonal[j]!;
      for (let i = j + 1; i < B; i++) wanted += solver.unit[j * B + i]! * (weights[at + i]! - target[i]!);
      target[j] = wanted;
    }
    solver.solve(target);
    keep(work, solver, row, block);
  }
}

async function visitAgain(
  work: Work,
  moments: Float64Array,
  block: number,
  products: Products,
): Promise<void> {
  const { outputs, inputs: K, form, codes } = work;
  const { blockSize: B } = form;
  const from = block * B;
  const rows = Float32Array.from(moments.subarray(from * K, (from + B) * K));
  const gradient = await products.multiply(work.errors, rows, K);
  const solver = new BlockSolver(form, upperFactor(columnsOf(rows, K, from, B), B));
  const target = new Float64Array(B);
  for (let row = 0; row < outputs; row++) {
    const at = row * K + from;
    const which = row * blocksOf(K, form) + block;
    const known = { scale: codes.scales[which]!, zeroPoint: codes.zeroPoints[which]! };
    for (let j = 0; j < B; j++) target[j] = gradient[row * B + j]!;
    solver.applyInverse(target);
    for (let j = 0; j < B; j++) target[j]! += (codes.codes[at + j]! - known.zeroPoint) * known.scale;
    solver.improve(target, codes.codes, at, known);
    keep(work, solver, row, block);
  }
}

/** Writes a block's best codes and their errors. */
function keep(
  { weights, inputs: K, form, errors, codes }: Work,
  { best }: BlockSolver,
  row: number,
  block: number,
) {
  const { blockSize: B } = form;
  const at = row * K + block * B;
  const which = row * blocksOf(K, form) + block;
  codes.scales[which] = best.scale;
  codes.zeroPoints[which] = best.zeroPoint;
  for (let j = 0; j < B; j++) {
    codes.codes[at + j] = best.codes[j]!;
    errors[at + j] = weights[at + j]! - (best.codes[j]! - best.zeroPoint) * best.scale;
  }
}

/** Widths of the candidate grids, as shares of the block's range. */
const WIDTHS = [1, 0.94, 0.88, 0.82, 0.76, 0.7];
/** Grids with the lowest estimates, which are tried with feedback inside the block. */
const FINALISTS = 2;

type Grid = { readonly scale: number; readonly zeroPoint: number };

/** Minimizes ‖R·(target − q)‖² over a block's codes, one target after the other. */
class BlockSolver {
  /** The diagonal of R; `unit`: R with its rows divided by its diagonal. */
  readonly diagonal: Float64Array;
  readonly unit: Float64Array;
  /** The result of the last `solve` or `improve`. */
  readonly best: { readonly codes: Uint8Array; scale: number; zeroPoint: number; error: number };
  readonly #size: number;
  readonly #mostCode: number;
  readonly #factor: Float64Array;
  readonly #weight: Float64Array;
  readonly #errors: Float64Array;
  readonly #tried: Uint8Array;
  readonly #grids = Array.from({ length: 2 * WIDTHS.length }, () => ({ scale: 0, zeroPoint: 0, error: 0 }));

  /** `factor` is R `[B, B]`. */
  constructor({ bits, blockSize: B }: QuantForm, factor: Float64Array) {
    const diagonal = Float64Array.from({ length: B }, (_, j) => factor[j * B + j]!);
    this.diagonal = diagonal;
    this.unit = factor.map((value, i) => value / diagonal[Math.floor(i / B)]!);
    this.best = { codes: new Uint8Array(B), scale: 0, zeroPoint: 0, error: 0 };
    this.#size = B;
    this.#mostCode = 2 ** bits - 1;
    this.#factor = factor;
    this.#weight = diagonal.map((value) => value * value);
    this.#errors = new Float64Array(B);
    this.#tried = new Uint8Array(B);
  }

  /** Finds codes, scale and zero point for `target`, and leaves them in `best`. */
  solve(target: Float64Array): void {
    this.best.error = Number.POSITIVE_INFINITY;
    this.#listGrids(target);
    for (let i = 0; i < FINALISTS; i++) {
      const { scale, zeroPoint } = this.#nextGrid();
      this.#attempt(target, scale, zeroPoint);
    }
    this.#attemptFitted(target);
  }

  /** Like `solve`, but starts from the codes at `at`: tries their grid, and another scale. Never worse than these codes. */
  improve(target: Float64Array, codes: Uint8Array, at: number, { scale, zeroPoint }: Grid): void {
    const { best } = this;
    best.error = this.#errorOf(target, codes, at, scale, zeroPoint);
    best.codes.set(codes.subarray(at, at + this.#size));
    best.scale = scale;
    best.zeroPoint = zeroPoint;
    this.#attempt(target, scale, zeroPoint);
    this.#attemptFitted(target);
  }

  /** values ← (RᵀR)⁻¹·values. */
  applyInverse(values: Float64Array): void {
    const { diagonal } = this;
    const [B, factor] = [this.#size, this.#factor];
    for (let j = 0; j < B; j++) {
      values[j]! /= diagonal[j]!;
      for (let i = j + 1; i < B; i++) values[i]! -= factor[j * B + i]! * values[j]!;
    }
    for (let j = B - 1; j >= 0; j--) {
      let value = values[j]!;
      for (let i = j + 1; i < B; i++) value -= factor[j * B + i]! * values[i]!;
      values[j] = value / diagonal[j]!;
    }
  }

  /** Nearest plane on one grid; replaces `best` when better. Stops as soon as it is worse. */
  #attempt(target: Float64Array, scale: number, zeroPoint: number): void {
    const { best, unit } = this;
    const [B, most, weight] = [this.#size, this.#mostCode, this.#weight];
    const [errors, tried] = [this.#errors, this.#tried];
    const inverse = 1 / scale;
    let error = 0;
    for (let j = B - 1; j >= 0; j--) {
      let wanted = target[j]!;
      const row = j * B;
      for (let i = j + 1; i < B; i++) wanted += unit[row + i]! * errors[i]!;
      let code = Math.round(wanted * inverse) + zeroPoint;
      code = code < 0 ? 0 : Math.min(most, code);
      const value = (code - zeroPoint) * scale;
      tried[j] = code;
      errors[j] = target[j]! - value;
      error += weight[j]! * (wanted - value) * (wanted - value);
      if (error >= best.error) return;
    }
    best.codes.set(tried);
    best.scale = scale;
    best.zeroPoint = zeroPoint;
    best.error = error;
  }

  #attemptFitted(target: Float64Array): void {
    const scale = this.#fittedScale(target);
    if (scale !== 0) this.#attempt(target, scale, this.best.zeroPoint);
  }

  /** The scale that fits the best codes: <Ru, Rt> / <Ru, Ru>, u = codes − zero point. */
  #fittedScale(target: Float64Array): number {
    const { best, unit } = this;
    const [B, weight] = [this.#size, this.#weight];
    let [dot, square] = [0, 0];
    for (let j = 0; j < B; j++) {
      let [u, t] = [0, 0];
      for (let i = j; i < B; i++) {
        u += unit[j * B + i]! * (best.codes[i]! - best.zeroPoint);
        t += unit[j * B + i]! * target[i]!;
      }
      dot += weight[j]! * u * t;
      square += weight[j]! * u * u;
    }
    return square === 0 ? 0 : Math.fround(dot / square);
  }

  /** Fills the candidate grids for the target's range, with the estimated error of each. */
  #listGrids(target: Float64Array): void {
    const most = this.#mostCode;
    let low = target[0]!;
    let high = low;
    for (let j = 1; j < this.#size; j++) {
      if (target[j]! < low) low = target[j]!;
      if (target[j]! > high) high = target[j]!;
    }
    const span = high - low || Math.abs(high) || 1e-12;
    const middle = (low + high) / 2;
    WIDTHS.forEach((width, i) => {
      const scale = Math.fround((span * width) / most);
      const zero = most / 2 - middle / scale;
      for (const side of [0, 1]) {
        const zeroPoint = Math.max(0, Math.min(most, Math.floor(zero) + side));
        const grid = this.#grids[2 * i + side]!;
        grid.scale = scale;
        grid.zeroPoint = zeroPoint;
        grid.error = this.#estimate(target, scale, zeroPoint);
      }
    });
  }

  /** The grid with the lowest estimate; it is not returned again. */
  #nextGrid(): Grid {
    let least = this.#grids[0]!;
    for (const grid of this.#grids) if (grid.error < least.error) least = grid;
    least.error = Number.POSITIVE_INFINITY;
    return least;
  }

  /** The error of rounding each column to nearest, without feedback. */
  #estimate(target: Float64Array, scale: number, zeroPoint: number): number {
    const [B, most, weight] = [this.#size, this.#mostCode, this.#weight];
    const inverse = 1 / scale;
    let error = 0;
    for (let j = 0; j < B; j++) {
      let code = Math.round(target[j]! * inverse) + zeroPoint;
      code = code < 0 ? 0 : Math.min(most, code);
      const off = target[j]! - (code - zeroPoint) * scale;
      error += weight[j]! * off * off;
    }
    return error;
  }

  /** The error of given codes. */
  #errorOf(target: Float64Array, codes: Uint8Array, at: number, scale: number, zeroPoint: number): number {
    const { unit } = this;
    const [B, weight, errors] = [this.#size, this.#weight, this.#errors];
    let error = 0;
    for (let j = B - 1; j >= 0; j--) {
      errors[j] = target[j]! - (codes[at + j]! - zeroPoint) * scale;
      let off = 0;
      for (let i = j; i < B; i++) off += unit[j * B + i]! * errors[i]!;
      error += weight[j]! * off * off;
    }
    return error;
  }
}

/** H + λ·I, λ a share of the mean diagonal, so that inputs that are always 0 have a moment above 0. */
function damp(moments: Float64Array, size: number): Float64Array {
  const damped = moments.slice();
  let trace = 0;
  for (let j = 0; j < size; j++) trace += moments[j * size + j]!;
  const more = (DAMPING * trace) / size || 1;
  for (let j = 0; j < size; j++) damped[j * size + j]! += more;
  return damped;
}

/** Rows that are factorized together. */
const PANEL = 96;

/** L = Rᵀ, lower triangular, of H = L·Lᵀ `[K, K]`. @throws RangeError when H is not positive definite. */
async function factorize(matrix: Float64Array, K: number, products: Products): Promise<Float32Array> {
  const factor = new Float32Array(K * K);
  for (let from = 0; from < K; from += PANEL) {
    const to = Math.min(K, from + PANEL);
    const left = K - from;
    // The part of the panel that the columns before it explain.
    const explained = await products.multiply(
      factor.subarray(from * K, to * K),
      factor.subarray(from * K),
      K,
    );
    for (let i = from; i < K; i++) {
      for (let j = from; j < Math.min(to, i + 1); j++) {
        let value = matrix[i * K + j]! - explained[(j - from) * left + i - from]!;
        for (let k = from; k < j; k++) value -= factor[i * K + k]! * factor[j * K + k]!;
        factor[i * K + j] = i === j ? pivotOf(value) : value / factor[j * K + j]!;
      }
    }
  }
  return factor;
}

function pivotOf(value: number): number {
  if (!(value > 0)) throw new RangeError('the moments are not positive definite');
  return Math.sqrt(value);
}

/** R, upper triangular, of H = RᵀR `[size, size]`, in one go. */
function upperFactor(matrix: Float64Array, size: number): Float64Array {
  const factor = new Float64Array(size * size);
  for (let j = 0; j < size; j++) {
    for (let i = j; i < size; i++) {
      let value = matrix[j * size + i]!;
      for (let k = 0; k < j; k++) value -= factor[k * size + j]! * factor[k * size + i]!;
      factor[j * size + i] = i === j ? pivotOf(value) : value / factor[j * size + j]!;
    }
  }
  return factor;
}

/** Rows of R = Lᵀ, `[count, K]`. */
function upperRows(factor: Float32Array, K: number, from: number, count: number): Float32Array {
  const rows = new Float32Array(count * K);
  for (let i = from; i < K; i++) {
    for (let j = 0; j < count; j++) rows[j * K + i] = factor[i * K + from + j]!;
  }
  return rows;
}

/** `[count, count]` from column `from` on. */
function columnsOf(rows: Float32Array, K: number, from: number, count: number): Float64Array {
  const square = new Float64Array(count * count);
  for (let j = 0; j < count; j++) square.set(rows.subarray(j * K + from, j * K + from + count), j * count);
  return square;
}
