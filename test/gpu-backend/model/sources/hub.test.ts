/** Pulls from the hub, over real HTTP from a server on this machine. */
import { readdirSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { pullModel, showModel } from '../../../../gpu-backend/cli/models.ts';
import { decoderTensors } from '../../../../gpu-backend/model/families.ts';
import { openGguf } from '../../../../gpu-backend/model/formats/gguf.ts';
import { tokenizerFromGguf } from '../../../../gpu-backend/model/tokenizer/gguf-tokenizer.ts';
import type { FakeHub, HubOptions } from '../../../support/fake-hub.ts';
import { startFakeHub } from '../../../support/fake-hub.ts';
import { splitGguf, tinyLlama, writeGguf } from '../../../support/gguf.ts';
import { tinyFolder, tinyWeights, writeSafetensors } from '../../../support/safetensors.ts';

const REPOSITORY = 'Some-Org/tiny-llama';
let home: string;
let hub: FakeHub | undefined;

beforeEach(async () => {
  home = await mkdtemp(path.join(tmpdir(), 'maskroute-hub-'));
  vi.stubEnv('HF_TOKEN', undefined);
});
afterEach(async () => {
  vi.unstubAllEnvs();
  await hub?.close();
  hub = undefined;
  await rm(home, { recursive: true, force: true });
});

async function serve(options: Omit<HubOptions, 'repository'>): Promise<FakeHub> {
  hub = await startFakeHub({ repository: REPOSITORY, ...options });
  vi.stubEnv('HF_ENDPOINT', hub.url);
  return hub;
}
const pull = (spec = `hf:${REPOSITORY}`, signal?: AbortSignal) =>
  pullModel(spec, { home, weights: 'q8', onProgress: () => {}, log: () => {}, signal });
const ggufFile = writeGguf(tinyLlama());

describe('hf:OWNER/NAME', () => {
  test('takes the safetensors where there are any, at one commit', async () => {
    await serve({
      files: { ...(await tinyFolder()), 'model.Q8_0.gguf': ggufFile, 'README.md': new Uint8Array(9) },
    });
    const { manifest } = await pull();
    expect(manifest).toMatchObject({
      name: 'tiny-llama',
      source: `hf:${REPOSITORY}@0123456789abcdef0123456789abcdef01234567`,
      config: { layerCount: 2, hiddenSize: 64 },
      eosTokenIds: [2, 0],
    });
    expect(hub!.requests.some((line) => line.includes('README') || line.includes('gguf'))).toBe(false);
  });

  test.each([
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'],
    // As DeepSeek's and some of Qwen's are called.
    ['model-00001-of-000002.safetensors', 'model-00002-of-000002.safetensors'],
    ['model.safetensors-00001-of-00002.safetensors', 'model.safetensors-00002-of-00002.safetensors'],
  ])('takes shards, however they are numbered: %s', async (...names) => {
    const { 'model.safetensors': _, ...others } = await tinyFolder();
    const weights = [...tinyWeights()];
    const parts = [weights.slice(0, 10), weights.slice(10)];
    const map = Object.fromEntries(parts.flatMap((part, i) => part.map(([name]) => [name, names[i]])));
    await serve({
      files: {
        ...others,
        'model.safetensors.index.json': Buffer.from(JSON.stringify({ weight_map: map })),
        ...Object.fromEntries(names.map((name, i) => [name, writeSafetensors(new Map(parts[i]))])),
      },
    });
    expect((await pull()).manifest.config.layerCount).toBe(2);
  });

  test('takes one file before shards of the same, as transformers does', async () => {
    const index = { weight_map: { 'model.norm.weight': 'model-00001-of-00001.safetensors' } };
    await serve({
      files: {
        ...(await tinyFolder()),
        'model.safetensors.index.json': Buffer.from(JSON.stringify(index)),
        'model-00001-of-00001.safetensors': new Uint8Array(9),
      },
    });
    expect((await pull()).manifest.config.layerCount).toBe(2);
  });

  test('what is not supported is refused before the weights come', async () => {
    const { 'model.safetensors': weights, ...others } = await tinyFolder();
    const shard = 'model-00001-of-00001.safetensors';
    const cases: [string, Record<string, Uint8Array>, RegExp][] = [
      [
        'model.safetensors',
        { 'config.json': Buffer.from('{"model_type":"gemma2"}') },
        /architecture "gemma2"/,
      ],
      [
        'model.safetensors',
        { 'tokenizer.json': Buffer.from('{"model":{"type":"WordPiece"}}') },
        /neither byte-level/,
      ],
      [shard, {}, /shards and model\.safetensors\.index\.json/],
    ];
    for (const [name, changed, reason] of cases) {
      await serve({ files: { ...others, [name]: weights!, ...changed } });
      await expect(pull()).rejects.toMatchObject({
        code: 'unsupported_model',
        message: expect.stringMatching(reason),
      });
      expect(hub!.requests.filter((line) => line.includes('.safetensors'))).toEqual([]);
      await hub!.close();
    }
  });

  test('else a GGUF file, or the one that is named', async () => {
    await serve({
      files: { 'tiny.Q4_0.gguf': ggufFile, 'tiny.F16.gguf': ggufFile, 'tiny-Q8_0.gguf': ggufFile },
    });
    expect((await pull()).manifest.source).toMatch(/tiny-Q8_0\.gguf$/);
    expect((await pull(`hf:${REPOSITORY}/tiny.F16.gguf`)).manifest.name).toBe('tiny.F16');
    await expect(pull(`hf:${REPOSITORY}/absent.gguf`)).rejects.toThrow(/has no file absent.gguf/);
  });

  test('a revision is pinned, and one that does not exist is refused', async () => {
    await serve({ files: { 'tiny.gguf': ggufFile }, revisions: ['v1.0'] });
    const { manifest } = await pull(`hf:${REPOSITORY}@v1.0`);
    expect(manifest).toMatchObject({
      name: 'tiny-llama',
      source: `hf:${REPOSITORY}@0123456789abcdef0123456789abcdef01234567/tiny.gguf`,
    });
    expect(hub!.requests[0]).toMatch(/\/revision\/v1\.0/);
    await expect(pull(`hf:${REPOSITORY}@v2.0`)).rejects.toMatchObject({
      code: 'download_failed',
      message: expect.stringMatching(/no such repository or revision/),
    });
  });

  test('repositories of two owners do not share a name, unless --force says so', async () => {
    await serve({ files: { 'tiny.gguf': ggufFile } });
    const first = await pull();
    await hub!.close();
    const metadata = { 'llama.context_length': { type: 'u32', value: 64 } } as const;
    const files = { 'tiny.gguf': writeGguf(tinyLlama({ metadata })) };
    hub = await startFakeHub({ repository: 'Other-Org/tiny-llama', files });
    vi.stubEnv('HF_ENDPOINT', hub.url);
    await expect(pull('hf:Other-Org/tiny-llama')).rejects.toMatchObject({
      code: 'conflict',
      message: expect.stringMatching(/tiny-llama belongs to .* hf:Some-Org\/.* hf:Other-Org\/.*--force/),
    });
    // It says so before it downloads anything.
    expect(hub.requests).toEqual([]);
    // The first repository in other letters is no other one; this hub does not have it.
    await expect(pull('hf:SOME-org/tiny-llama')).rejects.toMatchObject({ code: 'download_failed' });
    expect((await showModel(home, 'tiny-llama')).manifest).toEqual(first.manifest);
    const options = { home, weights: 'q8', force: true, onProgress: () => {}, log: () => {} } as const;
    const { manifest } = await pullModel('hf:Other-Org/tiny-llama', options);
    expect(manifest.source).toMatch(/^hf:Other-Org/);
    expect(manifest.hash).not.toBe(first.manifest.hash);
  });

  test('a repository with other files than before replaces its older model', async () => {
    await serve({ files: { 'tiny.gguf': ggufFile } });
    expect((await pull()).manifest.source).toMatch(/\/tiny\.gguf$/);
    await hub!.close();
    await serve({ files: { ...(await tinyFolder()), 'tiny.gguf': ggufFile } });
    expect((await pull()).manifest.source).toMatch(/@[0-9a-f]{40}$/);
  });

  test('a file in parts is fetched whole, from a folder of the repository, too', async () => {
    const parts = splitGguf(tinyLlama(), 3);
    const files = Object.fromEntries(Object.entries(parts).map(([name, bytes]) => [`Q4_K/${name}`, bytes]));
    await serve({ files: { ...parts, ...files } });
    const { manifest } = await pull();
    expect(manifest.source).toMatch(/tiny-00001-of-00003\.gguf$/);
    const named = await pull(`hf:${REPOSITORY}/Q4_K/tiny-00002-of-00003.gguf`);
    expect(named.manifest).toMatchObject({ name: 'tiny', hash: manifest.hash });
  });

  test('a file whose name says that it is part 1 of 0 is one file', async () => {
    await serve({ files: { 'tiny-00001-of-00000.gguf': ggufFile } });
    expect((await pull()).manifest.source).toMatch(/tiny-00001-of-00000\.gguf$/);
  });

  test('a repository with pickles alone is refused with the reason', async () => {
    const { 'model.safetensors': _, ...others } = await tinyFolder();
    await serve({ files: { ...others, 'pytorch_model.bin': ggufFile } });
    await expect(pull()).rejects.toMatchObject({
      code: 'unsupported_model',
      message: expect.stringMatching(/pytorch_model.bin" is a pickle file.*runs its author's code/),
    });
    expect(hub!.requests.some((line) => line.includes('resolve'))).toBe(false);
  });

  test('a connection that breaks is taken up where it broke', async () => {
    await serve({
      files: { 'tiny.gguf': ggufFile },
      breaks: { file: 'tiny.gguf', afterBytes: 50_000, times: 1 },
    });
    await pull();
    expect(hub!.requests.filter((line) => line.includes('tiny.gguf')).at(-1)).toMatch(/bytes=50000-$/);
  });

  test('a line that breaks often brings a whole file, as long as each connection brings some of it', async () => {
    const times = 7;
    const afterBytes = Math.floor(ggufFile.length / (times + 1));
    await serve({
      files: { 'tiny.gguf': ggufFile },
      breaks: { file: 'tiny.gguf', afterBytes, times },
      linksExpire: true,
    });
    expect((await pull()).manifest.name).toBe('tiny-llama');
  }, 30_000);

  test('a line that brings nothing is given up', async () => {
    await serve({
      files: { 'tiny.gguf': ggufFile },
      breaks: { file: 'tiny.gguf', afterBytes: 0, times: 99 },
    });
    await expect(pull()).rejects.toMatchObject({ code: 'download_failed' });
    expect(hub!.requests.filter((line) => line.includes('/resolve/'))).toHaveLength(5);
  }, 30_000);

  test('what an interrupted pull has fetched is not fetched again', async () => {
    await serve({
      files: { 'tiny.gguf': ggufFile },
      breaks: { file: 'tiny.gguf', afterBytes: 60_000, times: 1 },
    });
    const controller = new AbortController();
    const interrupted = pullModel(`hf:${REPOSITORY}`, {
      home,
      weights: 'q8',
      log: () => {},
      signal: controller.signal,
      onProgress: ({ done }) => {
        if (done >= 60_000) controller.abort();
      },
    });
    await expect(interrupted).rejects.toMatchObject({ code: 'cancelled' });
    await pull();
    const fetches = hub!.requests.filter((line) => line.includes('tiny.gguf'));
    expect(fetches).toHaveLength(2);
    expect(fetches[1]).toMatch(/bytes=60000-$/);
  });

  test('content that is not what was announced is thrown away', async () => {
    await serve({ files: { 'tiny.gguf': ggufFile }, wrongHashOf: 'tiny.gguf' });
    await expect(pull()).rejects.toMatchObject({
      code: 'download_failed',
      message: expect.stringMatching(/SHA-256/),
    });
    const folder = path.join(home, 'sources', 'hub', REPOSITORY.replace('/', '--'));
    expect(readdirSync(path.join(folder, readdirSync(folder)[0]!))).toEqual(['.lock']);
  });

  test.each([
    ['private', false],
    ['gated', true],
  ])('the token of the environment opens %s models', async (_, isGated) => {
    await serve({ files: { 'tiny.gguf': ggufFile }, token: 'hf_secret', isGated });
    await expect(pull()).rejects.toMatchObject({
      code: 'download_failed',
      message: expect.stringMatching(/HF_TOKEN/),
    });
    vi.stubEnv('HF_TOKEN', 'hf_secret');
    expect((await pull()).manifest.name).toBe('tiny-llama');
  });

  test('says so quickly when the hub cannot be reached', async () => {
    await serve({ files: {} });
    await hub!.close();
    const started = performance.now();
    await expect(pull()).rejects.toMatchObject({ code: 'download_failed' });
    // Its probe takes 10 s at most; a request that is not bounded as a probe would take 30 s.
    expect(performance.now() - started).toBeLessThan(20_000);
  });

  test('a repository with no model in it is refused', async () => {
    await serve({ files: { 'README.md': new Uint8Array(4), 'pytorch_model.bin': new Uint8Array(4) } });
    await expect(pull()).rejects.toMatchObject({ code: 'unsupported_model' });
  });
});

test('the same model as GGUF and as safetensors gives the same weights and ids', async () => {
  const { openSafetensorsFolder } = await import('../../../../gpu-backend/model/formats/hf-folder.ts');
  const { tokenizerFromFolder } = await import('../../../../gpu-backend/model/tokenizer/hf-tokenizer.ts');
  const { createTokenizer } = await import('../../../../gpu-backend/model/tokenizer/tokenizer.ts');
  const { writeFile } = await import('node:fs/promises');
  for (const [name, bytes] of Object.entries(await tinyFolder()))
    await writeFile(path.join(home, name), bytes);
  await writeFile(path.join(home, 'tiny.gguf'), ggufFile);
  const [a, b] = [await openGguf(path.join(home, 'tiny.gguf')), await openSafetensorsFolder(home)];
  expect(a.config).toEqual(b.config);
  for (const { name } of decoderTensors(a.config))
    expect(await b.read(name), name).toEqual(await a.read(name));
  const fromGguf = tokenizerFromGguf(a.metadata, 265);
  const fromFolder = await tokenizerFromFolder(home, 265);
  expect({ ...fromFolder, tokenizerJson: 0, tokenizerConfig: 0 }).toEqual({
    ...fromGguf,
    tokenizerJson: 0,
    tokenizerConfig: 0,
  });
  const line = 'hello world 12½٣ \u0085\ufeff <|im_end|>';
  const ids = [fromGguf, fromFolder].map(({ tokenizerJson, tokenizerConfig }) => [
    ...createTokenizer(tokenizerJson, tokenizerConfig).encode(line),
  ]);
  expect(ids[1]).toEqual(ids[0]);
  await Promise.all([a.close(), b.close()]);
});
