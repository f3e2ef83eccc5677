/** Matrices converted in slices: the same bytes in any number of threads, from any file, and what they stand for. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { StoredLinear } from '../../../../gpu-backend/model/architectures/projections.ts';
import {
  fileBasis,
  rotatedBasis,
  rotationMatrix,
} from '../../../../gpu-backend/model/architectures/rotation.ts';
import { emitModel, WEIGHTS_FILE, writeGraphs } from '../../../../gpu-backend/model/emit.ts';
import { openGguf } from '../../../../gpu-backend/model/formats/gguf.ts';
import { openSafetensorsFolder } from '../../../../gpu-backend/model/formats/hf-folder.ts';
import { layerMatrices } from '../../../../gpu-backend/model/matrices.ts';
import {
  type FileSource,
  type ModelConfig,
  type OpenModelFile,
  WEIGHT_KINDS,
  type WeightKind,
  type WeightSource,
} from '../../../../gpu-backend/model/model-source.ts';
import {
  type ColumnCodes,
  eightBitsOf,
  FOUR_BITS,
  PLAIN_8_BITS,
  packRows,
  roundMatrix,
  roundRows,
} from '../../../../gpu-backend/model/quantization/quantize.ts';
import { readStoredLlama } from '../../../../gpu-backend/model/stored-llama.ts';
import type { WeightRange } from '../../../../gpu-backend/model/weights-file.ts';
import { denseMask } from '../../../../shared/mask/mask.ts';
import { ggufParts, hubConfig, safetensorsFiles, storedTensors } from '../../../support/family-files.ts';
import { furthest } from '../../../support/furthest.ts';
import { writeGguf } from '../../../support/gguf.ts';
import { naiveLlama } from '../../../support/naive-llama.ts';
import { asGemma, emitFromMemory, openEmitted, randomLlama } from '../../../support/random-llama.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-conversion-'));
});
afterEach(() => rm(folder, { recursive: true }));

const SHAPE = { hiddenSize: 192, headSize: 32, ffnSize: 512, tiedEmbeddings: false } as const;
const VARIANTS: readonly Partial<ModelConfig>[] = [
  { ...SHAPE, layerCount: 2 },
  { ...SHAPE, layerCount: 2, architecture: 'qwen3', headNorms: true, headSize: 16 },
  {
    ...SHAPE,
    layerCount: 2,
    architecture: 'granite',
    tiedEmbeddings: true,
    factors: { embedding: 12, blocks: 0.22, scores: 0.0625, logits: 0.125 },
  },
  { ...SHAPE, layerCount: 2, architecture: 'phi3' },
  asGemma({ ...SHAPE, hiddenSize: 256, layerCount: 2 }),
];

async function fileOf(source: WeightSource, kind: 'safetensors' | 'gguf'): Promise<OpenModelFile> {
  if (kind === 'gguf') {
    const file = path.join(folder, 'model.gguf');
    await writeFile(file, writeGguf(await ggufParts(source)));
    return openGguf(file);
  }
  for (const [name, bytes] of Object.entries(safetensorsFiles(await storedTensors(source), 2)))
    await writeFile(path.join(folder, name), bytes);
  await writeFile(path.join(folder, 'config.json'), JSON.stringify(hubConfig(source.config)));
  return openSafetensorsFolder(folder);
}

async function emitted(source: FileSource, kind: WeightKind, threads?: number): Promise<Buffer> {
  const out = await mkdtemp(path.join(folder, 'out-'));
  await emitModel(source, kind, out, () => {}, threads);
  return readFile(path.join(out, WEIGHTS_FILE));
}

test.each(VARIANTS)('threads and kinds of files come to the same bytes: %o', async (changes) => {
  const source = randomLlama(changes);
  const [file, gguf] = [await fileOf(source, 'safetensors'), await fileOf(source, 'gguf')];
  for (const kind of WEIGHT_KINDS) {
    const expected = await emitted(file, kind, 1);
    // A thread takes a while to start, so not every kind gets some.
    if (kind === 'q4') expect((await emitted(file, kind, 2)).equals(expected)).toBe(true);
    expect((await emitted(gguf, kind, kind === 'q8' ? 3 : 1)).equals(expected), kind).toBe(true);
  }
  await Promise.all([file.close(), gguf.close()]);
});

test.each(WEIGHT_KINDS)('%s: whole matrices, turned and rounded at once, are the same', async (kind) => {
  const source = randomLlama(VARIANTS[0]);
  const out = await mkdtemp(path.join(folder, 'out-'));
  await emitFromMemory(source, kind, out, () => {});
  const bytes = await readFile(path.join(out, WEIGHTS_FILE));
  const at = ({ offset, bytes: length }: WeightRange) => bytes.subarray(offset, offset + length);
  const basis = kind === 'f32' ? fileBasis : rotatedBasis(source.config, kind !== 'q8');
  const matrices = await layerMatrices(source, basis, 1);
  const stored = await readStoredLlama(out, source.config);
  for (const name of ['qkv', 'output', 'gateUp', 'down'] as const) {
    const { rows, outputs, inputs } = matrices[name];
    const own = stored.layers[1]![name];
    if (own.kind === 'f32') {
      expect(at(own.values).equals(Buffer.from(rows.buffer)), name).toBe(true);
      continue;
    }
    if (own.kind === 'q8-columns') {
      const rounded = roundMatrix(rows, outputs, inputs, 'columns');
      const { codes, scales } = rounded as ColumnCodes;
      const asRead = Int8Array.from(
        codes,
        (_, i) => codes[(i % outputs) * inputs + Math.floor(i / outputs)]!,
      );
      expect(at(own.values).equals(Buffer.from(asRead.buffer)), name).toBe(true);
      expect(at(own.scales).equals(Buffer.from(scales.buffer)), name).toBe(true);
      continue;
    }
    const packed = packRows(roundRows(rows, outputs, inputs, kind === 'q8' ? PLAIN_8_BITS : FOUR_BITS));
    expect(at(own.values).equals(Buffer.from(packed.values)), name).toBe(true);
    expect(at(own.scales).equals(Buffer.from(packed.scales.buffer)), name).toBe(true);
    expect(at(own.zeroPoints).equals(Buffer.from(packed.zeroPoints)), name).toBe(true);
  }
  const { down } = stored.layers[1]!;
  const size = basis.inside(source.config.ffnSize);
  expect(down.rotation?.size).toBe(size === 1 ? undefined : size);
  if (down.rotation)
    expect(at(down.rotation.matrix).equals(Buffer.from(rotationMatrix(size).buffer))).toBe(true);
  const [head] = stored.head as [StoredLinear];
  const { blockSize } = eightBitsOf(head.inputs);
  if (kind === 'q4') expect(head).toMatchObject({ kind: 'q8', blockSize });
  if (kind === 'q8-columns') {
    expect(head).toMatchObject({ kind });
    expect(stored.embedding.rows).toMatchObject([{ kind: 'q8', blockSize }]);
  }
});

test('by column from a version without rotations: refused, with what to do', async () => {
  const source = randomLlama(VARIANTS[0]);
  await emitFromMemory(source, 'q8-columns', folder, () => {});
  const stored = await readStoredLlama(folder, source.config);
  const layers = stored.layers.map(({ down: { rotation: _, ...down }, ...layer }) => ({ ...layer, down }));
  writeGraphs(folder, source.config, { ...stored, layers });
  await expect(readStoredLlama(folder, source.config)).rejects.toMatchObject({
    code: 'unsupported_model',
    message: expect.stringMatching(/earlier version.*pull it again/),
  });
});

test('a weight that is not finite is refused by name, from a thread, too', async () => {
  const source = randomLlama(VARIANTS[0]);
  const broken: WeightSource = {
    ...source,
    async read(name) {
      const values = await source.read(name);
      if (name.endsWith('1.mlp.down_proj.weight')) values[7] = Number.NaN;
      return values;
    },
  };
  const file = await fileOf(broken, 'safetensors');
  for (const threads of [1, 2])
    await expect(emitted(file, 'q8', threads)).rejects.toMatchObject({
      code: 'corrupt_model',
      message: expect.stringMatching(/model\.layers\.1\.mlp\.down_proj\.weight.*not finite/),
    });
  await file.close();
});

test.each([
  ['hiddenSize', { hiddenSize: 48, headSize: 16 }, 'hidden size is 48'],
  ['ffnSize', { ffnSize: 200 }, 'FFN size is 200'],
  ['headSize', { headSize: 12 }, 'heads are 72 wide together'],
] as const)(
  'a %s that is no multiple of 32 has eight or four bits refused, not fp32',
  async (_, changes, reason) => {
    const source = randomLlama(changes);
    for (const kind of ['q8', 'q4', 'q8-columns'] as const)
      await expect(emitFromMemory(source, kind, folder, () => {})).rejects.toMatchObject({
        code: 'unsupported_model',
        message: expect.stringMatching(new RegExp(`${reason}.*--weights f32`)),
      });
    await emitFromMemory(source, 'f32', folder, () => {});
  },
);

test.each([
  ['q8', 0],
  ['q8', 1e-4],
  ['q8-columns', 1e-4],
] as const)(
  '%s, tied, with %d in the last norm: the embedding is not lost in the head',
  async (kind, weight) => {
    const source = randomLlama();
    const changed: WeightSource = {
      ...source,
      async read(name) {
        const values = await source.read(name);
        if (name === 'model.norm.weight') values[5] = weight;
        return values;
      },
    };
    const naive = await naiveLlama(changed);
    await using runner = await openEmitted(changed, kind);
    const mask = denseMask(8);
    const logits = await runner.run({
      cache: runner.newCache(),
      tokenIds: [7],
      logitRows: [0],
      plan: { mask, kv: 'preserve' },
    });
    const expected = naive.next(7, mask);
    expect(furthest(logits, expected)).toBeLessThan(0.1);
  },
);

test('stopped half-way, it ends', async () => {
  const file = await fileOf(randomLlama(VARIANTS[0]), 'safetensors');
  let calls = 0;
  const stop = () => {
    if (++calls === 3) throw new Error('enough');
  };
  await expect(emitModel(file, 'q8', folder, stop, 2)).rejects.toThrow('enough');
  expect(calls).toBeGreaterThanOrEqual(3);
  // What the other thread had in work may still be told.
  expect(calls).toBeLessThanOrEqual(4);
  await file.close();
});
