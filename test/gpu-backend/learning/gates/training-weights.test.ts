/** Codes of both types multiply alike wherever signed ones are exact, and machines that share a folder keep each other's. */
import { readFileSync } from 'node:fs';
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import {
  fastestCodes,
  multiplyStored,
  type TrainingLinears,
  trainingLinears,
} from '../../../../gpu-backend/learning/gates/training-weights.ts';
import { readStoredLlama } from '../../../../gpu-backend/model/stored-llama.ts';
import { GraphBuilder } from '../../../../gpu-backend/onnx/graph.ts';
import { createSessionIn, floats, tensor } from '../../../../gpu-backend/onnx/session.ts';
import { emitFromMemory, holding, randomLlama } from '../../../support/random-llama.ts';

const source = randomLlama();
let folder: string;
let linears: Record<'i8' | 'u8', TrainingLinears>;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-codes-'));
  await emitFromMemory(source, holding('q8', source.config), folder, () => {});
  const stored = await readStoredLlama(folder, source.config);
  // Of an earlier version.
  await writeFile(join(folder, 'training-v3.bin'), '');
  linears = {
    i8: await trainingLinears(folder, source.config, stored, 'i8'),
    u8: await trainingLinears(folder, source.config, stored, 'u8'),
  };
});
afterAll(() => rm(folder, { recursive: true }));

/** `layer_0.gate` times rows of very different sizes. */
async function product(codes: 'i8' | 'u8'): Promise<Float32Array> {
  const { forward } = linears[codes].get('layer_0.gate')!;
  const g = new GraphBuilder(`codes_${codes}`);
  const x = g.input('x', 'f32', [4, forward.inputs]);
  const y = multiplyStored(g, x, 'w', forward);
  g.output(y, 'f32', [4, forward.outputs]);
  const session = await createSessionIn(folder, g.graph, { threads: 1 });
  const values = Float32Array.from({ length: 4 * forward.inputs }, (_, i) => Math.sin(i * i) * 3 ** (i % 5));
  const outputs = await session.run({ x: tensor('f32', values, [4, forward.inputs]) }, [y.name]);
  await session.release();
  return floats(outputs[y.name]!);
}

test('both types give the same bits where signed codes are exact', async () => {
  const [signed, unsigned] = [await product('i8'), await product('u8')];
  expect(unsigned.some((value) => value !== 0)).toBe(true);
  if ((await fastestCodes()) === 'i8') expect(signed).toEqual(unsigned);
});

test.runIf(process.platform === 'linux' && process.arch === 'x64')(
  'codes are signed where the CPU has VNNI, and unsigned elsewhere',
  async () => {
    const hasVnni = /\b(avx512_vnni|avx_vnni)\b/.test(readFileSync('/proc/cpuinfo', 'utf8'));
    expect(await fastestCodes()).toBe(hasVnni ? 'i8' : 'u8');
  },
);

test('each type has its own files, and those of earlier versions go', async () => {
  const names = (await readdir(folder)).filter((name) => name.startsWith('training-'));
  expect(names.sort()).toEqual([
    'training-v4-i8.bin',
    'training-v4-i8.json',
    'training-v4-u8.bin',
    'training-v4-u8.json',
  ]);
});
