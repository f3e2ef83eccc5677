/** The kernel against plain arithmetic, to the last bit. The table that ships is summed in `static-encoder.test.ts`. */
import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import { staticKernel } from '../../../gpu-backend/learning/data/encoders.ts';
import { createRandom } from '../../../gpu-backend/random.ts';
import { assembleKernel } from '../../../scripts/build-kernel.ts';
import { createWeightedSum } from '../../../shared/embedding/static-encoder.ts';
import type { StaticTable } from '../../../shared/embedding/static-table.ts';

const TOKENS = 50;

function madeUpTable(dimensions: number): StaticTable {
  const random = createRandom(dimensions);
  return {
    dimensions,
    vocabulary: Array.from({ length: TOKENS }, (_, id) => `token${id}`),
    scales: Float32Array.from({ length: TOKENS }, () => random.next() * 0.1),
    vectors: Int8Array.from({ length: TOKENS * dimensions }, () => random.below(255) - 127),
  };
}

function plainSum({ dimensions, scales, vectors }: StaticTable, ids: readonly number[]): Float32Array {
  const sum = new Float32Array(dimensions);
  for (const id of ids) {
    for (let i = 0; i < dimensions; i++) {
      sum[i] = sum[i]! + Math.fround(scales[id]! * vectors[id * dimensions + i]!);
    }
  }
  return sum;
}

describe('the sum of scaled rows', () => {
  it.each([1, 7, 8, 9, 248, 384])('is that of plain arithmetic with %d dimensions', async (dimensions) => {
    const table = madeUpTable(dimensions);
    const weightedSum = createWeightedSum(await staticKernel(), table);
    for (const count of [0, 1, 2, 60, 1_023, 1_024, 1_025, 3_000]) {
      const ids = Array.from({ length: count }, (_, index) => (index * 7 + 3) % TOKENS);
      expect(weightedSum(ids)).toEqual(plainSum(table, ids));
    }
  });

  it('leaves what it gave before as it was', async () => {
    const weightedSum = createWeightedSum(await staticKernel(), madeUpTable(8));
    const first = weightedSum([1, 2]);
    const kept = first.slice();
    weightedSum([3]);
    expect(first).toEqual(kept);
  });

  it('comes from the source that is there', async () => {
    const shipped = await readFile('shared/embedding/weighted-sum.wasm');
    expect(Buffer.from(await assembleKernel()).equals(shipped)).toBe(true);
  });
});
