/**
 * Encoders of other kinds against transformers: the first token's vector with WordPiece (bge), the mean behind a prefix with
 * unigrams (multilingual-e5), from safetensors, from ONNX, and pulled from a hub by name.
 */
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { gunzipSync } from 'node:zlib';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { createEncoderService, FULL_ENCODER } from '../../../gpu-backend/encoder/encoder-service.ts';
import { fetchFullEncoder, openFullEncoder } from '../../../gpu-backend/encoder/full-encoder.ts';
import { loadSentenceEncoder } from '../../../gpu-backend/encoder/sentence-encoder.ts';
import { distill } from '../../../gpu-backend/learning/data/distill.ts';
import { loadStaticEncoder } from '../../../shared/embedding/static-encoder.ts';
import { startFakeHub } from '../../support/fake-hub.ts';
import { furthestInRows } from '../../support/furthest.ts';
import { randomTensor } from '../../support/random-llama.ts';
import { writeSafetensors } from '../../support/safetensors.ts';
import figures from './fixtures/encoders.json' with { type: 'json' };

const { texts } = figures;
type Figures = (typeof figures.encoders)[number];
const read = (name: string) => readFile(new URL(name, import.meta.url));
const json = (value: unknown) => new TextEncoder().encode(JSON.stringify(value));

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-encoders-'));
});
afterEach(() => rm(folder, { recursive: true }));

async function filesOf(encoder: Figures): Promise<Record<string, Uint8Array>> {
  const table = gunzipSync(await read('../model/tokenizer/fixtures/nmt_nfkc.gz')).toString('base64');
  const tokenizer = JSON.stringify(encoder.tokenizer).replace('nmt_nfkc.gz', table);
  const weights = Object.entries(encoder.shapes).map(
    ([name, shape]) => [name, { shape, data: randomTensor(name, shape) }] as const,
  );
  return {
    'config.json': json(encoder.config),
    'tokenizer.json': new TextEncoder().encode(tokenizer),
    'model.safetensors': writeSafetensors(new Map(weights)),
  };
}

async function put(files: Record<string, Uint8Array>): Promise<void> {
  for (const [name, bytes] of Object.entries(files)) {
    await mkdir(path.dirname(path.join(folder, name)), { recursive: true });
    await writeFile(path.join(folder, name), bytes);
  }
}

describe.each(figures.encoders)('$id', (encoder) => {
  test('has the vectors that transformers gives, alone and together', async () => {
    await put(await filesOf(encoder));
    const opened = await loadSentenceEncoder(encoder.id, folder, 1);
    expect(opened.spec).toMatchObject({ id: encoder.id, pooling: encoder.pooling, dimensions: 32 });
    expect(furthestInRows(await opened.embed(texts), encoder.vectors)).toBeLessThan(1e-5);
    const alone = await Promise.all(texts.map(async (text) => (await opened.embed([text]))[0]!));
    expect(furthestInRows(alone, encoder.vectors)).toBeLessThan(1e-5);
    expect([...(await opened.embed([' \n']))[0]!].every((value) => value === 0)).toBe(true);
    await opened.close();
  });

  test('a static table is distilled from it', async () => {
    await put(await filesOf(encoder));
    const opened = await loadSentenceEncoder(encoder.id, folder, 1);
    const words = ['quick', 'brown', 'fox', 'dog', 'rain', 'hills', 'play', 'toys'];
    const sentences = Array.from({ length: 120 }, (_, i) =>
      Array.from({ length: 5 }, (_, j) => words[(i * 7 + j * j * 3 + (i >> 3)) % words.length]!).join(' '),
    );
    let lastDetail = '';
    const { table } = await distill(opened, [...new Set(sentences)], {
      dimensions: 8,
      epochs: 2,
      seed: 1,
      onProgress: (_stage, _done, _total, detail = '') => {
        lastDetail = detail;
      },
    });
    await opened.close();
    // 1 − cos to the teacher's vectors, on average.
    expect(Number(/^1 - cos ([\d.]+)$/.exec(lastDetail)?.[1])).toBeLessThan(0.1);
    const [vector] = await loadStaticEncoder(table).embed(['the quick fox']);
    expect(Math.hypot(...vector!)).toBeCloseTo(1, 4);
  });

  test('sentence-transformers’ own files have the last word', async () => {
    await put({
      ...(await filesOf(encoder)),
      '1_Pooling/config.json': json({ pooling_mode_cls_token: true, pooling_mode_mean_tokens: false }),
      'config_sentence_transformers.json': json({ prompts: { a: 'fox ' }, default_prompt_name: 'a' }),
      'sentence_bert_config.json': json({ max_seq_length: 12 }),
    });
    const opened = await loadSentenceEncoder('somebody/else', folder, 1);
    expect(opened.spec.pooling).toBe('cls');
    expect(opened.tokenCount('a '.repeat(50))).toBe(12);
    const bare = await openFullEncoder(folder, { home: folder, threads: 1, hooks: HOOKS });
    expect(furthestInRows(await opened.embed(['dog']), await bare.embed(['dog']))).toBe(0);
    await Promise.all([opened.close(), bare.close()]);
    await put({
      'sentence_bert_config.json': json({ max_seq_length: null }),
      'modules.json': json([{ type: 'sentence_transformers.models.Dense', path: '2_Dense' }]),
    });
    await expect(loadSentenceEncoder('x', folder, 1)).rejects.toThrow(/a module of the kind "Dense"/);
    await put({
      'modules.json': json(
        ['Transformer', 'Pooling', 'Normalize'].map((kind) => ({
          type: `sentence_transformers.models.${kind}`,
        })),
      ),
    });
    await (await loadSentenceEncoder('x', folder, 1)).close();
    for (const pooling_mode_mean_tokens of [false, true]) {
      const pooling = { pooling_mode_max_tokens: true, pooling_mode_mean_tokens };
      await put({ '1_Pooling/config.json': json(pooling) });
      await expect(loadSentenceEncoder('x', folder, 1)).rejects.toThrow(/neither by the mean nor/);
    }
  });
});

const HOOKS = { onProgress: () => {}, log: () => {} };

test('an ONNX file in the place of safetensors has the same vectors, and another graph is refused', async () => {
  const encoder = figures.encoders[1]!;
  const { 'model.safetensors': _, ...others } = await filesOf(encoder);
  await put({ ...others, 'onnx/model.onnx': await read('fixtures/tiny-e5.onnx') });
  const opened = await loadSentenceEncoder(encoder.id, folder, 1);
  expect(furthestInRows(await opened.embed(texts), encoder.vectors)).toBeLessThan(1e-5);
  await opened.close();
  await put({ 'onnx/model.onnx': new Uint8Array(100) });
  await expect(loadSentenceEncoder(encoder.id, folder, 1)).rejects.toMatchObject({ code: 'invalid_encoder' });
});

test('an encoder that is pulled by its name is what /v1/embeddings runs', async () => {
  const encoder = figures.encoders[0]!;
  const hub = await startFakeHub({
    repository: encoder.id,
    files: {
      ...(await filesOf(encoder)),
      'pytorch_model.bin': new Uint8Array(9),
      'onnx/model.onnx': new Uint8Array(9),
    },
  });
  vi.stubEnv('HF_ENDPOINT', hub.url);
  const service = createEncoderService({ home: folder, onError: () => {} });
  try {
    const never = new AbortController().signal;
    await expect(service.embed('bge-small-en-v1.5', texts, never)).rejects.toThrow(
      /model pull bge-small-en-v1.5/,
    );
    await fetchFullEncoder(folder, HOOKS, 'bge-small-en-v1.5');
    expect(hub.requests.some((line) => /pytorch_model|onnx/.test(line))).toBe(false);
    const { vectors } = await service.embed('bge-small-en-v1.5', texts, never);
    expect(furthestInRows(vectors, encoder.vectors)).toBeLessThan(1e-5);
    expect(await service.installed()).toMatchObject({ id: 'bge-small-en-v1.5', spec: { pooling: 'cls' } });
    await expect(service.embed('gpt-4', texts, never)).rejects.toThrow(/known: all-minilm-l6-v2/);
  } finally {
    vi.unstubAllEnvs();
    await service.close();
    await hub.close();
  }
});

test('several who want an encoder at once have it fetched once', async () => {
  const encoder = figures.encoders[0]!;
  const hub = await startFakeHub({ repository: encoder.id, files: await filesOf(encoder) });
  vi.stubEnv('HF_ENDPOINT', hub.url);
  try {
    const fetched = await Promise.all(
      Array.from({ length: 4 }, () => fetchFullEncoder(folder, HOOKS, 'bge-small-en-v1.5')),
    );
    expect(new Set(fetched).size).toBe(1);
    expect(hub.requests.filter((line) => /^GET .*model\.safetensors/.test(line))).toHaveLength(1);
    await (await loadSentenceEncoder(encoder.id, fetched[0]!, 1)).close();
  } finally {
    vi.unstubAllEnvs();
    await hub.close();
  }
});

test('the encoder that comes as a wheel is found where it came from the hub, for want of pip', async () => {
  const encoder = figures.encoders[0]!;
  const hub = await startFakeHub({
    repository: 'sentence-transformers/all-MiniLM-L6-v2',
    files: await filesOf(encoder),
  });
  vi.stubEnv('HF_ENDPOINT', hub.url);
  vi.stubEnv('PATH', folder);
  const service = createEncoderService({ home: folder, onError: () => {} });
  try {
    expect(await service.installed()).toBeUndefined();
    await fetchFullEncoder(folder, HOOKS, FULL_ENCODER);
    expect(await service.installed()).toMatchObject({ id: 'all-minilm-l6-v2', spec: { pooling: 'mean' } });
  } finally {
    vi.unstubAllEnvs();
    await service.close();
    await hub.close();
  }
});
