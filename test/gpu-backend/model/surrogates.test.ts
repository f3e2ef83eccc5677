/** Tables of surrogates on disk, in both bases, and inside an installed model. */
import { spawnSync } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm, stat, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { installTable, pullModel, showModel, withPresetSurrogates } from '../../../gpu-backend/cli/models.ts';
import { openRunner } from '../../../gpu-backend/engine/runner.ts';
import type { InstalledModel } from '../../../gpu-backend/model/store.ts';
import {
  readSurrogates,
  type SurrogateTable,
  toFileBasis,
  toInstalledBasis,
  writeSurrogates,
} from '../../../gpu-backend/model/surrogates.ts';
import type { ModelHash } from '../../../shared/mask/mask.ts';
import { maskFromSkippedLayers, SURROGATES_ID_PATTERN, withSurrogates } from '../../../shared/mask/mask.ts';
import { furthest } from '../../support/furthest.ts';
import { tinyLlama, writeGguf } from '../../support/gguf.ts';
import { randomSurrogates, TINY_CONFIG } from '../../support/random-llama.ts';

let home: string;
let file: string;
beforeEach(async () => {
  home = await mkdtemp(path.join(tmpdir(), 'maskroute-surrogates-'));
  file = path.join(home, 'table.safetensors');
});
afterEach(() => rm(home, { recursive: true, force: true }));

const hooks = { log: () => {}, onProgress: () => {} };
const MODEL = 'ab'.repeat(32) as ModelHash;
const tiny = { ...TINY_CONFIG, layerCount: 2, hiddenSize: 64 };

const closeTo = (a: SurrogateTable, b: SurrogateTable, most: number) => {
  for (const part of ['a', 'b', 'bias', 'first'] as const) {
    expect(furthest(a[part], b[part])).toBeLessThan(most);
  }
};

test('a table is read as it was written, in half precision; equal tables have equal ids', async () => {
  const table = randomSurrogates(tiny, 32);
  await writeSurrogates(file, { model: MODEL, table, fitted: 'for a test' });
  const found = await readSurrogates(file);
  expect(found).toMatchObject({ model: MODEL, fitted: 'for a test' });
  expect(found.table).toMatchObject({ blockCount: 4, hiddenSize: 64, rank: 32 });
  expect(found.id).toMatch(SURROGATES_ID_PATTERN);
  closeTo(found.table, table, 1e-3);
  const again = path.join(home, 'again.safetensors');
  await writeSurrogates(again, { model: MODEL, table, fitted: 'for a test' });
  expect((await readSurrogates(again)).id).toBe(found.id);
  await writeSurrogates(again, {
    model: MODEL,
    table: { ...table, bias: table.first },
    fitted: 'for a test',
  });
  expect((await readSurrogates(again)).id).not.toBe(found.id);
});

test('what is no table, or of a rank that 8-bit products lack, is refused with the reason', async () => {
  const write = (table: SurrogateTable, model = MODEL) => writeSurrogates(file, { model, table, fitted: '' });
  const table = randomSurrogates(tiny, 32);
  await write(table, 'nothing' as ModelHash);
  await expect(readSurrogates(file)).rejects.toThrow(/names no model/);
  await write({
    ...table,
    bias: table.bias.slice(64),
    first: table.first.slice(64),
    blockCount: 3,
    a: table.a.slice(64 * 32),
    b: table.b,
  });
  await expect(readSurrogates(file)).rejects.toMatchObject({ code: 'corrupt_model' });
  await write(randomSurrogates(tiny, 16));
  await expect(readSurrogates(file)).rejects.toThrow(/multiple of 32/);
  await write(table);
  await truncate(file, 20_000);
  await expect(readSurrogates(file)).rejects.toMatchObject({ code: 'corrupt_model' });
  await writeFile(file, 'no safetensors at all');
  await expect(readSurrogates(file)).rejects.toMatchObject({ code: 'corrupt_model' });
  await expect(write({ ...table, bias: table.bias.map(() => 1e6) })).rejects.toThrow(/half precision/);
});

test.each([
  ['64 channels', { hiddenSize: 64 }],
  ['96 channels', { hiddenSize: 96 }],
  ['norms behind blocks', { postNorms: true }],
] as const)('with %s the rotated basis and back is the same table', (_, changes) => {
  const config = { ...TINY_CONFIG, ...changes };
  const table = randomSurrogates(config, 32);
  const rotated = toInstalledBasis(table, { config, weights: 'q8' });
  closeTo(toFileBasis(rotated, { config, weights: 'q8' }), table, 1e-5);
  expect(rotated.a).not.toEqual(table.a);
  expect(toInstalledBasis(table, { config, weights: 'f32' })).toBe(table);
});

async function pullTiny(): Promise<InstalledModel> {
  const source = path.join(home, 'tiny.gguf');
  await writeFile(source, writeGguf(tinyLlama()));
  return await pullModel(source, { home, weights: 'q8', ...hooks });
}

test('a model gets a table beside its weights, changes it, and keeps its name and hash', async () => {
  const { manifest } = await pullTiny();
  const model = manifest.hash;
  await writeSurrogates(file, { model, table: randomSurrogates(tiny, 32), fitted: 'first' });
  const first = await installTable(home, manifest.name, file, hooks);
  expect(first.manifest).toMatchObject({
    hash: model,
    surrogates: { rank: 32, fitted: 'first', preset: false },
  });
  expect((await readdir(first.folder)).sort()).toEqual(
    ['model-batched.onnx', 'model.json', 'model.onnx', 'surrogates.bin', 'surrogates.safetensors'].concat([
      'tokenizer.json',
      'tokenizer_config.json',
      'weights.bin',
    ]),
  );
  expect((await showModel(home, manifest.name, { verify: true })).manifest).toEqual(first.manifest);
  // The same weights and tables in another size: an engine that has the first open goes on with it.
  const id = first.manifest.surrogates!.id;
  const runner = await openRunner(first.folder, manifest.config, { threads: 1, surrogates: id });
  await writeSurrogates(file, { model, table: randomSurrogates(tiny, 64), fitted: 'second' });
  const second = await installTable(home, manifest.name, file, hooks);
  expect(second.manifest.surrogates).toMatchObject({ rank: 64, fitted: 'second' });
  const mask = withSurrogates(maskFromSkippedLayers(4, { skipAttention: [1], skipFfn: [0] }), id);
  const logits = await runner.run({
    cache: runner.newCache(),
    tokenIds: [5, 6, 7],
    plan: { mask, kv: 'preserve' },
    logitRows: [2],
  });
  expect(logits.every(Number.isFinite)).toBe(true);
  await runner.close();
  expect((await readdir(path.join(home, 'models'))).filter((name) => !name.startsWith('.lock'))).toEqual([
    manifest.name,
  ]);
});

test('its weights have one name all the time: ONNX Runtime refuses files with a second', async () => {
  const { folder, manifest } = await pullTiny();
  await writeSurrogates(file, { model: manifest.hash, table: randomSurrogates(tiny, 32), fitted: '' });
  const namesOf = (weights: string) =>
    stat(weights).then(
      ({ nlink }) => nlink,
      () => 0,
    );
  let isDone = false;
  const installing = installTable(home, manifest.name, file, hooks).finally(() => {
    isDone = true;
  });
  let most = 0;
  while (!isDone) most = Math.max(most, await namesOf(path.join(folder, 'weights.bin')));
  await installing;
  expect(most).toBe(1);
});

test('a full disk leaves the model as it was, and is said to need room for a second copy', async () => {
  const { folder, manifest } = await pullTiny();
  await writeSurrogates(file, { model: manifest.hash, table: randomSurrogates(tiny, 32), fitted: '' });
  const cli = path.resolve(import.meta.dirname, '../../../gpu-backend/cli/cli.ts');
  // No file may have more than 8 KB.
  const shell = `ulimit -f 8; exec "${process.execPath}" "${cli}" model surrogates ${manifest.name} "${file}"`;
  const env = { ...process.env, MASKROUTE_HOME: home };
  const { status, stderr } = spawnSync('sh', ['-c', shell], { encoding: 'utf8', env });
  expect(stderr).toMatch(
    /^error: .*was not installed in tiny.* a second copy of the model, which failed: EFBIG.*\n$/,
  );
  expect(status).toBe(1);
  expect((await showModel(home, manifest.name, { verify: true })).manifest).toEqual(manifest);
  expect((await readdir(path.dirname(folder))).filter((name) => name !== '.lock')).toEqual([manifest.name]);
});

test('another model’s table leaves the model as it was', async () => {
  const installed = await pullTiny();
  const before = await readFile(path.join(installed.folder, 'model.onnx'));
  await writeSurrogates(file, { model: MODEL, table: randomSurrogates(tiny, 32), fitted: '' });
  const { name } = installed.manifest;
  await expect(installTable(home, name, file, hooks)).rejects.toMatchObject({
    code: 'surrogates_mismatch',
  });
  await writeSurrogates(file, {
    model: installed.manifest.hash,
    table: randomSurrogates(TINY_CONFIG, 32),
    fitted: '',
  });
  await expect(installTable(home, name, file, hooks)).rejects.toMatchObject({
    code: 'surrogates_mismatch',
  });
  expect(await readFile(path.join(installed.folder, 'model.onnx'))).toEqual(before);
  expect((await withPresetSurrogates(home, installed, hooks)).manifest).toEqual(installed.manifest);
});
