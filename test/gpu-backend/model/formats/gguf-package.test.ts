/**
 * Files that the `gguf` Python package writes, for every family: the same configuration and, within a type's precision, the
 * same weights. Runs where `python3` (or MASKROUTE_TEST_PYTHON) has the package: `pip install gguf`.
 */
import { spawnSync } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';
import { openGguf } from '../../../../gpu-backend/model/formats/gguf.ts';
import type { ModelConfig } from '../../../../gpu-backend/model/model-source.ts';
import { ggufParts, readAll } from '../../../support/family-files.ts';
import { furthest } from '../../../support/furthest.ts';
import { asGemma, randomLlama } from '../../../support/random-llama.ts';

const PYTHON = process.env.MASKROUTE_TEST_PYTHON ?? 'python3';
const WRITER = fileURLToPath(new URL('fixtures/write_gguf.py', import.meta.url));
const hasPackage = spawnSync(PYTHON, ['-c', 'import gguf']).status === 0;
if (!hasPackage)
  console.warn(`SKIPPED: ${PYTHON} has no gguf package, so no file of it is read (pip install gguf)`);

const SHAPE = { layerCount: 2, hiddenSize: 64, ffnSize: 128, headCount: 4, kvHeadCount: 2, headSize: 32 };
const FAMILIES: readonly Partial<ModelConfig>[] = [
  { ...SHAPE, architecture: 'llama' },
  { ...SHAPE, architecture: 'qwen2', attentionBias: 'qkv', tiedEmbeddings: false },
  { ...SHAPE, architecture: 'qwen3', headNorms: true },
  // Powers of 2, so that taking factors from the weights and giving them back loses nothing.
  {
    ...SHAPE,
    architecture: 'granite',
    headSize: 16,
    factors: { embedding: 8, blocks: 0.25, scores: 0.0625, logits: 0.125 },
  },
  { ...SHAPE, architecture: 'phi3', tiedEmbeddings: false },
  asGemma(SHAPE),
];
/** The largest error of a value, as a share of the largest value; scales in half precision add some of it. */
const ERRORS = { F32: 0, F16: 2 ** -11, BF16: 2 ** -8, Q8_0: 1 / 254, Q4_0: 1 / 7 } as const;

describe.runIf(hasPackage).each(FAMILIES)('$architecture', (changes) => {
  test.each(Object.entries(ERRORS))('%s', async (type, error) => {
    const folder = await mkdtemp(path.join(tmpdir(), 'maskroute-gguf-package-'));
    try {
      const source = randomLlama(changes);
      const { metadata, tensors } = await ggufParts(source);
      const described = tensors.map(({ name, shape }, i) => ({ name, shape, file: `${i}.bin` }));
      for (const [i, { data }] of tensors.entries()) await writeFile(path.join(folder, `${i}.bin`), data);
      const architecture = metadata.get('general.architecture')!.value;
      const written = { architecture, metadata: Object.fromEntries(metadata), tensors: described };
      await writeFile(path.join(folder, 'tensors.json'), JSON.stringify(written));
      const file = path.join(folder, 'model.gguf');
      const { status, stderr } = spawnSync(PYTHON, [WRITER, folder, file, type], { encoding: 'utf8' });
      expect(status, stderr).toBe(0);
      const opened = await openGguf(file);
      expect(opened.config).toMatchObject(source.config);
      for (const [name, { data, shape }] of await readAll(source)) {
        const found = await opened.read(name);
        const most = data.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
        const allowed = shape.length === 1 ? 0 : 1.15 * error * most;
        expect(furthest(data, found), name).toBeLessThanOrEqual(allowed);
      }
      await opened.close();
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});
