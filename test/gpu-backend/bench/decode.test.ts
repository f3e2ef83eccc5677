/** Benches of models whose context is shorter than what is usually measured. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { benchBatch } from '../../../gpu-backend/bench/batch.ts';
import { benchDecode, benchPrefill, decodePositions } from '../../../gpu-backend/bench/decode.ts';
import { installTinyModel } from '../../support/tiny-model.ts';

let home: string;
const said: string[] = [];
beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), 'maskroute-bench-'));
  for (const contextTokens of [128, 200, 2050]) {
    const shape = { layerCount: 2, vocabularySize: 2048, contextTokens };
    const { folder, manifest } = await installTinyModel(
      join(home, 'models', `${contextTokens}`),
      'q8',
      shape,
    );
    await writeFile(join(folder, 'model.json'), JSON.stringify(manifest));
  }
});
afterAll(() => rm(home, { recursive: true }));

const optionsOf = (model: string, long = false) => {
  said.length = 0;
  return { home, model, long, rounds: 1, say: (line: string) => void said.push(line) };
};

test('long prompts: those that fit are measured, and the others are named', async () => {
  const result = await benchPrefill(optionsOf('2050', true));
  expect(Object.keys(result).filter((name) => name.startsWith('of'))).toEqual(['of2048']);
  expect(said[0]).toBe('left out: what needs 4096, 8000 tokens, as the model has a context of 2050');
});

test('positions of decoding count the tokens that are decoded after them', async () => {
  expect(await decodePositions(optionsOf('128'))).toEqual([64]);
  expect(said).toEqual(['left out: what needs 536 tokens, as the model has a context of 128']);
});

test('many streams: those that fit are measured, and the others are named', async () => {
  const result = await benchBatch(optionsOf('200'));
  expect(result).toMatchObject({ eightStreams_tokensPerSecond: { 64: expect.any(Number) } });
  expect(Object.keys(result).filter((name) => name.startsWith('gap'))).toEqual([]);
  expect(said[0]).toBe('left out: what needs 520, 780, 244 tokens, as the model has a context of 200');
});

test.each([
  ['prefill', 512, () => benchPrefill(optionsOf('128'))],
  ['decode --long', 2072, () => benchDecode(optionsOf('2050', true))],
  ['batch', 144, () => benchBatch(optionsOf('128'))],
])(
  '%s: a model that is too short for everything is refused before anything is measured',
  async (_, needed, bench) => {
    await expect(bench()).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringMatching(new RegExp(`context of \\d+ tokens, .* needs ${needed}\\.`)),
    });
    expect(said).toEqual([]);
  },
);
