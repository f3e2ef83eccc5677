/**
 * One suite over every encoder: whatever computes the vectors, the edge may rely on the same things. The
 * remote ones talk to a server that speaks their provider's wire.
 */
import { env } from 'cloudflare:workers';
import { describe, expect, it, vi } from 'vitest';
import { encodeStaticTable } from '../../../shared/embedding/static-encoder.ts';
import { sender } from '../../../workers/backends/attempt.ts';
import { BackendPool } from '../../../workers/backends/pool.ts';
import { openDatabase } from '../../../workers/db/d1.ts';
import { type Env, parseConfig } from '../../../workers/env.ts';
import { BACKEND_ENCODER_LOAD } from '../../../workers/limits.ts';
import {
  cached,
  createEmbedder,
  createRemoteEncoder,
  type EdgeEncoder,
  loadEncoder,
} from '../../../workers/routing/embed.ts';
import { ENCODER, MODEL } from '../../support/edge/constants.ts';
import golden from '../../support/static-golden.json' with { type: 'json' };
import { mood } from '../support/backends.ts';
import { admin, created, soon } from '../support/edge.ts';

const URL_OF_PROVIDERS = env.HF_ENDPOINT_URL!;

/** The AI binding as the platform gives it, asking the provider's server over HTTP. */
const aiBinding: NonNullable<Env['AI']> = {
  async run(model, inputs, options) {
    const response = await fetch(`${URL_OF_PROVIDERS}/ai/run/${model}`, {
      method: 'POST',
      body: JSON.stringify(inputs),
      ...(options?.signal instanceof AbortSignal ? { signal: options.signal } : {}),
    });
    if (!response.ok) throw new Error(`InferenceUpstreamError: ${response.status}`);
    return await response.json();
  },
};

/** A vocabulary of three pieces; no test text has to know more. */
const SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'];
const table = encodeStaticTable({
  dimensions: 4,
  vocabulary: [...SPECIAL, 'north', 'east', '##ern'],
  scales: Float32Array.from([...SPECIAL.map(() => 0), 0.01, 0.02, 0.005]),
  vectors: Int8Array.from([
    ...SPECIAL.flatMap(() => [0, 0, 0, 0]),
    100,
    0,
    0,
    10,
    0,
    100,
    0,
    0,
    0,
    0,
    50,
    50,
  ]),
});

const load = (overrides: Partial<Env>): Promise<EdgeEncoder> => {
  const changed = { ...env, ...overrides };
  const config = parseConfig(changed);
  return loadEncoder(config, changed, new BackendPool(openDatabase(changed.DB), config, sender(undefined)));
};

const suites: [string, Partial<Env>, number][] = [
  [
    'static, a small table',
    { ENCODER: 'static', ASSETS: { fetch: async () => new Response(table) } as never },
    4,
  ],
  ['static, the table that is shipped', { ENCODER: 'static' }, 0],
  ['workers-ai', { ENCODER: 'workers-ai', AI: aiBinding }, 384],
  ['huggingface', { ENCODER: 'huggingface' }, 4],
  ['backend', { ENCODER: 'backend' }, 4],
];

const ASKER = { region: 'local', signal: new AbortController().signal };
const length = (vector: Float32Array) => Math.hypot(...vector);
const close = (a: Float32Array, b: Float32Array) =>
  a.forEach((value, i) => {
    expect(value).toBeCloseTo(b[i]!, 5);
  });

describe.each(suites)('%s', (_name, overrides, dimensions) => {
  it('says what it is', async () => {
    const { spec } = await load(overrides);
    expect(spec.dimensions).toBe(dimensions === 0 ? spec.dimensions : dimensions);
    expect(spec.id).not.toBe('');
    expect(spec.revision).not.toBe('');
    expect(spec).toEqual((await load(overrides)).spec);
  });

  it('gives each text a vector of length 1, the same each time', async () => {
    const encoder = await load(overrides);
    const [north, east] = await Promise.all(['north', 'east'].map((text) => encoder.embed(text, ASKER)));
    for (const vector of [north!, east!]) {
      expect(vector).toBeInstanceOf(Float32Array);
      expect(vector.length).toBe(encoder.spec.dimensions);
      expect(length(vector)).toBeCloseTo(1, 5);
    }
    expect(north).not.toEqual(east);
    close(await encoder.embed('north', ASKER), north!);
  });

  it('rejects when it is called off', async () => {
    const encoder = await load(overrides);
    await expect(encoder.embed('north', { ...ASKER, signal: AbortSignal.abort() })).rejects.toThrow();
  });
});

const remotes = suites.filter(([name]) => !name.startsWith('static'));

describe.each(remotes)('%s over its wire', (_name, overrides) => {
  it('rejects within the time when the provider hangs', async () => {
    const encoder = await load({ ...overrides, EMBED_TIMEOUT_MS: '50' });
    const started_ms = performance.now();
    await expect(encoder.embed('!hang', ASKER)).rejects.toThrow('more than 50 ms');
    // The provider is silent for ever.
    expect(performance.now() - started_ms).toBeLessThan(10_000);
  });

  it.each(['!fail', '!short', '!missing', '!words'])(
    'rejects when the provider answers wrongly: %s',
    async (text) => {
      await expect((await load(overrides)).embed(text, ASKER)).rejects.toThrow();
    },
  );
});

it('a provider that answers numbers that are none is not believed', async () => {
  const spec = { id: 'x', revision: 'x', pooling: 'mean', dimensions: 2 } as const;
  for (const answer of [
    [[Number.NaN, 1]],
    [[Number.POSITIVE_INFINITY, 1]],
    [[1, null]],
    [1, 2],
    null,
    [[[1, 2]]],
  ]) {
    const encoder = createRemoteEncoder(spec, 1_000, async () => answer);
    await expect(encoder.embed('x', ASKER), JSON.stringify(answer)).rejects.toThrow();
  }
});

it('a provider that is late is called off', async () => {
  const spec = { id: 'x', revision: 'x', pooling: 'mean', dimensions: 1 } as const;
  const signals: AbortSignal[] = [];
  const encoder = createRemoteEncoder(spec, 10, (_text, { signal }) => {
    signals.push(signal);
    return new Promise(() => {});
  });
  await expect(encoder.embed('x', ASKER)).rejects.toThrow('more than 10 ms');
  expect(signals.map(({ aborted }) => aborted)).toEqual([true]);
});

it('backends with different encoders, or none, are an error that says so', async () => {
  const listed = (revision: string) => ({
    object: 'list',
    data: [{ id: 'x', object: 'maskroute.encoder', encoder: { ...ENCODER, revision } }],
  });
  const loadFrom = async (...answers: object[]) => {
    const given = answers.map((answer) => ({ backend: 'x', answer }));
    const backends = { askAll: async () => given, call: () => Promise.reject(new Error('no')) };
    return await loadEncoder({ ...parseConfig(env), ENCODER: 'backend' }, env as Env, backends);
  };
  expect((await loadFrom(listed('r1'), listed('r1'))).spec).toEqual({ ...ENCODER, revision: 'r1' });
  await expect(loadFrom(listed('r1'), listed('r2'))).rejects.toThrow('different encoders');
  await expect(loadFrom({ object: 'list', data: [] })).rejects.toThrow('no backend has an encoder');
  await expect(loadFrom()).rejects.toThrow('no backend is enabled');
});

it('the encoder of the backends is asked in the region that the text comes from', async () => {
  const asked: string[] = [];
  for (const region of ['EU', 'NA']) {
    const url = `${env.BACKEND_URL}/at/encoder-${region}`;
    await created(admin('POST', '/backends', { id: region.toLowerCase(), url, regions: [region] }));
  }
  const config = parseConfig(env as Env);
  const pool = new BackendPool(openDatabase(env.DB), config, (url, init) => {
    if (url.endsWith('/v1/embeddings')) asked.push(url);
    return fetch(url, init);
  });
  const encoder = await loadEncoder({ ...config, ENCODER: 'backend' }, env as Env, pool);
  for (const [i, region] of ['EU/DE/FRA', 'NA/US/DFW', 'EU/FR/CDG', 'NA/CA/YYZ'].entries()) {
    await encoder.embed(`north ${i}`, { ...ASKER, region });
  }
  for (const id of ['eu', 'na']) await admin('DELETE', `/backends/${id}`);
  expect(asked.map((url) => /encoder-(..)/.exec(url)![1])).toEqual(['EU', 'NA', 'EU', 'NA']);
});

it('a backend that has another encoder than before gives no vectors until the edge has asked for it again', async () => {
  const id = 'encoder-changes';
  await created(admin('POST', '/backends', { id, url: `${env.BACKEND_URL}/at/${id}` }));
  const config = parseConfig(env);
  const asked: string[] = [];
  const pool = new BackendPool(openDatabase(env.DB), config, (url, init) => {
    if (url.endsWith('/v1/embeddings')) asked.push(JSON.parse(String(init.body)).input[0]);
    return fetch(url, init);
  });
  let canAskAgain = true;
  const load = async () => {
    if (!canAskAgain) throw new Error('not now');
    return await loadEncoder({ ...config, ENCODER: 'backend' }, env, pool);
  };
  const embedder = createEmbedder(load, { ...BACKEND_ENCODER_LOAD, fresh_ms: 0, retry_ms: 0 });
  const embed = (text: string) => embedder.embed(text, { ...ASKER, hold: () => {} });
  expect(await embed('north')).toMatchObject({ ok: true, spec: { revision: 'r1' } });
  canAskAgain = false;
  await mood(id, 'other-encoder');
  expect(await embed('east')).toEqual({ ok: false, fallback: 'encoder_failed' });
  // Its vector of the encoder before is still right for the sets of that one, and was kept.
  expect(await embed('north')).toMatchObject({ ok: true, spec: { revision: 'r1' } });
  expect(asked.filter((text) => text === 'north')).toHaveLength(1);
  expect(await embedder.askAgain(() => {})).toMatchObject({ spec: { revision: 'r1' } });
  canAskAgain = true;
  await soon(async () => {
    expect(await embed('east')).toMatchObject({ ok: true, spec: { revision: 'r2' } });
  });
  await mood(id, 'good');
  expect(await embedder.askAgain(() => {})).toMatchObject({ spec: { revision: 'r1' } });
  await admin('DELETE', `/backends/${id}`);
});

it('backends that were asked for their encoders are still known to serve their models', async () => {
  const config = parseConfig(env);
  const pool = new BackendPool(openDatabase(env.DB), config, sender(undefined));
  await pool.modelLists(1_000);
  expect(pool.lists(MODEL.id)).toBe(true);
  await loadEncoder({ ...config, ENCODER: 'backend' }, env as Env, pool);
  expect(pool.lists(MODEL.id)).toBe(true);
});

it('a static table that is missing or damaged is an error that says so', async () => {
  const assets = (response: () => Response): Partial<Env> => ({
    ENCODER: 'static',
    ASSETS: { fetch: async () => response() } as never,
  });
  await expect(load(assets(() => new Response('', { status: 404 })))).rejects.toThrow(/404/);
  await expect(load(assets(() => new Response(table.slice(0, 60))))).rejects.toThrow();
  await expect(load(assets(() => new Response('<html>')))).rejects.toThrow();
});

it('a text that was embedded is not embedded again, up to a bound', async () => {
  const asked: string[] = [];
  const spec = { id: 'x', revision: 'x', pooling: 'mean', dimensions: 1 } as const;
  const embed = async (text: string) => {
    asked.push(text);
    return Float32Array.of(text.length);
  };
  const encoder = cached({ spec, embed }, 2);
  for (const text of ['a', 'bb', 'a', 'ccc', 'a', 'bb']) {
    expect(await encoder.embed(text, ASKER)).toEqual(Float32Array.of(text.length));
  }
  expect(asked).toEqual(['a', 'bb', 'ccc', 'bb']);
  const broken = cached({ spec, embed: () => Promise.reject(new Error('no')) });
  await expect(broken.embed('a', ASKER)).rejects.toThrow('no');
});

it('the hub is asked with the token, through its router and by the model’s name', async () => {
  const asked: string[] = [];
  const real = globalThis.fetch;
  // The hub itself cannot be reached from a test; its wire is that of the encoder server.
  vi.stubGlobal('fetch', async (input: RequestInfo, init?: RequestInit) => {
    const url = new URL(typeof input === 'string' ? input : input.url);
    if (!url.hostname.endsWith('huggingface.co')) return await real(input, init);
    asked.push(`${url.hostname}${url.pathname} ${new Headers(init?.headers).get('authorization')}`);
    if (url.pathname.startsWith('/api/models/')) {
      const provider = { providerId: ENCODER.id, status: 'live', task: 'feature-extraction' };
      return Response.json({ id: ENCODER.id, inferenceProviderMapping: { 'hf-inference': provider } });
    }
    return await real(URL_OF_PROVIDERS, init);
  });
  const encoder = await load({ ENCODER: 'huggingface', HF_ENDPOINT_URL: '', HF_TOKEN: 'hf_test' });
  const vector = await encoder.embed('north', ASKER);
  vi.unstubAllGlobals();
  expect(vector).toEqual(Float32Array.of(1, 0, 0, 0));
  const path = `router.huggingface.co/hf-inference/models/${ENCODER.id}/pipeline/feature-extraction`;
  expect(asked).toContain(`${path} Bearer hf_test`);
});

/** As `test/shared/embedding/static-encoder.test.ts` has it. */
it('a prompt has the same vector at the edge as in calibration', async () => {
  const encoder = await load({ ENCODER: 'static' });
  expect(encoder.spec.revision).toBe(golden.revision);
  for (const { text, vector } of golden.rows) {
    const found = await encoder.embed(text, ASKER);
    vector.forEach((value, i) => {
      expect(found[i]).toBeCloseTo(value, 6);
    });
  }
});
