/** Both roundings of the copies multiply alike, and machines that share a folder keep each other's. */
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import {
  fastestRounding,
  ROUNDINGS,
  type Rounding,
} from '../../../../gpu-backend/learning/gates/rounding.ts';
import {
  multiplyGradient,
  multiplyStored,
  type TrainingLinears,
  trainingLinears,
} from '../../../../gpu-backend/learning/gates/training-weights.ts';
import { rotateInputs } from '../../../../gpu-backend/model/architectures/rotation.ts';
import { readStoredLlama } from '../../../../gpu-backend/model/stored-llama.ts';
import { GraphBuilder, type Value } from '../../../../gpu-backend/onnx/graph.ts';
import { createSessionIn, floats, tensor } from '../../../../gpu-backend/onnx/session.ts';
import { emitFromMemory, randomLlama, TINY_CONFIG } from '../../../support/random-llama.ts';

const plain = randomLlama();
/** As in real models, the head's rows have much in common. */
const source: typeof plain = {
  ...plain,
  read: async (name) => {
    const values = await plain.read(name);
    return name.includes('embed_tokens')
      ? values.map((value, i) => value + Math.sin(i % TINY_CONFIG.hiddenSize))
      : values;
  },
};
let folder: string;
let linears: Record<Rounding, TrainingLinears>;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-codes-'));
  await emitFromMemory(source, 'q8', folder, () => {});
  const stored = await readStoredLlama(folder, source.config);
  await leaveOldFiles(folder);
  linears = {
    blocks: await trainingLinears(folder, source.config, stored, 'blocks'),
    pairs: await trainingLinears(folder, source.config, stored, 'pairs'),
  };
});
afterAll(() => rm(folder, { recursive: true }));

async function leaveOldFiles(folder: string): Promise<void> {
  const copies = ['training-v3.bin', 'training-v4-i8.bin', 'training-v6-pairs-u8.json'];
  for (const name of [...copies, 'training-gates-rank-0-pairs-i8.onnx'])
    await writeFile(join(folder, name), '');
}

type Which = { readonly rounding: Rounding; readonly name: string; readonly direction: 'forward' | 'back' };

/** Rows of very different sizes. */
const someRows = (inputs: number) =>
  Float32Array.from({ length: ROWS * inputs }, (_, i) => Math.sin(i * i) * 10 ** Math.floor(i / inputs));
const ROWS = 4;

/** A matrix of the model times {@link someRows}, or `[ROWS, inputs]` others. */
async function product({ rounding, name, direction }: Which, rows?: Float32Array): Promise<Float32Array> {
  const { forward, back } = linears[rounding].get(name)!;
  const [inputs, outputs] =
    direction === 'forward' ? [forward.inputs, forward.outputs] : [forward.outputs, forward.inputs];
  return productIn(folder, { inputs, outputs, rows: rows ?? someRows(inputs) }, (g, x) =>
    direction === 'forward'
      ? multiplyStored(g, x, 'w', forward)
      : multiplyGradient(g, x, 'w', { forward, back: back! }),
  );
}

type Rows = { readonly inputs: number; readonly outputs: number; readonly rows: Float32Array };

/** `folder` has the weights. */
async function productIn(
  folder: string,
  { inputs, outputs, rows }: Rows,
  multiplied: (g: GraphBuilder, x: Value) => Value,
): Promise<Float32Array> {
  const g = new GraphBuilder('product');
  const y = multiplied(g, g.input('x', 'f32', [ROWS, inputs]));
  g.output(y, 'f32', [ROWS, outputs]);
  const session = await createSessionIn(folder, g.graph, { threads: 1 });
  const found = await session.run({ x: tensor('f32', rows, [ROWS, inputs]) }, [y.name]);
  await session.release();
  return floats(found[y.name]!);
}

/** The largest difference of a row, in a row's root mean square. */
function worstDifference(found: Float32Array, expected: Float32Array): number {
  const width = expected.length / ROWS;
  return Math.max(
    ...Array.from({ length: ROWS }, (_, row) => {
      const [a, b] = [found, expected].map((all) => all.subarray(row * width, (row + 1) * width));
      const size = Math.hypot(...b!) / Math.sqrt(width);
      return Math.max(...b!.map((value, i) => Math.abs(value - a![i]!))) / size;
    }),
  );
}

test.each([
  ['output', 'forward'],
  ['down', 'forward'],
  ['qkv', 'back'],
  ['output', 'back'],
  ['gate', 'back'],
] as const)('pairs multiply as blocks do: %s, %s', async (which, direction) => {
  const of = { name: `layer_0.${which}`, direction };
  const found = await product({ rounding: 'pairs', ...of });
  expect(worstDifference(found, await product({ rounding: 'blocks', ...of }))).toBeLessThan(0.06);
});

test('pairs take normalized rows as they are', async () => {
  const { inputs } = linears.pairs.get('layer_0.gate')!.forward;
  const rows = someRows(inputs);
  for (let row = 0; row < ROWS; row++) {
    const values = rows.subarray(row * inputs, (row + 1) * inputs);
    const size = Math.hypot(...values) / Math.sqrt(inputs);
    for (let i = 0; i < inputs; i++) values[i]! /= size;
  }
  const of = { name: 'layer_0.gate', direction: 'forward' } as const;
  const found = await product({ rounding: 'pairs', ...of }, rows);
  expect(worstDifference(found, await product({ rounding: 'blocks', ...of }, rows))).toBeLessThan(0.06);
});

test('a matrix with eight bits, whose inputs the serving graph rotates, takes plain inputs in training', async () => {
  const rotating = await mkdtemp(join(tmpdir(), 'maskroute-codes-'));
  await emitFromMemory(source, 'q8', rotating, () => {});
  const stored = await readStoredLlama(rotating, source.config);
  // As four bits have them: some matrices keep eight, and down's inputs are rotated.
  const layers = stored.layers.map((layer) => ({
    ...layer,
    down: { ...layer.down, rotation: { size: 32, matrix: stored.ropeCos } },
  }));
  const name = 'layer_0.down';
  const copies = await trainingLinears(rotating, source.config, { ...stored, layers }, 'blocks');
  const { forward } = copies.get(name)!;
  const { inputs, outputs } = forward;
  const rows = someRows(inputs);
  const found = await productIn(rotating, { inputs, outputs, rows }, (g, x) =>
    multiplyStored(g, x, 'w', forward),
  );
  const rotated = rows.slice();
  rotateInputs(rotated, 32);
  const expected = await product({ rounding: 'blocks', name, direction: 'forward' }, rotated);
  expect(worstDifference(found, expected)).toBeLessThan(0.06);
  await rm(rotating, { recursive: true });
});

test("pairs of the head leave out what all tokens share, as a gradient's sum over all tokens is 0", async () => {
  const rows = new Float32Array(ROWS * linears.pairs.get('head')!.forward.outputs).fill(1);
  const of = { name: 'head', direction: 'back' } as const;
  const [pairs, blocks] = [
    await product({ rounding: 'pairs', ...of }, rows),
    await product({ rounding: 'blocks', ...of }, rows),
  ];
  expect(Math.hypot(...pairs)).toBeLessThan(0.01 * Math.hypot(...blocks));
});

test.runIf(process.platform === 'linux' && process.arch === 'x64')(
  'codes are in pairs with AMX',
  async () => {
    const hasAmx = /\bamx_int8\b/.test(readFileSync('/proc/cpuinfo', 'utf8'));
    expect(await fastestRounding()).toBe(hasAmx ? 'pairs' : 'blocks');
  },
);

test('fp32 needs no files of its own, and those of earlier versions go, too', async () => {
  const exact = await mkdtemp(join(tmpdir(), 'maskroute-codes-'));
  await emitFromMemory(source, 'f32', exact, () => {});
  await leaveOldFiles(exact);
  await trainingLinears(exact, source.config, await readStoredLlama(exact, source.config), 'pairs');
  expect((await readdir(exact)).filter((name) => name.startsWith('training-'))).toEqual([]);
  await rm(exact, { recursive: true });
});

test('where nothing can be written beside the model, the reason for writing is said', async () => {
  const [module, stored] = ['learning/gates/training-weights.ts', 'model/stored-llama.ts'].map(
    (file) => new URL(`../../../../gpu-backend/${file}`, import.meta.url).href,
  );
  const full = await mkdtemp(join(tmpdir(), 'maskroute-codes-'));
  await emitFromMemory(source, 'q8', full, () => {});
  await writeFile(
    join(full, 'write.mjs'),
    `import { trainingLinears } from '${module}';
    import { readStoredLlama } from '${stored}';
    const config = ${JSON.stringify(source.config)};
    await trainingLinears('${full}', config, await readStoredLlama('${full}', config), 'pairs');`,
  );
  // No file may have more than 8 KB, as on a full disk.
  const shell = `ulimit -f 8; exec "${process.execPath}" "${join(full, 'write.mjs')}"`;
  const { stderr } = spawnSync('sh', ['-c', shell], { encoding: 'utf8' });
  expect(stderr).toContain(
    `Learning needs copies of the weights beside the model, which cannot be written: EFBIG: file too large, write '${full}/training-v8-pairs.bin'`,
  );
  expect((await readdir(full)).filter((name) => name.includes('training-'))).toEqual([]);
  await rm(full, { recursive: true });
});

test('each rounding has its own files, and those of earlier versions go', async () => {
  const names = (await readdir(folder)).filter((name) => name.startsWith('training-'));
  const files = ROUNDINGS.flatMap((rounding) =>
    ['bin', 'json'].map((end) => `training-v8-${rounding}.${end}`),
  );
  expect(names.sort()).toEqual(files.sort());
});
