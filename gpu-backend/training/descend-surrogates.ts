/**
 * Adam on tables of surrogates, in typed arrays and in place: 4.5 million numbers of the default model. Only blocks
 * that a step skipped have a gradient, and only they move, each with a step count of its own. Steps are relative to the size
 * that a block's numbers began with, since the outputs of blocks differ by orders of magnitude.
 */
import type { SurrogateTable } from '../model/surrogates.ts';
import type { SurrogatePart } from './surrogate-branch.ts';
import { SURROGATE_PARTS } from './surrogate-branch.ts';
import type { SurrogateGradients } from './surrogate-session.ts';

type Parts = Readonly<Record<SurrogatePart, Float32Array>>;

export type Descent = {
  readonly table: SurrogateTable;
  /** Running means of gradients and of their squares. */
  readonly mean: Parts;
  readonly square: Parts;
  /** Running mean of the table itself: what is judged and kept. */
  readonly average: SurrogateTable;
  /** Steps that moved a block, `[2L]`. */
  readonly moves: Int32Array;
  /** Root mean square of a block's numbers at the start, `[2L]` by part. */
  readonly scale: Parts;
};

const [BETA_1, BETA_2, EPSILON] = [0.9, 0.99, 1e-12];
/** Of the table's running mean, a move of a block. */
const AVERAGE_DECAY = 0.95;

export function startDescent(start: SurrogateTable): Descent {
  const table = copyTable(start);
  const each = (make: (values: Float32Array) => Float32Array): Parts => ({
    a: make(table.a),
    b: make(table.b),
    bias: make(table.bias),
    first: make(table.first),
  });
  return {
    table,
    mean: each((values) => new Float32Array(values.length)),
    square: each((values) => new Float32Array(values.length)),
    average: copyTable(start),
    moves: new Int32Array(table.blockCount),
    scale: each((values) => sizes(values, table.blockCount)),
  };
}

export const copyTable = (table: SurrogateTable): SurrogateTable => ({
  ...table,
  a: table.a.slice(),
  b: table.b.slice(),
  bias: table.bias.slice(),
  first: table.first.slice(),
});

function sizes(values: Float32Array, blockCount: number): Float32Array {
  const width = values.length / blockCount;
  return Float32Array.from({ length: blockCount }, (_, block) => {
    let sum = 0;
    for (let i = block * width; i < (block + 1) * width; i++) sum += values[i]! ** 2;
    return Math.sqrt(sum / width);
  });
}

/** Moves the blocks that `runs` skips. `learningRate`: share of a block's size that a step moves it by, at most. */
export function descend(
  descent: Descent,
  gradients: SurrogateGradients,
  runs: ArrayLike<number>,
  learningRate: number,
): void {
  for (let block = 0; block < descent.table.blockCount; block++) {
    if (runs[block] !== 0) continue;
    descent.moves[block]!++;
    for (const part of SURROGATE_PARTS) moveBlock(descent, gradients[part], part, block, learningRate);
  }
}

function moveBlock(
  { table, mean, square, average, moves, scale }: Descent,
  gradients: Float32Array,
  part: SurrogatePart,
  block: number,
  learningRate: number,
): void {
  const [values, averages, m, v] = [table[part], average[part], mean[part], square[part]];
  const width = values.length / table.blockCount;
  const count = moves[block]!;
  const rate = (learningRate * scale[part][block]!) / (1 - BETA_1 ** count);
  const squareScale = 1 / (1 - BETA_2 ** count);
  for (let i = block * width; i < (block + 1) * width; i++) {
    const gradient = gradients[i]!;
    m[i] = BETA_1 * m[i]! + (1 - BETA_1) * gradient;
    v[i] = BETA_2 * v[i]! + (1 - BETA_2) * gradient * gradient;
    values[i]! -= (rate * m[i]!) / (Math.sqrt(v[i]! * squareScale) + EPSILON);
    averages[i]! += (1 - AVERAGE_DECAY) * (values[i]! - averages[i]!);
  }
}
