/** Importing into the store: whole or not at all, whoever is killed and whoever comes at the same time. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readdir, readFile, rename, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { listModels, pullModel, showModel } from '../../../gpu-backend/cli/models.ts';
import { importModel, isHeldSo } from '../../../gpu-backend/model/import-model.ts';
import {
  type ImportProgress,
  isCalibrated,
  WEIGHT_KINDS,
  type WeightKind,
} from '../../../gpu-backend/model/model-source.ts';
import { COLUMNS_VERSION } from '../../../gpu-backend/model/quantization/columns.ts';
import { FOUR_BITS_VERSION } from '../../../gpu-backend/model/quantization/four-bits.ts';
import { tryModelText } from '../../../gpu-backend/model/tokenizer/model-text.ts';
import { loadTokenizer } from '../../../gpu-backend/model/tokenizer/tokenizer.ts';
import { tinyLlama, type Value, writeGguf } from '../../support/gguf.ts';

let home: string;
let file: string;
beforeEach(async () => {
  home = await mkdtemp(path.join(tmpdir(), 'maskroute-store-'));
  file = path.join(home, 'Tiny model (v1).gguf');
  await writeFile(file, writeGguf(tinyLlama()));
});
afterEach(() => rm(home, { recursive: true, force: true }));

const pull = (
  spec: string,
  options: {
    weights?: WeightKind;
    force?: boolean;
    data?: readonly string[];
    signal?: AbortSignal;
    onProgress?: (p: ImportProgress) => void;
    log?: (line: string) => void;
  } = {},
) => pullModel(spec, { home, weights: 'q8', onProgress: () => {}, log: () => {}, ...options });
/** A file of text that is long enough for calibration. */
async function calibrationRows(): Promise<string> {
  const data = path.join(home, 'data.jsonl');
  const rows = Array.from({ length: 200 }, (_, i) =>
    JSON.stringify({ text: `${i} is a number. `.repeat(4) }),
  );
  await writeFile(data, rows.join('\n'));
  return data;
}
const inStore = async () =>
  (await readdir(path.join(home, 'models'))).filter((name) => !name.startsWith('.lock')).sort();

/* A model of 1.34e9 weights in fp16. */
const LARGE = { hidden: 8192, ffn: 16384, heads: 64 };
const F16 = 1;
const LARGE_SHAPE: Record<string, Value> = {
  'llama.embedding_length': { type: 'u32', value: LARGE.hidden },
  'llama.feed_forward_length': { type: 'u32', value: LARGE.ffn },
  'llama.attention.head_count': { type: 'u32', value: LARGE.heads },
  'llama.attention.head_count_kv': { type: 'u32', value: LARGE.heads },
};
/** The tiny model's tensors, wider, and without their data. */
const largeTensors = () => {
  let end = 0;
  return tinyLlama().tensors.map(({ name, shape }) => {
    const wide = shape.map((size) => (size === 128 ? LARGE.ffn : size <= 64 ? LARGE.hidden : size));
    const offset = BigInt(end);
    end += 2 * wide.reduce((product, size) => product * size, 1);
    return { name, shape: wide, type: F16, data: new Uint8Array(), offset };
  });
};

describe('pullModel', () => {
  test('installs a file under its own name, and everything is there', async () => {
    const { folder, manifest } = await pull(file);
    expect(manifest).toMatchObject({
      name: 'Tiny-model-v1',
      weights: 'q8',
      eosTokenIds: [2, 0],
      addBos: false,
    });
    expect((await readdir(folder)).sort()).toEqual(
      [
        ...['model-batched.onnx', 'model.json', 'model.onnx', 'tokenizer.json'],
        ...['tokenizer_config.json', 'weights.bin'],
      ].sort(),
    );
    expect(await inStore()).toEqual(['Tiny-model-v1']);
    const tokenizer = await loadTokenizer(folder);
    expect(tokenizer.decode(tokenizer.encode('hello wörld'))).toBe('hello wörld');
    expect((await showModel(home, manifest.name, { verify: true })).manifest).toEqual(manifest);
  });

  test('other weight kinds stand beside it', async () => {
    await pull(file);
    await pull(file, { weights: 'f32' });
    expect((await listModels(home)).map(({ name, weights }) => [name, weights])).toEqual([
      ['Tiny-model-v1', 'q8'],
      ['Tiny-model-v1-f32', 'f32'],
    ]);
  });

  test('a long name is a name in each format', async () => {
    const long = path.join(home, `${'n'.repeat(200)}.gguf`);
    await rename(file, long);
    const names: string[] = [];
    for (const weights of WEIGHT_KINDS) {
      const { manifest } = await pull(long, {
        weights,
        ...(isCalibrated(weights) && { data: [await calibrationRows()] }),
      });
      expect((await showModel(home, manifest.name)).manifest).toEqual(manifest);
      names.push(manifest.name);
    }
    expect((await listModels(home)).map(({ name }) => name)).toEqual(names.sort());
  });

  test.each([
    ['q4', 'fourBits', FOUR_BITS_VERSION],
    ['q8-columns', 'columns', COLUMNS_VERSION],
  ] as const)(
    '%s: calibrated on its own text or on data, done once for each, and nothing else is left',
    async (weights, field, version) => {
      const options = { weights };
      const own = await pull(file, options);
      expect(own.manifest[field]).toEqual({
        version,
        text: expect.stringMatching(/^own text, seed 1, passages [0-9a-f]{64}$/),
      });
      expect((await pull(file, options)).manifest.importedAt).toBe(own.manifest.importedAt);
      const measured = await pull(file, { ...options, data: [await calibrationRows()] });
      expect(measured.manifest[field]?.text).toMatch(/^data [0-9a-f]{64}$/);
      expect(measured.manifest.files['weights.bin']).not.toEqual(own.manifest.files['weights.bin']);
      expect((await showModel(home, own.manifest.name, { verify: true })).manifest).toEqual(
        measured.manifest,
      );
      expect(await inStore()).toEqual([`Tiny-model-v1-${weights}`]);
    },
  );

  test('four bits: stopped while the model writes, or given data that is none, it leaves nothing', async () => {
    const controller = new AbortController();
    const onProgress = ({ phase }: ImportProgress) => phase === 'write' && controller.abort();
    const { signal } = controller;
    await expect(pull(file, { weights: 'q4', signal, onProgress })).rejects.toMatchObject({
      code: 'cancelled',
    });
    const data = [path.join(home, 'few.jsonl')];
    await writeFile(data[0]!, '{"text": "a few words"}\n');
    await expect(pull(file, { weights: 'q4', data })).rejects.toMatchObject({ code: 'invalid_data' });
    await expect(pull(file, { weights: 'q8', data })).rejects.toMatchObject({ code: 'invalid_request' });
    await expect(pull(file, { weights: 'q4', data: ['/nowhere.jsonl'] })).rejects.toMatchObject({
      code: 'invalid_argument',
    });
    expect(await inStore()).toEqual([]);
  });

  test('four bits of more than a billion weights are rounded to nearest, which is said before the work', async () => {
    await writeFile(file, writeGguf(tinyLlama({ metadata: LARGE_SHAPE, tensors: largeTensors() })));
    // Zeros that take no room on the disk.
    await truncate(file, 2 ** 32);
    const stop = new AbortController();
    const said: string[] = [];
    const onProgress = ({ phase }: ImportProgress) => {
      said.push(phase);
      stop.abort();
    };
    const log = (line: string) => said.push(line);
    const { signal } = stop;
    await expect(pull(file, { weights: 'q4', signal, onProgress, log })).rejects.toMatchObject({
      code: 'cancelled',
    });
    expect(said[0]).toMatch(/^The model is large, so its weights are rounded to nearest\. With --data FILE /);
    expect(said[1]).toBe('convert');
    expect(await inStore()).toEqual([]);
  });

  test.each([
    ['q4', 'fourBits'],
    ['q8-columns', 'columns'],
  ] as const)(
    '%s, rounded to nearest: another version of the codes is another format',
    async (kind, field) => {
      const [name, origin] = ['rounded', 'none'];
      const weights = { kind, origin, text: undefined };
      const hooks = { onProgress: () => {}, log: () => {} };
      const local = { kind: 'gguf', path: file, source: 'file:tiny' } as const;
      const { manifest } = await importModel(local, { home, name, weights, ...hooks });
      const own = manifest[field]!;
      expect(own.text).toBe(origin);
      expect(isHeldSo(manifest, kind, origin)).toBe(true);
      const earlier = { ...manifest, [field]: { ...own, version: own.version - 1 } };
      expect(isHeldSo(earlier, kind, origin)).toBe(false);
    },
  );

  test('leaves the same model alone, imports it anew when told to, and replaces another of that name', async () => {
    const first = await pull(file);
    expect((await pull(file)).manifest.importedAt).toBe(first.manifest.importedAt);
    expect((await pull(file, { force: true })).manifest.importedAt).not.toBe(first.manifest.importedAt);
    await writeFile(
      file,
      writeGguf(tinyLlama({ metadata: { 'llama.context_length': { type: 'u32', value: 64 } } })),
    );
    const other = await pull(file);
    expect(other.manifest.hash).not.toBe(first.manifest.hash);
    expect(other.manifest.config.contextTokens).toBe(64);
    expect(await inStore()).toEqual(['Tiny-model-v1']);
  });

  test.each([
    ['a path that is not there', '/nowhere/x.gguf', 'not_found'],
    ['a hub name that is none', 'hf:only-an-owner', 'invalid_request'],
    ['a path out of the hub', 'hf:a/b/../../etc/passwd', 'invalid_request'],
  ])('refuses %s', async (_, spec, code) => {
    await expect(pull(spec)).rejects.toMatchObject({ code });
  });

  test('a refused file leaves nothing', async () => {
    await writeFile(file, writeGguf(tinyLlama()).subarray(0, -10));
    await expect(pull(file)).rejects.toMatchObject({ code: 'corrupt_model' });
    const hoarding =
      '{% set ns = namespace(kept=[0]) %}{% for a in range(40) %}{% set ns.kept = ns.kept + ns.kept %}{% endfor %}';
    await writeFile(
      file,
      writeGguf(tinyLlama({ metadata: { 'tokenizer.chat_template': { type: 'string', value: hoarding } } })),
    );
    await expect(pull(file)).rejects.toMatchObject({
      code: 'unsupported_model',
      message: expect.stringContaining('chat template'),
    });
    expect(await inStore()).toEqual([]);
  });

  test('a chat template that never ends is stopped once it has used its CPU time', async () => {
    const { folder, manifest } = await pull(file);
    await tryModelText(folder, manifest);
    const loop = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}';
    await expect(tryModelText(folder, { ...manifest, chatTemplate: loop }, 1000)).rejects.toMatchObject({
      code: 'unsupported_model',
      message: expect.stringContaining('it takes more than 1 s of CPU time'),
    });
  });

  test('told to stop, it stops and leaves nothing', async () => {
    const controller = new AbortController();
    const onProgress = ({ phase }: ImportProgress) => phase === 'convert' && controller.abort();
    await expect(pull(file, { signal: controller.signal, onProgress })).rejects.toMatchObject({
      code: 'cancelled',
    });
    expect(await inStore()).toEqual([]);
  });
});

test('a folder that was renamed or copied is a model of its new name', async () => {
  const { folder } = await pull(file);
  await cp(folder, path.join(home, 'models', 'copy'), { recursive: true });
  await rename(folder, path.join(home, 'models', 'renamed'));
  const rows = await listModels(home);
  expect(rows.map(({ name, problem }) => [name, problem])).toEqual([
    ['copy', undefined],
    ['renamed', undefined],
  ]);
  expect((await showModel(home, 'copy')).manifest.name).toBe('copy');
});

describe('what is broken', () => {
  test('is listed with its reason and refused', async () => {
    const { folder } = await pull(file);
    await writeFile(path.join(folder, 'weights.bin'), 'short');
    await mkdir(path.join(home, 'models', 'empty'));
    const rows = await listModels(home);
    expect(rows.map(({ name, problem }) => [name, problem])).toEqual([
      ['Tiny-model-v1', expect.stringMatching(/weights.bin .* has 5 bytes instead of/)],
      ['empty', expect.stringMatching(/model.json cannot be read/)],
    ]);
    await expect(showModel(home, 'Tiny-model-v1')).rejects.toMatchObject({ code: 'corrupt_model' });
    await expect(showModel(home, '../models/Tiny-model-v1')).rejects.toMatchObject({
      code: 'model_not_found',
    });
    await expect(showModel(home, 'absent')).rejects.toThrow(/installed: Tiny-model-v1, empty/);
    await pull(file);
    expect((await showModel(home, 'Tiny-model-v1', { verify: true })).manifest.name).toBe('Tiny-model-v1');
  });

  test('a model that another version installed is told apart, and pulling mends it', async () => {
    const { folder } = await pull(file);
    const manifest = path.join(folder, 'model.json');
    await writeFile(
      manifest,
      (await readFile(manifest, 'utf8')).replace('maskroute-model-v', 'maskroute-model-v0'),
    );
    await expect(showModel(home, 'Tiny-model-v1')).rejects.toMatchObject({
      code: 'corrupt_model',
      // Nothing is damaged.
      message: expect.stringMatching(/^\S+model\.json was written by another version of Maskroute; pull/),
    });
    await pull(file);
    expect((await showModel(home, 'Tiny-model-v1')).manifest.name).toBe('Tiny-model-v1');
  });

  test('a byte that changed is found by --verify', async () => {
    const { folder } = await pull(file);
    const weights = path.join(folder, 'weights.bin');
    const bytes = await readFile(weights);
    bytes[100]! ^= 1;
    await writeFile(weights, bytes);
    await showModel(home, 'Tiny-model-v1');
    await expect(showModel(home, 'Tiny-model-v1', { verify: true })).rejects.toThrow(
      /weights.bin .* has changed/,
    );
  });
});

const importer = fileURLToPath(new URL('../../support/import-child.ts', import.meta.url));

/** Another process that imports; `stopAt` names the first progress after which it is killed. */
function importInChild(options: { stopAt?: string }) {
  const child = spawn(process.execPath, [importer, home, file], { stdio: ['ignore', 'pipe', 'inherit'] });
  const lines: string[] = [];
  createInterface({ input: child.stdout }).on('line', (line) => {
    lines.push(line);
    if (options.stopAt !== undefined && line.startsWith(options.stopAt)) child.kill('SIGKILL');
  });
  return new Promise<{ lines: string[]; status: number | null }>((resolve) =>
    child.once('close', (status) => resolve({ lines, status })),
  );
}

describe('several processes', () => {
  test('killed half-way, an import leaves no model, and the next one clears up', async () => {
    const { lines, status } = await importInChild({ stopAt: 'convert' });
    expect(status).toBe(null);
    expect(lines).not.toContain('installed');
    const left = await inStore();
    expect(left).toEqual([expect.stringMatching(/^\.incoming-Tiny-model-v1-/)]);
    expect(await listModels(home)).toEqual([]);
    await pull(file);
    expect(await inStore()).toEqual(['Tiny-model-v1']);
  });

  test('an older model whose replacement was killed between the two renames comes back', async () => {
    const { folder } = await pull(file);
    await rename(folder, path.join(home, 'models', '.outgoing-Tiny-model-v1'));
    const other = path.join(home, 'other.gguf');
    await writeFile(other, writeGguf(tinyLlama()));
    await pull(other);
    expect(await inStore()).toEqual(['Tiny-model-v1', 'other']);
  });

  test('two at once: both end well, and the work is done once', async () => {
    const results = await Promise.all([importInChild({}), importInChild({})]);
    expect(results.map(({ status }) => status)).toEqual([0, 0]);
    expect(results.filter(({ lines }) => lines.some((line) => line.startsWith('convert')))).toHaveLength(1);
    expect(await inStore()).toEqual(['Tiny-model-v1']);
    expect(existsSync(path.join(home, 'models', 'Tiny-model-v1', 'model.onnx'))).toBe(true);
  });
});
