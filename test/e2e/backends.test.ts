/**
 * The edge in workerd over two real backends, each a process of its own: one is killed in the middle of an answer, then
 * both are gone. Before that, the edge routes by the encoder that the backends run, which is the real one.
 */
import { symlink } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import OpenAI from 'openai';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { type Edge, startEdge } from '../../gpu-backend/dev/local-edge.ts';
import { FULL_ENCODER } from '../../gpu-backend/encoder/encoder-service.ts';
import { fetchFullEncoder } from '../../gpu-backend/encoder/full-encoder.ts';
import { DEFAULT_MODEL } from '../../gpu-backend/model/sources/resolve.ts';
import { openInstalled } from '../../gpu-backend/model/store.ts';
import { type ModelHash, maskBits, maskFromSkippedLayers, maskId } from '../../shared/mask/mask.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { BACKEND_HEADERS, encoderListSchema } from '../../shared/wire/backend-load.ts';
import { dryRunSchema } from '../../shared/wire/openai.ts';
import { ADMIN_KEY, BACKEND_KEY } from '../support/edge/constants.ts';
import { testHome } from '../support/installed-model.ts';
import { type Served, serve } from '../support/serve.ts';
import { createTinyHome, removeHome, TINY_CONTEXT_TOKENS } from './product.ts';

const READY_WITHIN_ms = 60_000;
type Backend = { readonly id: string; readonly url: string; readonly kill: Served['kill'] };

let home: string | undefined;
let edge: Edge;
let client: OpenAI;
const backends: Backend[] = [];

async function startBackend(id: string): Promise<Backend> {
  const { url, kill } = serve(DEFAULT_MODEL, { MASKROUTE_HOME: home!, MASKROUTE_BACKEND_KEY: BACKEND_KEY });
  return { id, url: await url, kill };
}

async function admin(path: string, body: object): Promise<Record<string, string>> {
  const response = await fetch(`${edge.url}/admin/v1${path}`, {
    method: 'POST',
    headers: { authorization: `Bearer ${ADMIN_KEY}`, 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });
  const text = await response.text();
  expect(response.ok, text).toBe(true);
  return JSON.parse(text);
}

beforeAll(async () => {
  await fetchFullEncoder(testHome, { onProgress: () => {}, log: () => {} }, FULL_ENCODER);
  home = await createTinyHome();
  await symlink(join(testHome, 'sources'), join(home, 'sources'));
  for (const id of ['one', 'two']) backends.push(await startBackend(id));
  edge = await startEdge({
    projectFolder: resolve('.'),
    stateFolder: undefined,
    port: 0,
    bindings: {
      BACKEND_URL: backends[0]!.url,
      BACKEND_KEY,
      ADMIN_KEY,
      ENCODER: 'backend',
      EMBED_TIMEOUT_MS: '5000',
    },
  });
  for (const { id, url } of backends) await admin('/backends', { id, url });
  await admin('/tenants', { id: 'acme', name: 'acme' });
  const { key } = await admin('/keys', { tenant: 'acme', name: 'acme' });
  client = new OpenAI({ baseURL: `${edge.url}/v1`, apiKey: key!, maxRetries: 0 });
}, 2 * READY_WITHIN_ms);

afterAll(async () => {
  // It asks the backends what those answers cost whose ends it did not hear, until its time for that is over.
  await edge?.close();
  await Promise.all(backends.map((backend) => backend.kill()));
  removeHome(home);
}, READY_WITHIN_ms);

/** Two clusters in the space of the backends' encoder, around one text each. */
async function maskSetOf(texts: readonly string[]): Promise<MaskSet> {
  const { hash } = (await openInstalled(home!, DEFAULT_MODEL)).manifest;
  const direct = new OpenAI({ baseURL: `${backends[0]!.url}/v1`, apiKey: BACKEND_KEY, maxRetries: 0 });
  const { data } = await direct.embeddings.create({ model: 'all-minilm-l6-v2', input: [...texts] });
  const list = await fetch(`${backends[0]!.url}/v1/encoders`, {
    headers: { authorization: `Bearer ${BACKEND_KEY}` },
  });
  const [entry] = encoderListSchema.parse(await list.json()).data;
  return {
    format: 'maskroute-mask-set-v1',
    name: 'two-texts',
    model: { name: DEFAULT_MODEL, hash, blockCount: 8 },
    encoder: entry!.encoder,
    clusters: data.map(({ embedding }, index) => {
      const mask = maskFromSkippedLayers(8, { skipAttention: [index], skipFfn: [2 + index] });
      return {
        centroid: embedding,
        bits: maskBits(mask),
        mask: maskId(hash as ModelHash, mask),
        share: 0.5,
        label: texts[index]!,
      };
    }),
    targetSparsity: 2 / 8,
    reachedSparsity: 2 / 8,
    surrogate: false,
    learned: { method: 'by hand' },
    heldOut: { learned: { agreement: 0.9 } },
    createdAt: '2026-01-01T00:00:00Z',
  };
}

const chat = (content: string, max_tokens: number) => ({
  model: DEFAULT_MODEL,
  messages: [{ role: 'user' as const, content }],
  max_tokens,
});

describe('two backends', () => {
  it('embed what the edge routes by', async () => {
    const set = await maskSetOf(['How do I cook rice?', 'Prove that the square root of two is irrational.']);
    const { version } = await admin('/mask-sets', set);
    await admin('/publications', { version });
    for (const [content, cluster] of [
      ['What is the best way to boil rice?', 0],
      ['Show that the root of three is no fraction.', 1],
    ] as const) {
      const route = async () => {
        const response = await fetch(`${edge.url}/v1/route`, {
          method: 'POST',
          headers: { authorization: `Bearer ${client.apiKey}`, 'content-type': 'application/json' },
          body: JSON.stringify(chat(content, 1)),
        });
        return dryRunSchema.parse(await response.json());
      };
      // On a busy machine the encoder may be late once, and the request goes dense.
      const decision = await vi.waitFor(async () => {
        const found = await route();
        expect(found.maskroute).toMatchObject({ cluster, fallback: null, version });
        return found;
      }, 20_000);
      expect(decision.encoder).toEqual(set.encoder);
    }
  });

  it('one killed in the middle of an answer: the client is told, and the other one goes on', async () => {
    const { data: stream, response } = await client.chat.completions
      .create({
        ...chat('Tell me a long story.', TINY_CONTEXT_TOKENS - 100),
        stream: true,
        ignore_eos: true,
      } as never)
      .withResponse();
    const id = response.headers.get(BACKEND_HEADERS.backend);
    const answering = backends.find((backend) => backend.id === id)!;
    let chunks = 0;
    const read = async () => {
      for await (const _chunk of stream as unknown as AsyncIterable<unknown>) {
        if (++chunks !== 5) continue;
        await answering.kill();
      }
    };
    await expect(read()).rejects.toMatchObject({ code: 'backend_error' });
    expect(chunks).toBeGreaterThanOrEqual(5);
    for (let i = 0; i < 3; i++) {
      const next = await client.chat.completions.create(chat('How do I cook rice?', 3)).withResponse();
      expect(next.response.headers.get(BACKEND_HEADERS.backend)).not.toBe(id);
    }
  });

  it('both gone: 503 soon, with Retry-After', async () => {
    await Promise.all(backends.map((backend) => backend.kill()));
    const started_ms = performance.now();
    const failed = client.chat.completions.create(chat('How do I cook rice?', 3));
    await expect(failed).rejects.toMatchObject({ status: 503, code: 'backend_unreachable' });
    expect(performance.now() - started_ms).toBeLessThan(15_000);
    const response = await failed.catch((error: { headers: Headers }) => error);
    expect(Number((response as { headers: Headers }).headers.get('retry-after'))).toBeGreaterThanOrEqual(1);
  });
});
