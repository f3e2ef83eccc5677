/**
 * The closed form against PyTorch, which goes by way of the root of C (`fixtures/make_surrogate_fit.py`), and the
 * moments of a small model against plain loops.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { finish } from '../../../../gpu-backend/event-loop.ts';
import { scoredRowsOf } from '../../../../gpu-backend/learning/gates/batches.ts';
import { openLossSession } from '../../../../gpu-backend/learning/gates/gate-session.ts';
import { openTeacher } from '../../../../gpu-backend/learning/gates/teacher.ts';
import {
  fitBlock,
  fitSurrogates,
  solvePositive,
} from '../../../../gpu-backend/learning/surrogates/fit-surrogates.ts';
import { openMomentSession } from '../../../../gpu-backend/learning/surrogates/moments.ts';
import type { WeightSource } from '../../../../gpu-backend/model/model-source.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { furthest } from '../../../support/furthest.ts';
import { emitFromMemory, randomLlama } from '../../../support/random-llama.ts';
import golden from './fixtures/surrogate_fit.json' with { type: 'json' };

const { tokens, hiddenSize: H, rank } = golden;

/** As `make_surrogate_fit.py` makes them. */
function goldenText(): { x: number[][]; y: number[][] } {
  const all = (count: number) => Array.from({ length: count }, (_, i) => i);
  const x = all(tokens).map((i) =>
    all(H).map((j) => Math.sin(i * 1.7 + j * j * 0.61) * (1 + j / 4) + 0.3 * j),
  );
  const weight = (k: number, m: number) => Math.cos(k * m * 0.9 + m) / (1 + m);
  const y = x.map((row, i) =>
    all(H).map((j) => {
      const sum = row.reduce((total, value, k) => total + value * weight(k, j), 0);
      return sum + 0.05 * Math.cos(i * 3.1 + j) + j;
    }),
  );
  return { x, y };
}

function momentsOf(x: number[][], y: number[][]) {
  const xx = new Float64Array((H + 1) * (H + 1));
  const xy = new Float64Array((H + 1) * H);
  x.forEach((row, t) => {
    const extended = [...row, 1];
    extended.forEach((a, i) => {
      extended.forEach((b, j) => {
        xx[i * (H + 1) + j]! += a * b;
      });
      y[t]!.forEach((b, j) => {
        xy[i * H + j]! += a * b;
      });
    });
  });
  return { xx, xy, first: new Float64Array(H) };
}

test('the closed form is that of the reference', () => {
  const { x, y } = goldenText();
  const { a, b, bias } = fitBlock(momentsOf(x, y), H, rank);
  const product = golden.product.map((_, at) => {
    const [i, j] = [Math.floor(at / H), at % H];
    return Array.from({ length: rank }, (__, k) => a[i * rank + k]! * b[k * H + j]!).reduce((x, y) => x + y);
  });
  expect(furthest(product, golden.product)).toBeLessThan(1e-8);
  bias.forEach((value, j) => {
    expect(value).toBeCloseTo(golden.bias[j]!, 7);
  });
});

test('columns of A are as long as the rows of B', () => {
  const { x, y } = goldenText();
  const { a, b } = fitBlock(momentsOf(x, y), H, rank);
  for (let k = 0; k < rank; k++) {
    let [column, row] = [0, 0];
    for (let i = 0; i < H; i++) {
      column += a[i * rank + k]! ** 2;
      row += b[k * H + i]! ** 2;
    }
    expect(column / row).toBeCloseTo(1, 8);
  }
});

test('equations are solved, and a matrix that is not positive definite is named', () => {
  const C = Float64Array.of(4, 2, 2, 3);
  const X = solvePositive(C, Float64Array.of(8, 2, 8, 5), 2);
  expect([...X].map((value) => Number(value.toFixed(12)))).toEqual([1, -0.5, 2, 2]);
  expect(() => solvePositive(Float64Array.of(1, 2, 2, 1), C, 2)).toThrow(/positive definite/);
});

/** The FFN block of layer 0 answers token 300, and no other, with an output far larger than all else. */
function withLoudToken(source: WeightSource): WeightSource {
  const { hiddenSize: width } = source.config;
  return {
    ...source,
    async read(name) {
      const values = await source.read(name);
      const firstColumn = (change: (value: number, row: number) => number) =>
        values.map((value, at) => (at % width === 0 ? change(value, at / width) : value));
      if (name.includes('embed_tokens')) return firstColumn((_, token) => (token === 300 ? 1000 : 0));
      if (/layers\.0\.mlp\.(gate|up)_proj/.test(name)) return firstColumn((value) => 40 * value);
      // Attention moves nothing of one position's first channel to the others.
      return name.includes('layers.0.self_attn.o_proj') ? values.fill(0) : values;
    },
  };
}

test('first positions and outliers are left out of the sums', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-outlier-'));
  try {
    const source = withLoudToken(randomLlama({ tiedEmbeddings: false }));
    await emitFromMemory(source, 'f32', folder, () => {});
    const tokenIds = Int32Array.from({ length: 4 * 16 }, (_, i) => i);
    // One of the three stands first.
    for (const at of [5, 16, 41]) tokenIds[at] = 300;
    const session = await openMomentSession(folder, source.config, { threads: 1 });
    await session.add(tokenIds, 4);
    await session.close();
    const ffn = session.moments.blocks[1]!;
    expect(ffn.xx.at(-1)).toBe(4 * 15 - 2);
    const largest = (values: Float64Array) =>
      values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    expect(largest(ffn.first)).toBeGreaterThan(10 * largest(ffn.xy));
  } finally {
    await rm(folder, { recursive: true });
  }
});

test('on a small model a surrogate is nearer to the dense model than a hole', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-fit-'));
  try {
    const source = randomLlama({ tiedEmbeddings: false });
    const { config } = source;
    await emitFromMemory(source, 'f32', folder, () => {});
    const session = await openMomentSession(folder, config, { threads: 1 });
    const random = createRandom(3);
    const text = (length: number) => Int32Array.from({ length }, () => random.below(320));
    const tokenIds = text(32 * 64);
    await session.add(tokenIds.subarray(0, 16 * 64), 16);
    await session.add(tokenIds.subarray(16 * 64), 16);
    await session.close();
    expect(session.moments.sequences).toBe(32);
    // Every position but the first of each sequence, and no outliers in random text.
    expect(session.moments.blocks[3]!.xx.at(-1)).toBe(32 * 63);
    const surrogates = finish(fitSurrogates(session.moments, config.hiddenSize, 32, () => {}));
    const teacher = await openTeacher(folder, config, { threads: 1 });
    const batch = await teacher.teach({
      tokenIds: text(8 * 64),
      sequences: 8,
      scoredRows: scoredRowsOf(8, 64),
    });
    await teacher.close();
    const kl = async (runs: number[], table?: typeof surrogates) => {
      const losses = await openLossSession(folder, config, {
        threads: 1,
        surrogates: table,
        tail: true,
      });
      const loss = await losses.loss(batch, runs);
      await losses.close();
      return loss - batch.entropy;
    };
    expect(await kl(Array(8).fill(1))).toBeCloseTo(0, 4);
    for (const block of [2, 3]) {
      const runs = Array.from({ length: 8 }, (_, i) => (i === block ? 0 : 1));
      expect(await kl(runs, surrogates)).toBeLessThan(0.9 * (await kl(runs)));
    }
  } finally {
    await rm(folder, { recursive: true });
  }
});
