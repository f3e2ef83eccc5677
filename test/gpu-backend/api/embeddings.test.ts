/**
 * `/v1/embeddings` with the real encoder, asked by the official client: the vectors that transformers gives, in
 * both encodings, and what the edge's encoders may rely on.
 */
import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createEncoderService, FULL_ENCODER } from '../../../gpu-backend/encoder/encoder-service.ts';
import { fetchFullEncoder } from '../../../gpu-backend/encoder/full-encoder.ts';
import { embeddingsSchema, encoderListSchema } from '../../../shared/wire/backend-load.ts';
import { furthest } from '../../support/furthest.ts';
import { testHome } from '../../support/installed-model.ts';
import { TEACHER_TIMEOUT_ms } from '../../support/teacher.ts';
import { BACKEND_KEY, serveModel, type TestServer } from './harness.ts';
import { bytesOf, scriptedEngine, scriptedModel } from './scripted-engine.ts';

const MODEL = 'all-minilm-l6-v2';
const golden: { texts: string[]; vectors: number[][] } = JSON.parse(
  await readFile(new URL('../encoder/fixtures/minilm-golden.json', import.meta.url), 'utf8'),
);

let server: TestServer;
beforeAll(async () => {
  await fetchFullEncoder(testHome, { onProgress: () => {}, log: () => {} }, FULL_ENCODER);
  server = await serveModel(scriptedModel(scriptedEngine({ answer: () => bytesOf('x') })));
}, TEACHER_TIMEOUT_ms);
afterAll(() => server[Symbol.asyncDispose]());

const embed = async (input: string | string[], encoding_format?: 'float' | 'base64') =>
  await server.client.embeddings.create({ model: MODEL, input, ...(encoding_format && { encoding_format }) });
const length = (vector: number[]) => Math.hypot(...vector);

describe('the official client', () => {
  it('gets the vectors of transformers, in order, whichever way they are encoded', async () => {
    // Without a format the client asks for base64 and decodes it.
    for (const format of [undefined, 'float'] as const) {
      const { data, usage, object } = await embed(golden.texts, format);
      expect(object).toBe('list');
      expect(data.map(({ index }) => index)).toEqual(golden.texts.map((_, i) => i));
      data.forEach(({ embedding }, i) => {
        expect(furthest(embedding, golden.vectors[i]!)).toBeLessThan(1e-5);
      });
      expect(usage.prompt_tokens).toBeGreaterThan(golden.texts.length);
      expect(usage.total_tokens).toBe(usage.prompt_tokens);
    }
  });

  it('gets one vector for one text, as base64 when it asks for that', async () => {
    const { data } = await embed('The sky is blue.', 'base64');
    const bytes = Buffer.from(data[0]!.embedding as unknown as string, 'base64');
    const vector = [...new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4)];
    const [same] = (await embed('The sky is blue.', 'float')).data;
    expect(vector).toEqual(same!.embedding);
    expect(length(vector)).toBeCloseTo(1, 5);
  });

  it('gets the same alone and in a batch, and zero for nothing', async () => {
    const texts = ['north', '', ...Array.from({ length: 40 }, (_, i) => `north ${i}`)];
    const { data } = await embed(texts, 'float');
    const [alone] = (await embed('north 30', 'float')).data;
    expect(furthest(alone!.embedding, data[32]!.embedding)).toBeLessThan(1e-5);
    expect(length(data[1]!.embedding)).toBe(0);
  });
});

describe('/v1/embeddings', () => {
  it.each([
    [{ model: 'gpt-4', input: 'x' }, 404, 'model_not_found'],
    [{ model: MODEL }, 400, 'invalid_request'],
    [{ model: MODEL, input: [] }, 400, 'invalid_request'],
    [{ model: MODEL, input: [1, 2, 3] }, 400, 'invalid_request'],
    [{ model: MODEL, input: Array(2049).fill('x') }, 400, 'invalid_request'],
    [{ model: MODEL, input: 'x', dimensions: 100 }, 400, 'invalid_request'],
    [{ model: MODEL, input: 'x', encoding_format: 'int8' }, 400, 'invalid_request'],
  ])('refuses %j', async (body, status, code) => {
    const response = await server.post('/v1/embeddings', body);
    expect(response.status).toBe(status);
    expect(await response.json()).toMatchObject({ error: { code } });
  });

  it('says which encoder it has', async () => {
    const response = await fetch(`${server.url}/v1/encoders`, {
      headers: { authorization: `Bearer ${BACKEND_KEY}` },
    });
    const { data } = encoderListSchema.parse(await response.json());
    expect(data).toMatchObject([{ id: MODEL, encoder: { pooling: 'mean', dimensions: 384 } }]);
    const answer = await server.post('/v1/embeddings', {
      model: MODEL,
      input: 'x',
      encoding_format: 'float',
    });
    expect(embeddingsSchema.parse(await answer.json()).maskroute).toEqual({ encoder: data[0]!.encoder });
    expect((await fetch(`${server.url}/v1/encoders`)).status).toBe(401);
    expect((await server.post('/v1/encoders', {})).status).toBe(405);
  });

  it('answers a short text while hundreds of long ones are under way, and lets those go when their client does', async () => {
    const controller = new AbortController();
    const many = Array.from({ length: 300 }, (_, i) => `word${i} `.repeat(200));
    const body = { model: MODEL, input: many };
    const large = server.post('/v1/embeddings', body, { signal: controller.signal });
    const dropped = expect(large).rejects.toThrow();
    await new Promise((resolve) => setTimeout(resolve, 200));
    await embed('short');
    controller.abort();
    await dropped;
    await embed('short');
    await expectIdle();
  });
});

describe('a server that stops while texts are embedded', () => {
  const many = Array.from({ length: 32 }, (_, i) => `text ${i} ${'and more words '.repeat(40)}`);
  /** The answer to a request that runs when the server stops. */
  async function stopped(drain_ms: number): Promise<Response> {
    await using own = await serveModel(scriptedModel(scriptedEngine({ answer: () => bytesOf('x') })), {
      drain_ms,
    });
    expect((await own.post('/v1/embeddings', { model: MODEL, input: 'first' })).status).toBe(200);
    const running = own.post('/v1/embeddings', { model: MODEL, input: many });
    await sleep(200);
    await own.close();
    return await running;
  }

  it('answers first', async () => {
    const { data } = (await (await stopped(60_000)).json()) as { data: unknown[] };
    expect(data).toHaveLength(many.length);
  });

  it('says so when that takes too long', async () => {
    const answer = await stopped(10);
    expect(answer.status).toBe(503);
    expect(await answer.json()).toMatchObject({ error: { code: 'not_ready' } });
  });
});

/** Nobody embeds any more. */
async function expectIdle(): Promise<void> {
  const before = process.cpuUsage();
  await sleep(500);
  expect(process.cpuUsage(before).user / 1000).toBeLessThan(250);
}

it('a client that leaves while the first of its texts are read lets all of them go', async () => {
  const own = createEncoderService({ home: testHome, onError: () => {} });
  await own.embed(MODEL, ['first'], new AbortController().signal);
  const many = Array.from({ length: 300 }, (_, i) => `word${i} `.repeat(200));
  await expect(own.embed(MODEL, many, AbortSignal.abort())).rejects.toMatchObject({ code: 'cancelled' });
  await own.embed(MODEL, ['short'], new AbortController().signal);
  await expectIdle();
  await own.close();
});

it('an encoder that is not installed is an empty list and a 404 that says what to do', async () => {
  const service = createEncoderService({ home: '/nowhere', onError: () => {} });
  expect(await service.installed()).toBeUndefined();
  const asked = service.embed(MODEL, ['x'], new AbortController().signal);
  await expect(asked).rejects.toMatchObject({
    code: 'model_not_found',
    message: expect.stringContaining('model pull'),
  });
  await service.close();
});

it('an encoder that is closed while it computes lets its request go, and its process lives', async () => {
  const own = createEncoderService({ home: testHome, onError: () => {} });
  const never = new AbortController().signal;
  await own.embed(MODEL, ['first'], never);
  const texts = Array.from({ length: 64 }, (_, i) => `text ${i} ${'and more words '.repeat(40)}`);
  const cut = expect(own.embed(MODEL, texts, never)).rejects.toMatchObject({ code: 'engine_failed' });
  await sleep(100);
  await own.close();
  await cut;
});
