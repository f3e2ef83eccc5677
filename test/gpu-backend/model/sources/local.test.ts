/** What `model pull PATH` finds in files and folders on this machine, what it refuses, and that a refusal leaves nothing. */
import { existsSync, readdirSync } from 'node:fs';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { pullModel } from '../../../../gpu-backend/cli/models.ts';
import { openRunner } from '../../../../gpu-backend/engine/runner.ts';
import { configFromHuggingFace } from '../../../../gpu-backend/model/formats/hf-config.ts';
import { ARCHITECTURES } from '../../../../gpu-backend/model/model-source.ts';
import { denseMask } from '../../../../shared/mask/mask.ts';
import { ggufParts, safetensorsFiles, storedTensors } from '../../../support/family-files.ts';
import { splitGguf, tinyLlama, writeGguf } from '../../../support/gguf.ts';
import { randomLlama } from '../../../support/random-llama.ts';
import { TINY_CONFIG_JSON, tinyFolder, tinyWeights, writeSafetensors } from '../../../support/safetensors.ts';
import figures from '../architectures/fixtures/families.json' with { type: 'json' };

let home: string;
let folder: string;
beforeEach(async () => {
  home = await mkdtemp(path.join(tmpdir(), 'maskroute-local-'));
  folder = path.join(home, 'given');
  await mkdir(folder);
});
afterEach(() => rm(home, { recursive: true }));

async function put(files: Record<string, Uint8Array | object>): Promise<void> {
  for (const [name, content] of Object.entries(files)) {
    const bytes = content instanceof Uint8Array ? content : JSON.stringify(content);
    await writeFile(path.join(folder, name), bytes);
  }
}
const pull = (spec = folder) => pullModel(spec, { home, weights: 'q8', onProgress: () => {}, log: () => {} });

const gguf = writeGguf(tinyLlama());
const bytes = (...values: number[]) => Uint8Array.from([...values, ...new Uint8Array(64)]);

describe('a folder', () => {
  test('with one GGUF model, whole or in parts', async () => {
    await put({ 'tiny.gguf': gguf, 'mmproj-tiny.gguf': gguf });
    expect((await pull()).manifest.source).toBe('folder:given/tiny.gguf');
    await rm(path.join(folder, 'tiny.gguf'));
    await put(splitGguf(tinyLlama(), 3));
    const { manifest } = await pull();
    expect(manifest.source).toBe('folder:given/tiny-00001-of-00003.gguf');
    const part = path.join(folder, 'tiny-00003-of-00003.gguf');
    expect((await pull(part)).manifest).toMatchObject({ name: 'tiny', hash: manifest.hash });
  });

  test('with several asks which', async () => {
    await put({ 'a.gguf': gguf, 'b.gguf': gguf });
    await expect(pull()).rejects.toThrow(/2 models \(a.gguf, b.gguf\): name one/);
  });
});

describe.each([...ARCHITECTURES])('a %s checkpoint', (family) => {
  const variant = figures.variants.find(({ name }) => name.startsWith(family))!;
  const config = configFromHuggingFace(variant.config);

  test('is installed from shards and from GGUF in parts, and runs; rows beyond its tokens are padding', async () => {
    const source = randomLlama(config);
    await put({
      ...(await tinyFolder()),
      'config.json': { ...variant.config, eos_token_id: 2 },
      ...safetensorsFiles(await storedTensors(source), 2),
    });
    await rm(path.join(folder, 'model.safetensors'));
    const sharded = await pull();
    expect(sharded.manifest.config).toEqual(config);
    await put(splitGguf(await ggufParts(source), 2));
    const split = await pull(path.join(folder, 'tiny-00001-of-00002.gguf'));
    expect(split.manifest).toMatchObject({ name: 'tiny', eosTokenIds: sharded.manifest.eosTokenIds });
    const logits = [];
    for (const { folder: installed, manifest } of [sharded, split]) {
      const runner = await openRunner(installed, manifest.config, { threads: 1 });
      const plan = { mask: denseMask(8), kv: 'preserve' as const };
      logits.push(await runner.run({ cache: runner.newCache(), tokenIds: [5, 9, 40], plan, logitRows: [2] }));
      await runner.close();
    }
    const best = (row: Float32Array) => row.indexOf(row.reduce((most, one) => Math.max(most, one)));
    expect(best(logits[1]!)).toBe(best(logits[0]!));
    expect(logits[0]).toHaveLength(320);
  });
});

const POINTER = `version https://git-lfs.github.com/spec/v1\noid sha256:${'0'.repeat(64)}\nsize 2471645608\n`;

describe('is refused, and nothing is left behind', () => {
  const cases: [string, () => Promise<Record<string, Uint8Array | object>>, RegExp, string?][] = [
    [
      'a folder of pickles',
      async () => ({ 'config.json': TINY_CONFIG_JSON, 'pytorch_model.bin': bytes(0x50, 0x4b, 3, 4) }),
      /"pytorch_model.bin" is a pickle file, and reading a pickle runs/,
    ],
    [
      'a zip archive of torch.save',
      async () => ({ x: bytes(0x50, 0x4b, 3, 4) }),
      /"x" is a pickle file/,
      'x',
    ],
    [
      'a bare pickle',
      async () => ({ 'x.gguf': bytes(0x80, 2, 0x7d) }),
      /"x.gguf" is a pickle file/,
      'x.gguf',
    ],
    ['weights alone', async () => ({ 'a.safetensors': bytes() }), /name its folder/, 'a.safetensors'],
    ...[
      ['weights', 'model.safetensors', ''],
      ['a tokenizer', 'tokenizer.json', ''],
      ['a GGUF file', 'x.gguf', 'x.gguf'],
    ].map(([what, file, name]): (typeof cases)[number] => [
      `${what} that Git LFS has not fetched`,
      async () => ({ ...(await tinyFolder()), [file!]: Buffer.from(POINTER) }),
      new RegExp(`^${file} is a pointer of Git LFS`),
      name,
    ]),
    ['an empty folder', async () => ({}), /no config.json/],
    [
      'a shard that is missing',
      async () => {
        const { 'model.safetensors': _, ...others } = await tinyFolder();
        const index = { weight_map: { a: 'model-00002-of-00002.safetensors' } };
        return { ...others, 'model.safetensors.index.json': index };
      },
      /names "model-00002-of-00002.safetensors", which is not there/,
    ],
    [
      'a shard without its index',
      async () => {
        const { 'model.safetensors': weights, ...others } = await tinyFolder();
        return { ...others, 'model-00001-of-00002.safetensors': weights! };
      },
      /and no model.safetensors.index.json/,
    ],
    [
      'a missing tensor',
      () => changed((weights) => weights.delete('model.norm.weight')),
      /model.norm.weight is missing/,
    ],
    [
      'a tensor too many',
      () =>
        changed((weights) => weights.set('model.extra.weight', { shape: [1], data: new Float32Array(1) })),
      /"model.extra.weight" is no part of the architecture llama/,
    ],
    [
      'a shape that is not the configuration’s',
      async () => ({ ...(await tinyFolder()), 'config.json': { ...TINY_CONFIG_JSON, hidden_size: 128 } }),
      /model.embed_tokens.weight is \[265,64\], expected \[265,128\]/,
    ],
    [
      'a tensor of another type',
      async () => ({
        ...(await tinyFolder()),
        'model.safetensors': writeSafetensors(tinyWeights(), { 'model.norm.weight': { dtype: 'I32' } }),
      }),
      /tensor "model.norm.weight" has the type "I32"/,
    ],
    [
      'tensors that overlap',
      async () => ({
        ...(await tinyFolder()),
        'model.safetensors': writeSafetensors(tinyWeights(), {
          'model.norm.weight': { data_offsets: [0, 256] },
        }),
      }),
      /"model.*" and "model.*" overlap/,
    ],
  ];
  test.each(cases)('%s', async (_, files, reason, name = '') => {
    await put(await files());
    const before = process.cpuUsage();
    await expect(pull(path.join(folder, name))).rejects.toThrow(reason);
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1000, 'ms of the processor').toBeLessThan(1000);
    const models = path.join(home, 'models');
    expect(existsSync(models) ? readdirSync(models).filter((entry) => entry !== '.lock') : []).toEqual([]);
  });

  async function changed(change: (weights: ReturnType<typeof tinyWeights>) => void) {
    const weights = tinyWeights();
    change(weights);
    return { ...(await tinyFolder()), 'model.safetensors': writeSafetensors(weights) };
  }
});
