/** One request end to end: the official client → the edge in workerd → the backend → the real model. */
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { createServer, type IncomingMessage, request } from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { text } from 'node:stream/consumers';
import { setTimeout as sleep } from 'node:timers/promises';
import type { APIError } from 'openai';
import { describe, expect, test, vi } from 'vitest';
import { dryRunSchema } from '../../../shared/wire/openai.ts';
import { HEADERS } from '../../../shared/wire/protocol.ts';
import { createSigner } from '../../../shared/wire/service-token.ts';
import { home, infoOf, product } from './running.ts';

const KINDS = [
  'A baker sells 12 loaves a day at 3 dollars each. How much does she earn in a week?',
  'Write a Python function that returns the n-th Fibonacci number.',
  'I would like to book a table for two at an Italian restaurant tonight at 7 pm.',
  'Describe the history of the Roman aqueducts.',
  '¿Cuál es la capital de Francia y por qué es famosa?',
];
const PROMPT = KINDS[0]!;

const messagesOf = (content: string) => [{ role: 'user' as const, content }];
const chat = (content: string, more: object = {}) =>
  product.client.chat.completions
    .create({
      model: product.dev.model,
      messages: messagesOf(content),
      max_completion_tokens: 12,
      temperature: 0,
      ...more,
      stream: false,
    })
    .withResponse();

async function dryRun(content: string) {
  const response = await fetch(`${product.dev.edge}/v1/route`, {
    method: 'POST',
    headers: { authorization: `Bearer ${product.dev.apiKey}`, 'content-type': 'application/json' },
    body: JSON.stringify({ model: product.dev.model, messages: messagesOf(content) }),
  });
  return dryRunSchema.parse(await response.json());
}

async function gauge(name: string): Promise<number> {
  const text = await (
    await fetch(`${product.dev.backend}/metrics`, {
      headers: { authorization: `Bearer ${product.dev.backendKey}` },
    })
  ).text();
  const line = text.split('\n').find((line) => line.startsWith(`${name}{`) || line.startsWith(`${name} `));
  return Number(line!.split(' ').at(-1));
}

describe('a chat', () => {
  test('is answered under the mask of its cluster, and every header says so', async () => {
    const { data, response } = await chat(PROMPT);
    expect(data.choices[0]!.message.content).toMatch(/\w/);
    expect(data.usage!.completion_tokens).toBeGreaterThan(0);
    const header = (name: string) => response.headers.get(name);
    const info = infoOf(data);
    expect(header(HEADERS.requestId)).toMatch(/^\S+$/);
    expect(header(HEADERS.maskSet)).toBe(info.mask_set);
    expect(header(HEADERS.version)).toMatch(/^v_[0-9a-f]{24}$/);
    expect(header(HEADERS.version)).toBe(info.version);
    expect(header(HEADERS.cluster)).toBe(String(info.cluster));
    expect(header(HEADERS.mask)).toMatch(/^m_[0-9a-f]{24}$/);
    expect(header(HEADERS.mask)).toBe(info.mask);
    expect(Number(header(HEADERS.sparsity))).toBeCloseTo(info.sparsity, 3);
    expect(info.sparsity).toBeGreaterThan(0);
    for (const name of [HEADERS.experiment, HEADERS.variant, HEADERS.region]) {
      expect(header(name), name).toMatch(/^\S+$/);
    }
    expect(header(HEADERS.fallback)).toBeNull();
    const timing = header(HEADERS.serverTiming)!;
    for (const name of ['embed', 'route', 'assign', 'backend']) {
      expect(timing).toMatch(new RegExp(`(^|, )${name};dur=\\d`));
    }
  });

  test('streams, with the decision in the last chunk and the usage that was asked for', async () => {
    const stream = await product.client.chat.completions.create({
      model: product.dev.model,
      messages: messagesOf(PROMPT),
      max_completion_tokens: 20,
      temperature: 0,
      stream: true,
      stream_options: { include_usage: true },
    });
    const arrivals_ms: number[] = [];
    const chunks = [];
    for await (const chunk of stream) {
      chunks.push(chunk);
      arrivals_ms.push(performance.now());
    }
    const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');
    const whole = await chat(PROMPT, { max_completion_tokens: 20 });
    expect(text).toBe(whole.data.choices[0]!.message.content);
    expect(chunks.find((chunk) => chunk.usage != null)?.usage).toEqual(whole.data.usage);
    expect(infoOf(chunks.at(-1)).mask).toBe(infoOf(whole.data).mask);
    // Not held back until the end: most of the time lies between the first chunk and the last.
    expect(chunks.length).toBeGreaterThan(10);
    expect(arrivals_ms.at(-1)! - arrivals_ms[0]!).toBeGreaterThan(20);
  });

  test('decodes under exactly the mask that the dry run told', async () => {
    for (const prompt of KINDS) {
      const [told, { data }] = [await dryRun(prompt), await chat(prompt, { max_completion_tokens: 2 })];
      const used = infoOf(data);
      expect(used.mask).toBe(told.mask);
      expect({ ...used, similarity: null }).toMatchObject({ ...told.maskroute, similarity: null });
      expect(used.sparsity).toBeCloseTo(told.sparsity!, 3);
    }
  });

  test('prompts of different kinds reach different clusters', async () => {
    const clusters = await Promise.all(KINDS.map(async (prompt) => (await dryRun(prompt)).maskroute.cluster));
    expect(new Set(clusters).size).toBeGreaterThanOrEqual(3);
  });

  test('under `:dense` runs every block and says who asked for it', async () => {
    const { data, response } = await chat(PROMPT, { model: `${product.dev.model}:dense` });
    expect(infoOf(data)).toMatchObject({ mask: 'dense', sparsity: 0, fallback: 'requested' });
    expect(response.headers.get(HEADERS.fallback)).toBe('requested');
  });

  test('is the same alone and among others with other masks', async () => {
    const ask = async (prompt: string) =>
      (await chat(prompt, { max_completion_tokens: 12 })).data.choices[0]!.message.content;
    const alone: unknown[] = [];
    for (const prompt of KINDS) alone.push(await ask(prompt));
    expect(await Promise.all(KINDS.map(ask))).toEqual(alone);
  });
});

describe('a client that hangs up', () => {
  const idle = () => vi.waitFor(async () => expect(await gauge('num_requests_running')).toBe(0), 20_000);
  const long = { max_completion_tokens: 1500, ignore_eos: true };
  const GENERATED = 'maskroute_engine_generated_tokens';

  test('in the middle of a stream ends the request in the engine', async () => {
    const before = await gauge(GENERATED);
    const stream = await product.client.chat.completions.create({
      model: product.dev.model,
      messages: messagesOf(PROMPT),
      ...long,
      stream: true,
    });
    for await (const chunk of stream) if ((chunk.choices[0]?.delta.content ?? '') !== '') break;
    stream.controller.abort();
    await idle();
    await stopsGenerating();
    // All of it would be 1,500.
    expect((await gauge(GENERATED)) - before).toBeLessThan(750);
    // No backend is blamed for it: operators watch for that.
    const log = await readFile(path.join(home, 'logs', 'edge.log'), 'utf8');
    expect(log).not.toContain('stream_broke_off');
  });

  test('before the first token ends it too', async () => {
    const before = await gauge(GENERATED);
    const abort = new AbortController();
    const prompt = 'The quick brown fox jumps over the lazy dog. '.repeat(120);
    const answer = product.client.chat.completions.create(
      { model: product.dev.model, messages: messagesOf(prompt), ...long },
      { signal: abort.signal },
    );
    const failed = expect(answer).rejects.toThrow(/abort/i);
    await vi.waitFor(async () => expect(await gauge('num_requests_running')).toBe(1), {
      interval: 5,
      // The engine tells of a request after its first step, which takes a while on a busy machine.
      timeout: 20_000,
    });
    abort.abort();
    await failed;
    await idle();
    await stopsGenerating();
    expect((await gauge(GENERATED)) - before).toBeLessThan(750);
  });

  /** A step under way, or a comparison in the background, may still end. */
  async function stopsGenerating(): Promise<void> {
    await vi.waitFor(async () => {
      const before = await gauge('maskroute_engine_steps');
      await sleep(150);
      expect(await gauge('maskroute_engine_steps')).toBe(before);
    }, 30_000);
  }
});

describe('the account', () => {
  const admin = async (method: string, path: string, body?: object) => {
    const response = await fetch(`${product.dev.edge}/admin/v1${path}`, {
      method,
      headers: { authorization: `Bearer ${product.dev.adminKey}`, 'content-type': 'application/json' },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
    expect(response.ok, `${method} ${path}`).toBe(true);
    return (await response.json()) as { key: string; data: Record<string, number>[] };
  };

  test('of a tenant is what its requests cost, by budget and by usage, hung up on or not', async () => {
    await admin('POST', '/tenants', { id: 'counted', name: 'Counted', tokens_per_day: 100_000 });
    const { key } = await admin('POST', '/keys', { tenant: 'counted', name: 'e2e' });
    const client = product.client.withOptions({ apiKey: key });
    const body = { model: product.dev.model, messages: messagesOf(PROMPT), max_completion_tokens: 12 };
    const whole = await client.chat.completions.create(body);
    const stream = await client.chat.completions.create({ ...body, stream: true });
    for await (const _chunk of stream);
    const endless = { ...body, max_completion_tokens: 1500, stream: true, ignore_eos: true } as const;
    const left = await client.chat.completions.create(endless);
    let chunks = 0;
    for await (const _chunk of left) if (++chunks === 10) break;
    left.controller.abort();
    await vi.waitFor(async () => expect(await gauge('num_requests_running')).toBe(0), 20_000);
    const abort = new AbortController();
    const unseen = client.chat.completions.create({ ...endless, stream: false }, { signal: abort.signal });
    unseen.catch(() => {});
    await vi.waitFor(async () => expect(await gauge('num_requests_running')).toBe(1), {
      interval: 5,
      timeout: 20_000,
    });
    abort.abort();

    const usage = await vi.waitFor(
      async () => {
        const [row] = (await admin('GET', '/usage?tenant=counted')).data;
        expect(row).toMatchObject({ requests: 4, errors: 2 });
        return row!;
      },
      { timeout: 30_000, interval: 250 },
    );
    expect(usage.prompt_tokens).toBe(4 * whole.usage!.prompt_tokens);
    expect(usage.completion_tokens).toBeGreaterThanOrEqual(2 * whole.usage!.completion_tokens + chunks - 1);
    expect(usage.completion_tokens).toBeLessThan(2 * whole.usage!.completion_tokens + 100);
    const [budget] = (await admin('GET', '/tenants/counted/budget')).data;
    expect(budget).toMatchObject({
      limit: 100_000,
      used: usage.prompt_tokens! + usage.completion_tokens!,
    });
  });

  test('of many clients that leave at once, in line, at their prompts and at their answers, is whole', async () => {
    const limits = { requests_per_day: 1_000, tokens_per_day: 1_000_000 };
    await admin('POST', '/tenants', { id: 'leavers', name: 'Leavers', ...limits });
    const { key } = await admin('POST', '/keys', { tenant: 'leavers', name: 'e2e' });
    const client = product.client.withOptions({ apiKey: key });
    const requests = 24;
    const leaving = Array.from({ length: requests }, async (_, i) => {
      const abort = new AbortController();
      const body = { model: product.dev.model, messages: messagesOf(PROMPT.repeat(1 + (i % 4) * 8)) };
      const answer = client.chat.completions.create(
        { ...body, max_completion_tokens: 1500, ...{ ignore_eos: true } },
        { signal: abort.signal },
      );
      answer.catch(() => {});
      await sleep(400 + i * 50);
      abort.abort();
    });
    await Promise.all(leaving);
    await vi.waitFor(
      async () => {
        const [row] = (await admin('GET', '/usage?tenant=leavers')).data;
        const { data } = await admin('GET', '/tenants/leavers/budget');
        const used = Object.fromEntries(data.map((one) => [one.unit, one.used]));
        // On a busy machine some leave before the edge has read what they want.
        expect(used.requests).toBeGreaterThan(requests / 2);
        expect(row).toMatchObject({ requests: used.requests, errors: used.requests });
        expect(used.tokens).toBe(row!.prompt_tokens! + row!.completion_tokens!);
        expect(row!.completion_tokens).toBeLessThan((requests * 1500) / 2);
      },
      { timeout: 40_000, interval: 500 },
    );
  }, 90_000);
});

describe('keys', () => {
  test('a client that names an address gets nobody to send a key there', async () => {
    const thief: string[] = [];
    const server = createServer((request, response) => {
      thief.push(`${request.url} ${request.headers.authorization}`);
      response.writeHead(404).end();
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as AddressInfo;
    for (const host of [`localhost:${port}`, `127.0.0.1:${port}`]) {
      const ask = request(`${product.dev.edge}/v1/chat/completions`, {
        method: 'POST',
        headers: {
          host,
          'x-forwarded-host': host,
          origin: `http://${host}`,
          authorization: `Bearer ${product.dev.apiKey}`,
          'content-type': 'application/json',
        },
      });
      const mask = `m_${'f'.repeat(16)}${String(port).padStart(8, '0')}`;
      ask.end(JSON.stringify({ model: product.dev.model, messages: messagesOf(PROMPT), mask }));
      const [response] = (await once(ask, 'response')) as [IncomingMessage];
      expect(JSON.parse(await text(response))).toMatchObject({ error: { code: 'unknown_mask' } });
    }
    server.close();
    expect(thief).toEqual([]);
  });

  test('a token for another address opens no backend, and health says up and nothing else', async () => {
    const { backend, backendKey } = product.dev;
    const sign = createSigner(backendKey);
    const statusFor = async (audience: string | undefined) => {
      const authorization = `Bearer ${await sign({ tenant: '', edge: '', audience })}`;
      return (await fetch(`${backend}/v1/models`, { headers: { authorization } })).status;
    };
    expect([await statusFor(backend), await statusFor('http://a.test'), await statusFor(undefined)]).toEqual([
      200, 401, 401,
    ]);
    expect(await (await fetch(`${backend}/readyz`)).json()).toEqual({ status: 'ready' });
    expect((await fetch(`${backend}/metrics`)).status).toBe(401);
  });
});

describe('the other endpoints', () => {
  test('models come with their dense twins', async () => {
    const ids = (await product.client.models.list()).data.map((model) => model.id);
    expect(ids).toEqual([product.dev.model, `${product.dev.model}:dense`]);
  });

  test('a plain completion is routed as well', async () => {
    const body = { model: product.dev.model, prompt: PROMPT, max_tokens: 8, temperature: 0, min_tokens: 8 };
    const { data } = await product.client.completions.create(body).withResponse();
    expect(data.choices[0]!.text).toMatch(/\w/);
    expect(infoOf(data).cluster).toBe((await dryRun(PROMPT)).maskroute.cluster);
  });

  test('errors are the client’s own exceptions, with stable codes', async () => {
    const thrown = async (body: object) => chat(PROMPT, body).catch((error: APIError) => error);
    expect(await thrown({ temperature: 3 })).toMatchObject({ status: 400, code: 'invalid_request' });
    expect(await thrown({ model: 'nobody' })).toMatchObject({ status: 404, code: 'model_not_found' });
    expect(await thrown({ mask: 'm_000000000000000000000000' })).toMatchObject({ code: 'unknown_mask' });
    const stranger = product.client.withOptions({ apiKey: 'mr_live_nobody' });
    const refused = await stranger.models.list().catch((error: APIError) => error);
    expect(refused).toMatchObject({ status: 401, code: 'invalid_api_key' });
  });
});
