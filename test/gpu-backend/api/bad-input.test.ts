/** What the client library would never send: every answer is the OpenAI error object with a reason. */
import { randomUUID } from 'node:crypto';
import { subscribe } from 'node:diagnostics_channel';
import { once } from 'node:events';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import type { Server } from 'node:http';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { gzipSync } from 'node:zlib';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { UsedTokens } from '../../../gpu-backend/api/auth.ts';
import type { ApiLimits } from '../../../gpu-backend/api/parts.ts';
import type { HomeJobs } from '../../../gpu-backend/jobs/home-jobs.ts';
import { JobData } from '../../../gpu-backend/jobs/job-data.ts';
import { importTokenKey, signToken } from '../../../shared/wire/service-token.ts';
import type { TestServer } from './harness.ts';
import { AUDIENCE, BACKEND_KEY, eventually, METRICS_KEY, serveModel } from './harness.ts';
import type { ScriptedEngine } from './scripted-engine.ts';
import { bytesOf, END_TOKEN, scriptedEngine, scriptedModel } from './scripted-engine.ts';

let engine: ScriptedEngine;
let server: TestServer;
beforeAll(async () => {
  engine = scriptedEngine({ answer: () => [...bytesOf('ok'), END_TOKEN] });
  server = await serveModel(scriptedModel(engine));
});
afterAll(() => server[Symbol.asyncDispose]());

const CHAT = '/v1/chat/completions';
const chat = (fields: object = {}) => ({
  model: 'scripted',
  messages: [{ role: 'user', content: 'Hi' }],
  ...fields,
});

const claims = (fields: object = {}) => {
  const now_s = Math.floor(Date.now() / 1000);
  return {
    tenant: 't1',
    issuedAt_s: now_s,
    expiresAt_s: now_s + 60,
    nonce: randomUUID(),
    edge: '',
    audience: AUDIENCE,
    ...fields,
  };
};

async function errorOf(response: Response) {
  const body = (await response.json()) as { error: { code: string; param: string | null; message: string } };
  expect(Object.keys(body.error).toSorted()).toEqual(['code', 'message', 'param', 'type']);
  expect(response.headers.get('content-type')).toContain('application/json');
  expect(response.headers.get('x-request-id')).toMatch(/^req_[0-9a-f]{24}$/);
  return { status: response.status, ...body.error };
}

describe('bodies', () => {
  /** In addition to those of `bodies.test.ts`. */
  it.each<[string, string | object, string]>([
    [
      'NaN as a bare word',
      JSON.stringify(chat({ temperature: 'HERE' })).replace('"HERE"', 'NaN'),
      'temperature',
    ],
    ['an overflowing number', JSON.stringify(chat()).replace('}]', '}],"top_p":1e999'), 'top_p'],
    ['negative max_tokens', chat({ max_tokens: -5 }), 'max_tokens'],
    ['too large n', chat({ n: 1000 }), 'n'],
  ])('%s', async (_, body, param) => {
    const error = await errorOf(await server.post(CHAT, body));
    expect(error).toMatchObject({ status: 400, code: 'invalid_request', param });
  });

  it.each<[string, unknown]>([
    ['an empty text', ''],
    ['an empty list', []],
    ['a list with an empty text', ['a', '']],
    ['an id outside the vocabulary', [1, 258]],
    ['too many prompts', Array(300).fill('a')],
  ])('a prompt with %s', async (_, prompt) => {
    const error = await errorOf(await server.post('/v1/completions', { model: 'scripted', prompt }));
    expect(error).toMatchObject({ status: 400, code: 'invalid_request' });
    expect(error.param).toMatch(/^prompt/);
  });

  it('100,000 token ids', async () => {
    const body = { model: 'scripted', prompt: Array(100_000).fill(65) };
    expect(await errorOf(await server.post('/v1/completions', body))).toMatchObject({
      status: 400,
      code: 'context_length_exceeded',
      param: 'prompt',
    });
  });

  it('a prompt that fills the context is scored, but leaves no room for an answer', async () => {
    const body = { model: 'scripted', prompt: Array(512).fill(65), max_tokens: 0 };
    expect((await server.post('/v1/completions', body)).status).toBe(200);
    expect(await errorOf(await server.post('/v1/completions', { ...body, max_tokens: 1 }))).toMatchObject({
      code: 'context_length_exceeded',
    });
  });

  it('prompts times n is bounded', async () => {
    await using own = await serveModel(scriptedModel(engine), { choicesMax: 4 });
    const ask = (count: number, n: number) =>
      own.post('/v1/completions', { model: 'scripted', prompt: Array(count).fill('a'), n });
    expect((await ask(2, 2)).status).toBe(200);
    expect(await errorOf(await ask(5, 1))).toMatchObject({ status: 400, param: 'prompt' });
    expect(await errorOf(await own.post(CHAT, chat({ n: 5 })))).toMatchObject({ status: 400, param: 'n' });
  });

  it('what is wrong is said without asking the edge for the mask', async () => {
    await using own = await serveModel(scriptedModel(engine), {}, { edgeUrl: 'http://127.0.0.1:9' });
    const mask = `m_${'0'.repeat(24)}`;
    for (const [param, fields] of [
      ['logit_bias', { logit_bias: { 258: 1 } }],
      ['n', { n: 1000 }],
      ['min_tokens', { min_tokens: 2, max_tokens: 1 }],
    ] as const)
      expect(await errorOf(await own.post(CHAT, chat({ mask, ...fields })))).toMatchObject({
        status: 400,
        param,
      });
    expect(await errorOf(await own.post(CHAT, chat({ mask })))).toMatchObject({ status: 503, param: 'mask' });
  });

  it('invalid UTF-8', async () => {
    const body = Buffer.from(JSON.stringify(chat()));
    body[body.indexOf('Hi')] = 0xff;
    expect(await errorOf(await server.post(CHAT, '', { body }))).toMatchObject({
      status: 400,
      code: 'invalid_json',
    });
  });

  it('10 MB, announced or in chunks', async () => {
    const body = Buffer.alloc(10 * 1024 * 1024, 'x');
    expect(await errorOf(await server.post(CHAT, '', { body }))).toMatchObject({
      status: 413,
      code: 'body_too_large',
    });
    const stream = new Blob([body]).stream();
    const chunked = { body: stream, duplex: 'half' } as RequestInit;
    expect(await errorOf(await server.post(CHAT, '', chunked))).toMatchObject({ status: 413 });
  });

  it('nesting a hundred thousand deep', async () => {
    const deep = '['.repeat(100_000) + ']'.repeat(100_000);
    for (const stream of [false, true]) {
      const body = JSON.stringify(chat({ stream })).replace(
        '}]',
        `}],"maskroute":{"x":${deep}},"metadata":${deep}`,
      );
      const response = await server.post(CHAT, body);
      expect(response.status).toBe(200);
      expect(await response.text()).toContain('"mask":"dense"');
    }
    const messages = JSON.stringify(chat()).replace('"Hi"', deep);
    expect(await errorOf(await server.post(CHAT, messages))).toMatchObject({ code: 'invalid_request' });
  });

  it('other media types', async () => {
    for (const type of [
      'text/plain',
      'application/x-www-form-urlencoded',
      'application/json; charset=utf-16',
    ]) {
      const headers = { authorization: `Bearer ${BACKEND_KEY}`, 'content-type': type };
      const response = await server.post(CHAT, chat(), { headers });
      expect(await errorOf(response)).toMatchObject({ status: 415, code: 'unsupported_media_type' });
    }
    const headers = {
      authorization: `Bearer ${BACKEND_KEY}`,
      'content-type': 'Application/JSON; Charset="UTF-8"',
    };
    expect((await server.post(CHAT, chat(), { headers })).status).toBe(200);
  });

  it('compressed bodies', async () => {
    const headers = {
      authorization: `Bearer ${BACKEND_KEY}`,
      'content-type': 'application/json',
      'content-encoding': 'gzip',
    };
    const text = JSON.stringify(chat());
    // The second one only says that it is compressed.
    for (const body of [gzipSync(text), text]) {
      const response = await fetch(server.url + CHAT, { method: 'POST', headers, body });
      expect(await errorOf(response)).toMatchObject({
        status: 415,
        code: 'unsupported_media_type',
        message: 'Send the body as it is: compressed bodies (content-encoding) are not unpacked.',
      });
    }
  });

  it('a body that breaks off in the middle leaves the server well', async () => {
    const { port } = new URL(server.url);
    const socket = connect(Number(port), '127.0.0.1');
    socket.on('error', () => {});
    socket.write(
      `POST ${CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${BACKEND_KEY}\r\n` +
        'content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"model":',
    );
    await new Promise((resolve) => setTimeout(resolve, 30));
    socket.destroy();
    expect((await server.post(CHAT, chat())).status).toBe(200);
    await eventually(() => server.logs().includes('"code":"cancelled"'));
    expect(server.logs()).not.toContain('internal_error');
  });
});

describe('what is no valid HTTP', () => {
  const post = (...headers: string[]) =>
    [`POST ${CHAT} HTTP/1.1`, 'host: x', `authorization: Bearer ${BACKEND_KEY}`, ...headers, '', ''].join(
      '\r\n',
    );
  const asJson = 'content-type: application/json';
  /** What comes back for these bytes until the server ends the connection. */
  async function sent(bytes: string, { ends = false } = {}): Promise<string> {
    const socket = connect({
      port: Number(new URL(server.url).port),
      host: '127.0.0.1',
      allowHalfOpen: true,
    });
    if (ends) socket.end(bytes);
    else socket.write(bytes);
    const got = await text(socket);
    socket.destroy();
    return got;
  }

  it.each<[string, string, string, RegExp]>([
    [
      'a request line of another protocol',
      'HELO there\r\n\r\n',
      '400 invalid_request',
      /^This is no valid HTTP/,
    ],
    [
      'headers that are too large',
      post(`x-long: ${'x'.repeat(20_000)}`),
      '431 headers_too_large',
      /16384 bytes/,
    ],
    ['a length that is no number', post('content-length: ten'), '400 invalid_request', /Content-Length/],
    ['two lengths', post('content-length: 1', 'content-length: 2'), '400 invalid_request', /Content-Length/],
    [
      'a piece whose length is no number',
      `${post(asJson, 'transfer-encoding: chunked')}x\r\n`,
      '400 invalid_request',
      /chunk/,
    ],
    ['no host', 'GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n', '400 invalid_request', /host/],
    [
      'a host that is none',
      'GET /healthz HTTP/1.1\r\nhost: a b\r\nconnection: close\r\n\r\n',
      '400 invalid_request',
      /Invalid URL/,
    ],
  ])('%s is refused with the reason', async (_, bytes, refusal, reason) => {
    const [head, body] = (await sent(bytes)).split('\r\n\r\n');
    const { error } = JSON.parse(body!);
    expect(`${head!.split(' ')[1]} ${error.code}`).toBe(refusal);
    expect(error).toEqual({
      message: expect.stringMatching(reason),
      type: 'invalid_request_error',
      param: null,
      code: error.code,
    });
    expect(head!.toLowerCase()).toContain('content-type: application/json');
  });

  it('a body that its client cuts off is refused, too', async () => {
    const [head, body] = (await sent(`${post(asJson, 'content-length: 100')}{`, { ends: true })).split(
      '\r\n\r\n',
    );
    expect(head).toMatch(/^HTTP\/1\.1 400 /);
    const message = 'This is no valid HTTP request: it ended early.';
    expect(JSON.parse(body!)).toMatchObject({ error: { code: 'invalid_request', message } });
  });

  it('behind a request whose answer has begun ends the connection, and is no part of that answer', async () => {
    const body = JSON.stringify(chat({ stream: true, max_tokens: 50, ignore_eos: true }));
    const socket = connect(Number(new URL(server.url).port), '127.0.0.1');
    socket.write(`${post(asJson, `content-length: ${body.length}`)}${body}`);
    engine.script = { ...engine.script, step_ms: 20 };
    const got = text(socket);
    await once(socket, 'data');
    socket.write('HELO there\r\n\r\n');
    expect((await got).match(/HTTP\/1\.1/g)).toHaveLength(1);
    engine.script = { ...engine.script, step_ms: 0 };
  });
});

describe('bodies that are sent slowly', () => {
  const open: Socket[] = [];
  afterEach(() => {
    for (const socket of open.splice(0)) socket.destroy();
  });

  /** A request over a socket of its own, of whose body so many bytes come, and no more until `send`. */
  async function slowly(
    to: TestServer,
    sent: number,
    { path = CHAT, key = BACKEND_KEY, bytes = 60_000 } = {},
  ) {
    const body = JSON.stringify(chat({ max_tokens: 1 })).padEnd(bytes);
    const socket = connect(Number(new URL(to.url).port), '127.0.0.1');
    open.push(socket);
    let text = '';
    socket.on('data', (chunk) => {
      text += chunk.toString();
    });
    const closed = new Promise<void>((resolve) => socket.on('close', () => resolve()));
    socket.on('error', () => {});
    socket.write(
      `POST ${path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${key}\r\n` +
        `content-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}\r\n\r\n`,
    );
    socket.write(body.slice(0, sent));
    return {
      closed,
      answer: () => /^HTTP\/1\.1 (\d+)[\s\S]*"code":"(\w+)"/.exec(text)?.slice(1).join(' '),
      status: () => /^HTTP\/1\.1 (\d+)/.exec(text)?.[1],
      finish: () => socket.write(body.slice(sent)),
    };
  }
  const serve = (limits: Partial<ApiLimits>) => serveModel(scriptedModel(engine), limits);
  const arrived = () => new Promise((resolve) => setTimeout(resolve, 100));

  it('take no place before they are whole, and are answered once they are', async () => {
    await using own = await serve({ inFlightMax: 3 });
    const slow = await Promise.all(Array.from({ length: 12 }, () => slowly(own, 10)));
    await arrived();
    for (let i = 0; i < 10; i++) expect((await own.post(CHAT, chat())).status).toBe(200);
    expect(slow.map((one) => one.answer())).toEqual(Array(12).fill(undefined));
    for (const one of slow) {
      one.finish();
      await eventually(() => one.status() === '200');
    }
  });

  it('find no place that others took meanwhile', async () => {
    const own = scriptedEngine({ answer: () => bytesOf('x'), step_ms: 5 });
    await using full = await serveModel(scriptedModel(own), { inFlightMax: 1 });
    const slow = await slowly(full, 10);
    const leave = new AbortController();
    const headers = { authorization: `Bearer ${BACKEND_KEY}`, 'content-type': 'application/json' };
    await full.post(CHAT, chat({ stream: true }), { headers, signal: leave.signal });
    slow.finish();
    await eventually(() => slow.answer() === '429 queue_full');
    leave.abort();
  });

  it.each(['GET', 'HEAD', 'POST'])('and that nobody reads go with the answer: %s', async (method) => {
    const socket = connect(Number(new URL(server.url).port), '127.0.0.1');
    open.push(socket);
    let text = '';
    socket.on('data', (chunk) => {
      text += chunk.toString();
    });
    socket.write(`${method} /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{`);
    await eventually(() => socket.closed, 3000);
    expect(text).toMatch(method === 'POST' ? /^HTTP\/1\.1 405 / : /^HTTP\/1\.1 200 /);
  });

  it('give way where there are too many, who has been arriving for longest first', async () => {
    await using own = await serve({ bodiesArrivingMax: 4 });
    const slow: Awaited<ReturnType<typeof slowly>>[] = [];
    for (let i = 0; i < 6; i++) {
      slow.push(await slowly(own, 10));
      await arrived();
    }
    await eventually(() => slow[1]!.answer() !== undefined);
    expect(slow.map((one) => one.answer())).toEqual([
      ...['408 request_timeout', '408 request_timeout'],
      ...[undefined, undefined, undefined, undefined],
    ]);
    await slow[0]!.closed;
    expect((await own.post(CHAT, chat())).status).toBe(200);
    await eventually(() => slow[2]!.answer() === '408 request_timeout');
    slow[5]!.finish();
    await eventually(() => slow[5]!.status() === '200');
  });

  it('give way where they have too many bytes together', async () => {
    await using own = await serve({ bytesArrivingMax: 100_000 });
    const slow: Awaited<ReturnType<typeof slowly>>[] = [];
    for (let i = 0; i < 3; i++) {
      slow.push(await slowly(own, 40_000));
      await arrived();
    }
    await eventually(() => slow[0]!.answer() === '408 request_timeout');
    expect([slow[1]!.answer(), slow[2]!.answer()]).toEqual([undefined, undefined]);
    expect((await own.post(CHAT, chat())).status).toBe(200);
  });

  it('of one tenant do not end those of another', async () => {
    await using own = await serve({ bodiesArrivingMax: 4 });
    const key = await importTokenKey(BACKEND_KEY);
    const other = await slowly(own, 10, { key: await signToken(key, claims({ tenant: 'other' })) });
    await arrived();
    const slow = await Promise.all(Array.from({ length: 8 }, () => slowly(own, 10)));
    await eventually(() => slow.filter((one) => one.answer() === '408 request_timeout').length === 5);
    other.finish();
    await eventually(() => other.status() === '200');
  });

  it.each([CHAT, '/v1/completions', '/v1/embeddings', '/v1/jobs'])(
    'have a time to arrive: %s',
    async (path) => {
      await using own = await serve({ bodyArrival_ms: 150 });
      const slow = await slowly(own, 10, { path });
      await eventually(() => slow.answer() === '408 request_timeout');
      await slow.closed;
    },
  );

  it.each([CHAT, '/v1/jobs/data?name=a'])('end when the server stops, and hear why: %s', async (path) => {
    const folder = await mkdtemp(join(tmpdir(), 'maskroute-uploads-'));
    const jobs = { jobs: { data: new JobData(folder, undefined) } } as unknown as HomeJobs['held'];
    const own = await serveModel(scriptedModel(engine), {}, { jobs });
    const slow = await slowly(own, 10, { path });
    await arrived();
    await own[Symbol.asyncDispose]();
    expect(slow.answer()).toBe('503 not_ready');
    expect(await readdir(folder)).toEqual([]);
    await rm(folder, { recursive: true });
  });

  it('that take a full hour are refused and counted as too slow: an upload', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'maskroute-uploads-'));
    const jobs = { jobs: { data: new JobData(folder, undefined) } } as unknown as HomeJobs['held'];
    await using own = await serveModel(scriptedModel(engine), {}, { jobs });
    const begun = new Promise<{ server: Server; socket: Socket }>((resolve) =>
      subscribe('http.server.request.start', resolve as never),
    );
    const slow = await slowly(own, 10, { path: '/v1/jobs/data?name=a' });
    const { server: node, socket } = await begun;
    await arrived();
    // As Node does after the hour.
    node.emit('clientError', Object.assign(new Error(), { code: 'ERR_HTTP_REQUEST_TIMEOUT' }), socket);
    await slow.closed;
    expect(slow.answer()).toBe('408 request_timeout');
    await eventually(() => own.logs().includes('request refused'));
    expect(own.logs().match(/"code":"\w+"/g)).toEqual(['"code":"request_timeout"']);
    expect(await readdir(folder)).toEqual([]);
    await rm(folder, { recursive: true });
  });
});

describe('paths, methods and callers', () => {
  const authorization = `Bearer ${BACKEND_KEY}`;

  it('404 and 405 in the same shape', async () => {
    const missing = await fetch(`${server.url}/v1/nothing`, { headers: { authorization } });
    expect(await errorOf(missing)).toMatchObject({ status: 404, code: 'not_found' });
    for (const [method, path, allow] of [
      ['GET', CHAT, 'POST'],
      ['POST', '/healthz', 'GET'],
      ['PUT', '/v1/jobs', 'GET, POST'],
      ['POST', '/v1/jobs/job_1', 'GET'],
    ] as const) {
      const wrong = await fetch(server.url + path, { method, headers: { authorization } });
      expect([path, wrong.headers.get('allow')]).toEqual([path, allow]);
      expect(await errorOf(wrong)).toMatchObject({ status: 405, code: 'method_not_allowed' });
    }
  });

  it('health is open, and says that the server is up, and nothing else', async () => {
    for (const [path, status] of [
      ['/healthz', 'ok'],
      ['/readyz', 'ready'],
    ]) {
      const response = await fetch(server.url + path);
      expect([response.status, await response.json()]).toEqual([200, { status }]);
    }
  });

  it('figures are for holders of the metrics key or the backend key', async () => {
    const token = await signToken(await importTokenKey(BACKEND_KEY), claims());
    const statuses = async ({ url }: TestServer, keys: readonly string[]) => {
      const answers = keys.map((key) => fetch(`${url}/metrics`, { headers: { authorization: key } }));
      return (await Promise.all(answers)).map(({ status }) => status);
    };
    const keys = [METRICS_KEY, BACKEND_KEY, token, 'undefined', `${METRICS_KEY}x`].map(
      (key) => `Bearer ${key}`,
    );
    await using withKey = await serveModel(scriptedModel(engine), {}, { metricsKey: METRICS_KEY });
    expect(await statuses(withKey, [...keys, '', 'Bearer'])).toEqual([200, 200, 401, 401, 401, 401, 401]);
    expect(await statuses(server, keys)).toEqual([401, 200, 401, 401, 401]);
    const refused = await fetch(`${server.url}/metrics`);
    expect(await errorOf(refused)).toMatchObject({ status: 401, code: 'invalid_api_key' });
    const completions = fetch(`${withKey.url}/v1/models`, { headers: { authorization: keys[0]! } });
    expect((await completions).status).toBe(401);
  });

  const call = (credential: string | undefined) =>
    fetch(
      `${server.url}/v1/models`,
      credential === undefined ? {} : { headers: { authorization: credential } },
    );

  it('the key or a signed token, nothing else', async () => {
    const key = await importTokenKey(BACKEND_KEY);
    const other = await importTokenKey('another key');
    const now_s = Math.floor(Date.now() / 1000);
    const stale = { issuedAt_s: now_s - 500, expiresAt_s: now_s - 440 };
    expect((await call(`Bearer ${await signToken(key, claims())}`)).status).toBe(200);
    expect((await call(`bearer ${BACKEND_KEY}`)).status).toBe(200);
    for (const [credential, code] of [
      [undefined, 'invalid_api_key'],
      ['', 'invalid_api_key'],
      [`Basic ${BACKEND_KEY}`, 'invalid_api_key'],
      [`Bearer ${BACKEND_KEY}x`, 'invalid_api_key'],
      [`Bearer ${await signToken(other, claims())}`, 'invalid_api_key'],
      [`Bearer ${await signToken(key, claims())}x`, 'invalid_api_key'],
      [`Bearer ${await signToken(key, claims(stale))}`, 'expired_token'],
    ] as const) {
      expect(await errorOf(await call(credential))).toMatchObject({ status: 401, code });
    }
  });

  it('remembers used tokens as long as they live, and never more than so many', () => {
    const used = new UsedTokens(3);
    expect([used.use('a', 10, 0), used.use('a', 10, 5), used.use('b', 20, 5)]).toEqual([true, false, true]);
    expect(used.use('a', 30, 11)).toBe(true);
    for (const nonce of ['c', 'd', 'e']) used.use(nonce, 99, 12);
    expect([used.use('e', 99, 12), used.use('b', 99, 12)]).toEqual([false, true]);
  });

  it('logs say who and how much, never the prompt or a key', async () => {
    const token = await signToken(await importTokenKey(BACKEND_KEY), claims({ tenant: 'acme' }));
    const secret = 'the secret of the prompt';
    await server.post(CHAT, chat({ messages: [{ role: 'user', content: secret }] }), {
      headers: { authorization: `Bearer ${token}`, 'content-type': 'application/json' },
    });
    expect(server.logs()).toContain('"tenant":"acme"');
    expect(server.logs()).toContain('"completion_tokens":2');
    for (const hidden of [secret, token, BACKEND_KEY]) expect(server.logs()).not.toContain(hidden);
  });
});
