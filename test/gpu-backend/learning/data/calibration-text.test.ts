/** The text that four bits are measured on, on a tiny model with random weights. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { readCalibrationText, writeOwnText } from '../../../../gpu-backend/learning/data/calibration-text.ts';
import type { InstalledModel } from '../../../../gpu-backend/model/store.ts';
import { openModelText } from '../../../../gpu-backend/model/tokenizer/model-text.ts';
import { createRandom, permutation } from '../../../../gpu-backend/random.ts';
import { installTinyModel } from '../../../support/tiny-model.ts';

let folder: string;
let model: InstalledModel;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-text-'));
  model = await installTinyModel(join(folder, 'model'), 'q8', { contextTokens: 64, layerCount: 2 });
});
afterAll(() => rm(folder, { recursive: true }));

const write = (seed: number, signal?: AbortSignal) =>
  writeOwnText(model, { threads: 1, seed, signal, onProgress: () => undefined });

test('a model writes whole sequences within its context, and passages stand between them; equal seeds give equal text', async () => {
  const text = await write(1);
  expect(text.sequenceTokens).toBe(64);
  // 10 tokens for each of the 160 inputs of its widest matrix, and as many of passages.
  expect(text.tokenIds.length).toBe(3200);
  const { tokenizer } = await openModelText(model.folder, model.manifest);
  const sequences = Array.from({ length: 50 }, (_, i) =>
    tokenizer.decode(text.tokenIds.slice(64 * i, 64 * (i + 1))),
  );
  const passages = await readFile(
    new URL('../../../../gpu-backend/learning/data/passages.jsonl', import.meta.url),
    'utf8',
  );
  const isOfPassage = (words: string) => passages.includes(JSON.stringify(words.slice(-12)).slice(1, -1));
  // Every second one, whatever a row of passages begins with.
  const found = sequences.map((sequence) => isOfPassage(sequence));
  for (let i = 0; i < 50; i += 2) expect(found.slice(i, i + 2).filter(Boolean).length).toBeLessThan(2);
  expect(found.filter(Boolean).length).toBeGreaterThan(12);
  expect(text.tokenIds.every((id) => id >= 0 && id < model.manifest.config.vocabularySize)).toBe(true);
  expect(await write(1)).toEqual(text);
  expect((await write(2)).tokenIds).not.toEqual(text.tokenIds);
});

test('a model whose template refuses a conversation gets it as plain text', async () => {
  const chatTemplate = "{{ raise_exception('no') }}";
  const strict = { ...model, manifest: { ...model.manifest, chatTemplate } };
  const text = await writeOwnText(strict, { threads: 1, seed: 1, onProgress: () => undefined });
  expect(text.tokenIds.length).toBe(3200);
  expect(text.tokenIds).not.toEqual((await write(1)).tokenIds);
});

test('told to stop, it stops', async () => {
  await expect(write(1, AbortSignal.abort(new Error('enough')))).rejects.toThrow('enough');
});

const rows = async (name: string, texts: readonly string[]): Promise<string> => {
  const path = join(folder, name);
  await writeFile(path, texts.map((text) => `${JSON.stringify({ text })}\n`).join(''));
  return path;
};

test("a user's rows become sequences, cut where they are long, in an order that the seed decides", async () => {
  const texts = Array.from({ length: 50 }, (_, i) => `${i}`.padStart(2, '0').repeat(i % 2 ? 10 : 200));
  const path = await rows('rows.jsonl', texts);
  // A token a byte: 25 rows of 20 and 25 that are cut to 64.
  const some = await rows('some.jsonl', [...texts, ...texts.map((text) => `${text}!`)]);
  await expect(readCalibrationText(model, [path], 1)).resolves.toMatchObject({ sequenceTokens: 64 });
  const text = await readCalibrationText(model, [some], 1);
  expect(text.tokenIds.length % 64).toBe(0);
  expect(text.tokenIds.length).toBeGreaterThan(4100);
  expect(await readCalibrationText(model, [some], 1)).toEqual(text);
  expect((await readCalibrationText(model, [some], 2)).tokenIds).not.toEqual(text.tokenIds);
});

test('rows are read into tokens until there are enough: however many there are, the rest costs nothing', async () => {
  const count = 400;
  const last = permutation(count, createRandom(1)).at(-1)!;
  // 256 rows of 64 tokens are enough. A template may refuse a row, which shows that it was read.
  const chatTemplate = "{{ raise_exception('it was read') }}";
  const strict = { ...model, manifest: { ...model.manifest, chatTemplate } };
  const refused = { question: 'Is this read?', answer: '' };
  const lines = Array.from({ length: count }, (_, i) => (i === last ? refused : { text: `${i}`.repeat(80) }));
  const path = join(folder, 'many.jsonl');
  await writeFile(path, lines.map((line) => `${JSON.stringify(line)}\n`).join(''));
  expect((await readCalibrationText(strict, [path], 1)).tokenIds.length).toBe(16_384);
});

test('too little text is refused with what is needed, and a row that is none with its line', async () => {
  await expect(
    readCalibrationText(model, [await rows('short.jsonl', ['a few words'])], 1),
  ).rejects.toMatchObject({
    code: 'invalid_data',
    message: expect.stringMatching(/2048 tokens .* has 11/),
  });
  const bad = join(folder, 'bad.jsonl');
  await writeFile(bad, '{"text": "x"}\n{"nothing": 1}\n');
  await expect(readCalibrationText(model, [bad], 1)).rejects.toMatchObject({
    code: 'invalid_data',
    message: expect.stringContaining('bad.jsonl:2'),
  });
});

test('a row that the chat template refuses is named', async () => {
  const chatTemplate =
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no answer here') }}{% endif %}{{ messages[0]['content'] }}";
  const strict = { ...model, manifest: { ...model.manifest, chatTemplate } };
  const path = join(folder, 'support.jsonl');
  const messages = [
    { role: 'assistant', content: 'How can I help?' },
    { role: 'user', content: 'Where is my parcel?' },
  ];
  await writeFile(path, `${JSON.stringify({ messages })}\n`);
  await expect(readCalibrationText(strict, [path], 1)).rejects.toMatchObject({
    code: 'invalid_data',
    message: expect.stringMatching(/kind support .*"Where is my parcel\?" .*no answer here/),
  });
});

test('a system prompt before all rows is no part of the text, which it would fill', async () => {
  const path = join(folder, 'led.jsonl');
  const system = { role: 'system', content: 'Answer in one sentence. '.repeat(8) };
  const rows = Array.from({ length: 90 }, (_, i) => ({
    messages: [system, { role: 'user', content: `${i} ships` }],
  }));
  await writeFile(path, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
  const { tokenIds } = await readCalibrationText(model, [path], 1);
  const { tokenizer } = await openModelText(model.folder, model.manifest);
  const text = tokenizer.decode(tokenIds);
  expect(text).toContain('ships');
  expect(text).not.toContain('sentence');
});
