/** Streams that go wrong: clients that leave or do not read, engines that are slow, full or broken, a stop. */
import { randomUUID } from 'node:crypto';
import { connect } from 'node:net';
import { describe, expect, it } from 'vitest';
import { createApp } from '../../../gpu-backend/api/api-app.ts';
import { type ApiLimits, openParts } from '../../../gpu-backend/api/parts.ts';
import type { HomeJobs } from '../../../gpu-backend/jobs/home-jobs.ts';
import { PLAIN_FORMAT } from '../../../gpu-backend/model/tokenizer/tool-format.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { importTokenKey, signToken } from '../../../shared/wire/service-token.ts';
import { AUDIENCE, apiOptions, BACKEND_KEY, collect, eventually, parseSse, serveModel } from './harness.ts';
import type { Script } from './scripted-engine.ts';
import { bytesOf, says, scriptedEngine, scriptedModel } from './scripted-engine.ts';

async function start(script: Script, limits: Partial<ApiLimits> = {}) {
  const engine = scriptedEngine(script);
  const server = await serveModel(scriptedModel(engine), limits);
  const chat = (fields: object = {}, init: RequestInit = {}) =>
    server.post(
      '/v1/chat/completions',
      { model: 'scripted', messages: [{ role: 'user', content: 'Hi' }], stream: true, ...fields },
      { headers: { authorization: `Bearer ${BACKEND_KEY}`, 'content-type': 'application/json' }, ...init },
    );
  return { engine, server, chat, [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

const endless: Script = { answer: () => bytesOf('x'), step_ms: 2, contextTokens: 10_000_000 };

describe('framing', () => {
  it('is data lines and [DONE], nothing else', async () => {
    await using api = await start(says('a\nb'));
    const response = await api.chat();
    expect(response.headers.get('content-type')).toBe('text/event-stream; charset=utf-8');
    const { events, comments } = parseSse(await response.text());
    expect(comments).toEqual([]);
    expect(events.at(-1)).toEqual({ event: undefined, data: '[DONE]' });
    const chunks = events.slice(0, -1).map(({ data }) => JSON.parse(data));
    expect(chunks.map(({ choices }) => choices[0].delta.content ?? '').join('')).toBe('a\nb');
    expect(chunks.at(-1)).toMatchObject({
      choices: [{ finish_reason: 'stop' }],
      maskroute: { mask: 'dense' },
    });
    expect(chunks.slice(0, -1).some((chunk) => 'maskroute' in chunk || 'usage' in chunk)).toBe(false);
  });

  it('keeps a slow start alive with comments', async () => {
    await using api = await start({ ...says('x'), prefill_ms: 300 }, { commit_ms: 20, keepalive_ms: 50 });
    const { events, comments } = parseSse(await (await api.chat()).text());
    expect(comments.length).toBeGreaterThanOrEqual(3);
    expect(new Set(comments)).toEqual(new Set([': keepalive']));
    expect(events.at(-1)!.data).toBe('[DONE]');
  });

  it('sends text as it comes', async () => {
    await using api = await start({ ...endless, step_ms: 20 });
    const leave = new AbortController();
    const reader = (await api.chat({}, { signal: leave.signal })).body!.getReader();
    await reader.read();
    await reader.read();
    expect(api.engine.ended).toEqual([]);
    leave.abort();
  });
});

describe('failures', () => {
  const broken = new MaskrouteError('engine_failed', 'The runtime failed.');

  it('before the first token have their own status', async () => {
    await using api = await start({ ...says('x'), failure: { afterTokens: 0, error: broken } });
    const response = await api.chat();
    expect(response.status).toBe(500);
    expect(await response.json()).toMatchObject({ error: { code: 'engine_failed' } });
  });

  it('later are an error event after what was sent, with the usage when it was asked for', async () => {
    await using api = await start({ ...says('abc'), failure: { afterTokens: 2, error: broken } });
    const response = await api.chat({ stream_options: { include_usage: true } });
    expect(response.status).toBe(200);
    const { events } = parseSse(await response.text());
    expect(JSON.parse(events.at(-2)!.data)).toMatchObject({ choices: [], usage: { completion_tokens: 2 } });
    expect(events.at(-1)!.event).toBe('error');
    expect(JSON.parse(events.at(-1)!.data)).toEqual({
      error: { message: 'The runtime failed.', type: 'server_error', param: null, code: 'engine_failed' },
      maskroute: expect.objectContaining({ prompt_tokens: 3, completion_tokens: 2 }),
    });
    const viaClient = api.server.client.chat.completions.create({
      model: 'scripted',
      messages: [{ role: 'user', content: 'Hi' }],
      stream: true,
    });
    await expect(viaClient.then((stream) => collect(stream))).rejects.toMatchObject({
      code: 'engine_failed',
    });
  });

  it('later on the newer wire are an event of its own kind, the next in its order', async () => {
    await using api = await start({ ...says('abc'), failure: { afterTokens: 2, error: broken } });
    const response = await api.server.post('/v1/responses', { model: 'scripted', input: 'Hi', stream: true });
    // `parseSse` reads names without points.
    const text = (await response.text()).replaceAll(/^event: response.*\n/gm, '');
    const { events } = parseSse(text);
    expect(events.at(-1)!.event).toBe('error');
    const sent = events.map(({ data }) => JSON.parse(data));
    expect(sent.map(({ sequence_number }) => sequence_number)).toEqual(sent.map((_, i) => i));
    expect(sent.at(-1)).toMatchObject({
      type: 'error',
      code: 'engine_failed',
      message: 'The runtime failed.',
      param: null,
      error: { message: 'The runtime failed.', type: 'server_error', param: null, code: 'engine_failed' },
      maskroute: { completion_tokens: 2 },
    });
    const stream = api.server.client.responses.stream({ model: 'scripted', input: 'Hi' });
    await expect(collect(stream)).rejects.toMatchObject({ code: 'engine_failed' });
  });

  it.each([true, false])(
    'twice of one request refuse it the third time, streamed: %s, and no other',
    async (stream) => {
      await using api = await start({
        ...says('abc'),
        failure: { afterTokens: stream ? 2 : 0, error: broken },
      });
      const codeOf = async (fields: object) =>
        /"code":"(\w+)"/.exec(await (await api.chat({ stream, ...fields })).text())?.[1];
      expect(await codeOf({ maskroute: { completion: 'one' } })).toBe('engine_failed');
      expect(await codeOf({ seed: 7 })).toBe('engine_failed');
      expect(await codeOf({ maskroute: { completion: 'two' } })).toBe('engine_failed');
      const { length } = api.engine.ended;
      const refused = await api.chat({ stream, maskroute: { completion: 'three' } });
      expect(refused.status).toBe(422);
      expect(await refused.json()).toMatchObject({
        error: { code: 'request_fails_engine', type: 'invalid_request_error' },
      });
      expect(api.engine.ended).toHaveLength(length);
      expect(await codeOf({ seed: 7 })).toBe('engine_failed');
      expect(await codeOf({ seed: 8 })).toBe('engine_failed');
    },
  );

  it("are forgotten once the request succeeds, and are the engine's only", async () => {
    const failing = (error: MaskrouteError): Script => ({
      ...says('abc'),
      failure: { afterTokens: 0, error },
    });
    await using api = await start(says('abc'));
    const statusUnder = async (script: Script) => {
      api.engine.script = script;
      return (await api.chat({ stream: false })).status;
    };
    const late = failing(new MaskrouteError('queue_timeout', 'Waited too long.'));
    for (const script of [late, late, late]) expect(await statusUnder(script)).toBe(503);
    for (const [script, status] of [
      [failing(broken), 500],
      [says('abc'), 200],
      [failing(broken), 500],
      [says('abc'), 200],
    ] as const)
      expect(await statusUnder(script)).toBe(status);
  });

  it('of an unknown kind tell the client nothing', async () => {
    const error = new Error('password 1234 in /etc');
    await using api = await start({ ...says('x'), failure: { afterTokens: 0, error } });
    const response = await api.chat({ stream: false });
    expect(response.status).toBe(500);
    expect(await response.text()).not.toContain('1234');
    expect(api.server.logs()).toContain('password 1234');
    const late = new Error('password 5678 in /etc');
    api.engine.script = { ...says('xyz'), failure: { afterTokens: 2, error: late } };
    const stream = await api.chat();
    expect(stream.status).toBe(200);
    expect(await stream.text()).not.toContain('5678');
    expect(api.server.logs()).toContain('password 5678');
  });

  it('of one choice end the others', async () => {
    const failing = { afterTokens: 1, error: broken };
    await using api = await start(endless);
    // The second choice fails, the first would go on for ever.
    const of = () => (api.engine.requests.length > 1 ? { failure: failing } : undefined);
    api.engine.script = { ...endless, answer: () => bytesOf('x'), of };
    expect((await api.chat({ n: 2, stream: false })).status).toBe(500);
    await eventually(() => api.engine.ended.length === 2);
    expect(api.engine.ended.map(({ reason }) => reason)).toContain('cancelled');
  });

  it('of a full line are 429 with Retry-After; of a long wait 503', async () => {
    await using api = await start({ ...endless, slots: 1, queueCapacity: 1 });
    const leave = new AbortController();
    const busy = [1, 2].map(() => api.chat({}, { signal: leave.signal }).catch(() => {}));
    await eventually(() => api.engine.requests.length === 2);
    const refused = await api.chat();
    expect(refused.status).toBe(429);
    expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(0);
    expect(await refused.json()).toMatchObject({ error: { code: 'queue_full', type: 'rate_limit_error' } });
    leave.abort();
    await Promise.all(busy);
    await eventually(() => api.engine.stats().requestsRunning === 0);
    const error = new MaskrouteError('queue_timeout', 'Waited too long.');
    api.engine.script = { ...endless, failure: { afterTokens: 0, error } };
    const late = await api.chat();
    expect(late.status).toBe(503);
    expect(Number(late.headers.get('retry-after'))).toBeGreaterThan(0);
    await late.text();
  });

  it('of a line that is full already come before the body is read', async () => {
    await using api = await start({ ...endless, isFull: true });
    const refused = await api.chat({}, { body: '{' });
    expect(refused.status).toBe(429);
    expect(refused.headers.get('retry-after')).toBe('1');
    expect(await refused.json()).toMatchObject({ error: { code: 'queue_full', type: 'rate_limit_error' } });
    expect(api.engine.requests).toEqual([]);
    api.engine.script = endless;
    expect((await api.chat({}, { body: '{' })).status).toBe(400);
  });

  it('of a full server come before the body is read', async () => {
    await using api = await start(endless, { inFlightMax: 2 });
    const leave = new AbortController();
    const busy = [1, 2].map(() => api.chat({}, { signal: leave.signal }));
    await Promise.all(busy);
    expect((await api.chat({}, { body: '{' })).status).toBe(429);
    leave.abort();
    await eventually(() => api.engine.ended.length === 2);
    expect((await api.chat({}, { body: '{' })).status).toBe(400);
  });

  it('of a tenant with its share of the places leave the others a place', async () => {
    await using api = await start(endless, { inFlightMax: 4 });
    const leave = new AbortController();
    const ask = async (tenant: string) => {
      const now_s = Math.floor(Date.now() / 1000);
      const times = { issuedAt_s: now_s, expiresAt_s: now_s + 60, nonce: randomUUID() };
      const key = await importTokenKey(BACKEND_KEY);
      const token = await signToken(key, { ...times, tenant, edge: '', audience: AUDIENCE });
      const headers = { authorization: `Bearer ${token}`, 'content-type': 'application/json' };
      return api.chat({}, { headers, signal: leave.signal });
    };
    // Kept: an answer that nobody holds any more is collected, which hangs up and frees its place.
    const answers: Response[] = [];
    for (const tenant of ['many', 'many', 'many', 'many', 'other', 'other']) answers.push(await ask(tenant));
    expect(answers.map(({ status }) => status)).toEqual([200, 200, 200, 429, 200, 429]);
    leave.abort();
  });

  it('of a full line spare the later choices of a request that is in', async () => {
    await using api = await start({ ...says('abcdef'), step_ms: 5, slots: 2, queueCapacity: 4 });
    const [first, second] = await Promise.all([1, 2].map(() => api.chat({ n: 6, stream: false })));
    const statuses = [first!.status, second!.status].toSorted();
    expect(statuses[0]).toBe(200);
    const { choices } = (await (first!.status === 200 ? first! : second!).json()) as { choices: object[] };
    expect(choices.map((choice) => (choice as { message: { content: string } }).message.content)).toEqual(
      Array(6).fill('abcdef'),
    );
  });
});

it.each(['', ' Here it is, and'])(
  'an answer of the Responses API that is cut has the same output whole and in a stream; after its call it says %j',
  async (after) => {
    const { begin, middle, end } = PLAIN_FORMAT;
    const said = `Let me look.${begin}f${middle}{"a": 1}${end}${after}`;
    await using api = await start({ ...says(said), contextTokens: 10_000 });
    const ask = {
      model: 'scripted',
      input: 'Hi',
      max_output_tokens: said.length,
      tools: [{ type: 'function' as const, name: 'f', parameters: { type: 'object' }, strict: false }],
    };
    const { client } = api.server;
    const whole = await client.responses.create(ask);
    const streamed = await client.responses.stream(ask).finalResponse();
    const shown = ({ status, output }: typeof whole) => ({
      status,
      output: output.map((item) => ({
        status: 'status' in item && item.status,
        text: item.type === 'message' ? item.content.map((part) => 'text' in part && part.text) : item.type,
      })),
    });
    expect(shown(whole)).toEqual({
      status: 'incomplete',
      output: [
        { status: 'completed', text: ['Let me look.'] },
        { status: after === '' ? 'incomplete' : 'completed', text: 'function_call' },
        ...(after === '' ? [] : [{ status: 'incomplete', text: [after] }]),
      ],
    });
    expect(shown(streamed as typeof whole)).toEqual(shown(whole));
  },
);

it('an answer of more choices than the line has places is computed, some at a time', async () => {
  await using api = await start({ ...says('ab'), slots: 1, queueCapacity: 2 });
  const response = await api.chat({ n: 8, stream: false });
  expect(response.status).toBe(200);
  expect(((await response.json()) as { choices: object[] }).choices).toHaveLength(8);
});

it('choices take turns in a stream, however fast they come', async () => {
  await using api = await start(says('x'.repeat(40)));
  const { events } = parseSse(await (await api.chat({ n: 3 })).text());
  const indices = events.slice(0, -1).map(({ data }) => JSON.parse(data).choices[0].index);
  expect(indices.indexOf(2)).toBeLessThan(12);
});

it('a later choice that finds no place in time ends the answer', async () => {
  await using api = await start(endless, { readmit_ms: 400 });
  const error = new MaskrouteError('queue_full', 'The queue is full.');
  // Only the first choice gets a place; the second is refused once that one runs.
  const of = () =>
    api.engine.requests.length > 1 ? { prefill_ms: 50, failure: { afterTokens: 0, error } } : undefined;
  api.engine.script = { ...endless, of };
  const { events } = parseSse(await (await api.chat({ n: 2 })).text());
  expect(events.at(-1)).toMatchObject({ event: 'error', data: expect.stringContaining('queue_full') });
  expect(api.engine.requests.length).toBeGreaterThan(2);
});

describe('clients that leave', () => {
  it.each([
    ['before the first token of a stream', { stream: true }, { ...endless, prefill_ms: 60_000 }],
    ['before a whole answer', { stream: false }, endless],
    ['in the middle of a stream', { stream: true }, endless],
    ['with several choices', { stream: true, n: 4 }, endless],
  ])('%s', async (_, fields, script) => {
    await using api = await start(script, { commit_ms: 10 });
    const leave = new AbortController();
    const response = api.chat(fields, { signal: leave.signal }).then((answer) => answer.text());
    response.catch(() => {});
    const count = 'n' in fields ? fields.n : 1;
    await eventually(() => api.engine.requests.length === count);
    await new Promise((resolve) => setTimeout(resolve, 40));
    leave.abort();
    await eventually(() => api.engine.ended.length === count);
    expect(api.engine.ended.every(({ reason }) => reason === 'cancelled')).toBe(true);
    await eventually(() => api.server.logs().includes('"outcome":"cancelled"'));
  });

  it('their tokens are counted', async () => {
    await using api = await start(endless);
    const leave = new AbortController();
    const reader = (await api.chat({}, { signal: leave.signal })).body!.getReader();
    for (let chunk = 0; chunk < 5; chunk++) await reader.read();
    leave.abort();
    await eventually(() => api.server.logs().includes('"outcome":"cancelled"'));
    const metrics = await (
      await fetch(`${api.server.url}/metrics`, { headers: { authorization: `Bearer ${BACKEND_KEY}` } })
    ).text();
    const counted = /maskroute_tokens_total\{endpoint="chat",kind="completion",[^}]*\} (\d+)/.exec(metrics);
    expect(Number(counted?.[1])).toBeGreaterThanOrEqual(4);
  });

  /** An answer without a server: a chunk is made when the test reads it, and no sooner. */
  async function unserved(path: string, fields: object) {
    const engine = scriptedEngine(says('abc'));
    const api = await apiOptions(scriptedModel(engine));
    const response = await createApp(openParts(api.options)).request(path, {
      method: 'POST',
      headers: { authorization: `Bearer ${BACKEND_KEY}`, 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'scripted', stream: true, ...fields }),
    });
    const reader = response.body!.getReader();
    const read = async () => new TextDecoder().decode((await reader.read()).value);
    return { ...api, engine, reader, read, [Symbol.asyncDispose]: api.close };
  }

  it('with a token in their hands pay for it', async () => {
    await using api = await unserved('/v1/completions', { prompt: 'Hi' });
    expect(await api.read()).toContain('"text":"a"');
    await api.reader.cancel();
    await eventually(() => api.logs().includes('"completion_tokens":1'));
  });

  it('before they read the first token leave nothing running', async () => {
    await using api = await unserved('/v1/responses', { input: 'Hi' });
    expect(await api.read()).toContain('response.created');
    await api.reader.cancel();
    await eventually(() => api.engine.ended.length === 1);
  });
});

it('figures say how long requests wait: in the line, between their steps, and right now', async () => {
  await using api = await start(says('ab'));
  const figure = async (name: string) => {
    const headers = { authorization: `Bearer ${BACKEND_KEY}` };
    const metrics = await (await fetch(`${api.server.url}/metrics`, { headers })).text();
    return Number(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, 'm').exec(metrics)?.[1]);
  };
  await (await api.chat({ n: 2 })).text();
  expect(await figure('request_queue_time_seconds_count')).toBe(2);
  expect(await figure('maskroute_request_longest_step_gap_seconds_sum')).toBe(0.008);
  expect(await figure('maskroute_longest_step_age_seconds')).toBe(0);
  expect(await figure('maskroute_longest_queue_age_seconds')).toBe(0);
  api.engine.script = { ...endless, slots: 1 };
  const leave = new AbortController();
  const busy = [1, 2].map(() => api.chat({}, { signal: leave.signal }).catch(() => {}));
  await eventually(() => api.engine.stats().requestsWaiting === 1);
  expect(await figure('maskroute_longest_step_age_seconds')).toBe(1.5);
  expect(await figure('maskroute_longest_queue_age_seconds')).toBe(2.5);
  leave.abort();
  await Promise.all(busy);
});

it('requests that share a request id do not meet in the engine', async () => {
  await using api = await start({ answer: () => [97], step_ms: 1 });
  const headers = {
    authorization: `Bearer ${BACKEND_KEY}`,
    'content-type': 'application/json',
    'x-request-id': 'same',
  };
  const answers = await Promise.all(
    [1, 2, 3].map(() => api.chat({ stream: false, n: 2, max_tokens: 5 }, { headers })),
  );
  expect(answers.map(({ status }) => status)).toEqual([200, 200, 200]);
  expect(new Set(api.engine.requests.map(({ requestId }) => requestId)).size).toBe(6);
});

describe('clients that do not read', () => {
  it('stop the engine by backpressure, and lose their request when they stall', async () => {
    const fast: Script = { ...endless, step_ms: 0 };
    await using api = await start(fast, { stall_ms: 400 });
    const body = JSON.stringify({
      model: 'scripted',
      messages: [{ role: 'user', content: 'Hi' }],
      stream: true,
    });
    const socket = connect(Number(new URL(api.server.url).port), '127.0.0.1');
    socket.on('error', () => {});
    socket.pause();
    socket.write(
      `POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${BACKEND_KEY}\r\n` +
        `content-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`,
    );
    let tokens = -1;
    await eventually(() => {
      const now = api.engine.stats().generatedTokensTotal;
      const still = now > 0 && now === tokens;
      tokens = now;
      return still;
    }, 10_000);
    expect(tokens).toBeLessThan(1_000_000);
    await eventually(() => api.engine.ended.length === 1);
    expect(api.engine.ended[0]!.reason).toBe('cancelled');
    expect(api.server.logs()).toContain('stopped reading');
    socket.destroy();
  }, 20_000);

  it('lose the connection on which they follow a job, too', async () => {
    const job = { id: 'job_1', error: 'x'.repeat(100_000) };
    let hasEnded = false;
    async function* follow(_: string, signal: AbortSignal) {
      try {
        while (!signal.aborted) {
          yield job;
          await new Promise((resolve) => setTimeout(resolve, 1));
        }
      } finally {
        hasEnded = true;
      }
    }
    const jobs = { jobs: { get: () => job, follow } } as unknown as NonNullable<HomeJobs['held']>;
    const model = scriptedModel(scriptedEngine(says('x')));
    await using server = await serveModel(model, { stall_ms: 300 }, { jobs });
    const socket = connect(Number(new URL(server.url).port), '127.0.0.1');
    socket.on('error', () => {});
    socket.pause();
    socket.write(
      `GET /v1/jobs/job_1/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${BACKEND_KEY}\r\n\r\n`,
    );
    await eventually(() => hasEnded);
    socket.resume();
    await eventually(() => socket.closed, 5_000);
  });

  it('may be slow without losing anything', async () => {
    await using api = await start(says('0123456789'.repeat(20)), { stall_ms: 500 });
    const reader = (await api.chat({ max_tokens: 300 })).body!.getReader();
    let text = '';
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      text += new TextDecoder().decode(value);
      await new Promise((resolve) => setTimeout(resolve, 3));
    }
    const { events } = parseSse(text);
    const contents = events.slice(0, -1).map(({ data }) => JSON.parse(data).choices[0].delta.content ?? '');
    expect(contents.join('')).toBe('0123456789'.repeat(20));
  });
});

describe('a stop', () => {
  it('lets running answers finish, refuses new ones, and says so', async () => {
    const mayEnd = Promise.withResolvers<void>();
    await using api = await start({ ...says('abcdefghij'), lastToken: mayEnd.promise }, { drain_ms: 10_000 });
    const running = await api.chat();
    const connection = (response: Response) => response.headers.get('connection');
    expect(connection(await fetch(`${api.server.url}/healthz`))).toBe('keep-alive');
    const closing = api.server.close();
    const ready = await fetch(`${api.server.url}/readyz`);
    expect([ready.status, connection(ready)]).toEqual([503, 'close']);
    const well = await fetch(`${api.server.url}/healthz`);
    expect([well.status, connection(well)]).toEqual([200, 'close']);
    const refused = await api.chat();
    expect([refused.status, connection(refused)]).toEqual([503, 'close']);
    expect(await refused.json()).toMatchObject({ error: { code: 'not_ready' } });
    mayEnd.resolve();
    expect(parseSse(await running.text()).events.at(-1)!.data).toBe('[DONE]');
    await closing;
    await expect(fetch(`${api.server.url}/healthz`)).rejects.toThrow();
  });

  it('ends what takes too long, with a reason', async () => {
    await using api = await start(endless, { drain_ms: 100 });
    const running = await api.chat();
    const closing = api.server.close();
    const { events } = parseSse(await running.text());
    expect(events.at(-1)).toMatchObject({ event: 'error' });
    expect(JSON.parse(events.at(-1)!.data).error.code).toBe('not_ready');
    await closing;
  });

  it('is not held up by an engine that hangs', async () => {
    await using api = await start(
      { ...endless, hangs: true },
      { drain_ms: 50, ending_ms: 100, commit_ms: 10 },
    );
    const running = await api.chat();
    running.text().catch(() => {});
    // It would wait for ever.
    await api.server.close();
  });
});

describe('what an answer cost', () => {
  const ask = async (api: Awaited<ReturnType<typeof start>>, id: string) => {
    const headers = { authorization: `Bearer ${BACKEND_KEY}` };
    const response = await fetch(`${api.server.url}/v1/answers/${id}`, { headers });
    const body = (await response.json()) as { finished?: boolean; completion_tokens?: number };
    return { status: response.status, body };
  };

  it('of a prompt that was refused as too long is what was read of it', async () => {
    await using api = await start({ ...says('x'), contextTokens: 8 });
    const fields = {
      messages: [{ role: 'user', content: 'x'.repeat(20) }],
      maskroute: { completion: 'long' },
    };
    const response = await api.chat(fields);
    expect(await response.json()).toMatchObject({ error: { code: 'context_length_exceeded' } });
    const usage = { finished: true, prompt_tokens: 21, completion_tokens: 0 };
    expect(await ask(api, 'long')).toMatchObject({ status: 200, body: usage });
  });

  it('of a client that left while its prompt was read is what was read of it', async () => {
    const engine = scriptedEngine(says('x'));
    const model = scriptedModel(engine);
    const slow: typeof model.text.encode = (_, { signal, spent }) =>
      new Promise((_, reject) => {
        spent.tokens = 5;
        signal.addEventListener('abort', () => reject(new MaskrouteError('cancelled', 'Gone.')));
      });
    await using server = await serveModel({ ...model, text: { ...model.text, encode: slow } });
    const api = { engine, server } as Awaited<ReturnType<typeof start>>;
    const leave = new AbortController();
    const body = { model: 'scripted', prompt: 'Hi', maskroute: { completion: 'left' } };
    const headers = { authorization: `Bearer ${BACKEND_KEY}`, 'content-type': 'application/json' };
    const gone = server.post('/v1/completions', body, { headers, signal: leave.signal }).catch(() => {});
    await eventually(async () => (await ask(api, 'left')).body.finished === false);
    leave.abort();
    await gone;
    await eventually(async () => (await ask(api, 'left')).body.finished === true);
    expect(await ask(api, 'left')).toMatchObject({ body: { prompt_tokens: 5, completion_tokens: 0 } });
    expect(engine.requests).toEqual([]);
  });

  it('has the tokens that were computed and not read when the client left', async () => {
    await using api = await start({ ...endless, step_ms: 10, computesAhead: true });
    const fields = { max_tokens: 400, maskroute: { completion: 'ahead' } };
    const reader = (await api.chat(fields)).body!.getReader();
    await reader.read();
    await reader.cancel();
    await eventually(async () => (await ask(api, 'ahead')).body.finished === true);
    expect(await ask(api, 'ahead')).toMatchObject({ body: { completion_tokens: 400 } });
  });

  it('is told by a server that stops, also when the last client left it', async () => {
    await using api = await start({ ...endless, step_ms: 10 }, { drain_ms: 20_000, costs_ms: 2_000 });
    const reader = (await api.chat({ maskroute: { completion: 'last' } })).body!.getReader();
    await reader.read();
    const closing = api.server.close();
    await reader.cancel();
    await new Promise((resolve) => setTimeout(resolve, 300));
    expect(await ask(api, 'last')).toMatchObject({ status: 200, body: { finished: true } });
    await closing;
    await expect(fetch(`${api.server.url}/healthz`)).rejects.toThrow();
  });

  it('is told under the name that the edge gave, also when the client left', async () => {
    await using api = await start({ ...endless, step_ms: 10 });
    const leave = new AbortController();
    const maskroute = { completion: 'abc.def', mask_set: 'x' };
    const response = await api.chat({ maskroute }, { signal: leave.signal });
    const reader = response.body!.getReader();
    const { value } = await reader.read();
    const text = new TextDecoder().decode(value);
    expect(text).toContain('"id":"chatcmpl-abc.def"');
    await reader.read();
    expect(await ask(api, 'abc.def')).toMatchObject({ status: 200, body: { finished: false } });
    leave.abort();
    await eventually(async () => (await ask(api, 'abc.def')).body.finished === true);
    const { body } = await ask(api, 'abc.def');
    expect(body).toMatchObject({ object: 'maskroute.answer', prompt_tokens: 3 });
    expect(body.completion_tokens).toBeGreaterThan(0);
    expect(await ask(api, 'nothing')).toMatchObject({ status: 404, body: { error: { code: 'not_found' } } });
  });
});
