/** What is told of a request when it is over, however it ended: one event, with the backend's own counts. */
import { describe, expect, it, vi } from 'vitest';
import {
  type EdgeMessage,
  type RequestEvent,
  requestEventSchema,
} from '../../../shared/admin/requests-wire.ts';
import { BACKEND_HEADERS } from '../../../shared/wire/backend-load.ts';
import { HEADERS, UNREAD_MAX_ms } from '../../../shared/wire/protocol.ts';
import { createEvents } from '../../../workers/counting/events.ts';
import type { Env } from '../../../workers/env.ts';
import { tokenBounds } from '../../../workers/requests/admission.ts';
import { AnswerText, figuresIn, keepTexts, Tail } from '../../../workers/requests/read-answer.ts';
import { MODEL, STREAM_PAUSE_ms } from '../../support/edge/constants.ts';
import { CHAT, call, chat, freshIsolate, goLive, newTenant, recorded, say, soon } from '../support/edge.ts';
import { budgetOf, limitedTenant } from '../support/limits.ts';

/** The queue, seen from the front: what is sent is kept, after as many failures as wanted. */
function queue(failures = 0) {
  const sent: RequestEvent[] = [];
  const tries = { count: 0 };
  const EVENTS = {
    sendBatch: async (messages: { body: EdgeMessage }[]) => {
      if (++tries.count <= failures) throw new Error('the queue is down');
      // Some requests are compared with the dense model, too, by the draw of their ids.
      const events = messages.flatMap(({ body }) => [body].flat()).filter(({ kind }) => kind === 'request');
      sent.push(...events.map((event) => requestEventSchema.parse(event)));
    },
  } as unknown as Env['EVENTS'];
  const event = async (): Promise<RequestEvent> => {
    await soon(() => expect(sent.length).toBeGreaterThan(0));
    return sent[0]!;
  };
  return { EVENTS, sent, tries, event };
}

async function someEvent(): Promise<RequestEvent> {
  const { key } = await newTenant();
  const { EVENTS, event } = queue();
  await (await chat(key, say('north'), freshIsolate({ EVENTS }))).text();
  return await event();
}

describe('the event', () => {
  it('of a stream says what was decided, what it cost and how long it took', async () => {
    const { tenant, key, keyId } = await newTenant();
    const { set, version } = await goLive('compass', tenant);
    const { EVENTS, event } = queue();
    const before = Date.now();
    const response = await chat(key, { ...say('east of here'), stream: true }, freshIsolate({ EVENTS }));
    const text = await response.text();
    const told = await event();
    expect(told).toMatchObject({
      tenant,
      key_id: keyId,
      endpoint: 'chat',
      model: MODEL.id,
      stream: true,
      status: 200,
      mask: set.clusters[1]!.mask,
      mask_set: 'compass',
      version,
      cluster: 1,
      experiment: 'none',
      error_code: null,
      fallback: null,
      counted: true,
      prompt_tokens: 3,
      completion_tokens: 3,
      tpot_ms: 15,
    });
    expect(told.sparsity).toBeCloseTo(1 / 6);
    expect(text).toContain(`"id":"chatcmpl-${told.id}.`);
    expect(told.day).toBe(new Date(told.created_at_ms).toISOString().slice(0, 10));
    expect(told.created_at_ms).toBeGreaterThanOrEqual(before);
    expect(told.ttft_ms!).toBeLessThan(told.total_ms - 200);
    expect(told.backend).not.toBeNull();
    expect(told.backend).toBe(response.headers.get('x-maskroute-backend'));
  });

  it.each([
    ['chat/completions', say('north')],
    ['responses', { input: 'north' }],
  ])(
    'of a stream of %s has the time of its first token, however early the answer begins',
    async (path, asked) => {
      const { key } = await newTenant();
      const { EVENTS, event } = queue();
      const body = { model: MODEL.id, ...asked, user: 'slow-tokens', stream: true };
      const response = await call('POST', `/v1/${path}`, { key, body }, freshIsolate({ EVENTS }));
      expect(await response.text()).toContain('completion_tokens":3');
      const { ttft_ms, total_ms } = await event();
      // The backend takes that long for its first token.
      expect(ttft_ms!).toBeGreaterThan(7 * STREAM_PAUSE_ms);
      expect(ttft_ms!).toBeLessThan(total_ms);
    },
  );

  it('of a whole answer has the times that the backend says', async () => {
    const { key } = await newTenant();
    const { EVENTS, event } = queue();
    const body = { model: `${MODEL.id}:dense`, prompt: 'a b c', max_tokens: 5 };
    const isolate = freshIsolate({ EVENTS });
    await (await call('POST', '/v1/completions', { key, body }, isolate)).text();
    expect(await event()).toMatchObject({
      endpoint: 'completion',
      model: MODEL.id,
      mask: 'dense',
      fallback: 'requested',
      stream: false,
      prompt_tokens: 3,
      completion_tokens: 3,
      ttft_ms: 3,
      tpot_ms: 15,
    });
  });

  it('of several prompts has the time of a token after the first one of each', async () => {
    const { key } = await newTenant();
    const { EVENTS, event } = queue();
    const body = { model: MODEL.id, prompt: ['a', 'b', 'c', 'd'], n: 2, max_tokens: 5 };
    await (await call('POST', '/v1/completions', { key, body }, freshIsolate({ EVENTS }))).text();
    // Eight answers of three tokens: 30 ms each, for two tokens.
    expect(await event()).toMatchObject({ completion_tokens: 24, tpot_ms: 15 });
  });

  it.each([
    ['queue-full', false, { status: 429, error_code: 'queue_full', counted: true, completion_tokens: 0 }],
    ['die', false, { status: 503, error_code: 'backend_unreachable', counted: true, completion_tokens: 0 }],
    ['html', false, { status: 502, error_code: 'backend_error' }],
    ['empty', false, { status: 502, error_code: 'backend_error' }],
    ['stall-error', false, { status: 502, error_code: 'backend_error' }],
    ['half-whole', false, { status: 502, error_code: 'backend_error', counted: true, completion_tokens: 3 }],
    ['unsized', false, { status: 200, error_code: null, counted: true, completion_tokens: 3, ttft_ms: 3 }],
    [
      'die-mid-stream',
      true,
      { status: 200, error_code: 'backend_error', completion_tokens: 2, counted: true },
    ],
    [
      'stall-mid-stream',
      true,
      { status: 200, error_code: 'backend_error', completion_tokens: 2, counted: true },
    ],
    ['stall-whole', false, { status: 502, error_code: 'backend_error', completion_tokens: 3, counted: true }],
  ])('of a request that met %s says so', async (user, stream, expected) => {
    const { key } = await newTenant();
    const { EVENTS, sent, event } = queue();
    const isolate = freshIsolate({ EVENTS, BACKEND_STALL_MS: '500' });
    const response = await chat(key, { ...say('north'), user, stream }, isolate);
    await response.text().catch(() => {});
    expect(await event()).toMatchObject(expected);
    expect(sent).toHaveLength(1);
    const isNobodys = ['die', 'html', 'empty', 'stall-error'].includes(user);
    expect(sent[0]!.backend).toBe(isNobodys ? null : 'default');
  });

  it.each([
    ['die-mid-stream', 499, 'cancelled', /it waited for more than 30 s to be read/],
    // Silence while the client reads is the backend's doing.
    ['stall-mid-stream', 200, 'backend_error', /broke off in the middle/],
  ])(
    'of an answer that was left unread for long says whose doing its end is: %s',
    async (user, status, code, why) => {
      const { key } = await newTenant();
      const { EVENTS, event } = queue();
      const body = { ...say('north'), user, stream: true };
      const response = await chat(key, body, freshIsolate({ EVENTS, BACKEND_STALL_MS: '500' }));
      const reader = response.body!.getReader();
      let text = new TextDecoder().decode((await reader.read()).value);
      vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + UNREAD_MAX_ms });
      const clock = setInterval(() => vi.setSystemTime(Date.now() + 50), 50);
      try {
        for (;;) {
          const { done, value } = await reader.read();
          if (done) break;
          text += new TextDecoder().decode(value);
        }
        expect(text).toMatch(/event: error\ndata: /);
        expect(text).toMatch(why);
        expect(await event()).toMatchObject({ status, error_code: code, completion_tokens: 2 });
      } finally {
        clearInterval(clock);
        vi.useRealTimers();
      }
    },
  );

  it('of an answer during which the clock was set back is counted all the same', async () => {
    const { key } = await newTenant();
    const { EVENTS, event } = queue();
    const response = await chat(key, { ...say('north'), stream: true }, freshIsolate({ EVENTS }));
    try {
      vi.useFakeTimers({ toFake: ['Date'], now: Date.now() - 3_600_000 });
      await response.text();
      expect(await event()).toMatchObject({ status: 200, completion_tokens: 3, total_ms: 0 });
    } finally {
      vi.useRealTimers();
    }
  });

  it.each([true, false])('of a client that left has what was made for it (stream: %s)', async (stream) => {
    const { key } = await newTenant();
    const { EVENTS, sent, event } = queue();
    const leave = new AbortController();
    const id = `left-${stream}`;
    const asked = {
      key,
      headers: { [HEADERS.requestId]: id },
      body: { ...CHAT, ...say('a b'), user: stream ? 'stream-forever' : 'hang', stream },
      signal: leave.signal,
    };
    const answering = call('POST', '/v1/chat/completions', asked, freshIsolate({ EVENTS }));
    if (stream) {
      const reader = (await answering).body!.getReader();
      await reader.read();
      leave.abort();
      await reader.cancel().catch(() => {});
    } else {
      await soon(async () => expect(await recorded(id)).not.toBeNull());
      setTimeout(() => leave.abort(), 100);
      expect((await answering).status).toBe(499);
    }
    const told = await event();
    expect(told).toMatchObject({ status: 499, error_code: 'cancelled', counted: true, prompt_tokens: 2 });
    expect(told.completion_tokens > 0).toBe(stream);
    expect(sent).toHaveLength(1);
  });

  it('of a client that left while its text was embedded blames no encoder, nor does the log', async () => {
    const { tenant, key } = await newTenant();
    await goLive('left-while-embedded', tenant);
    const { EVENTS, event } = queue();
    const leave = new AbortController();
    const logged = vi.spyOn(console, 'warn').mockImplementation(() => {});
    const AI: NonNullable<Env['AI']> = {
      run: (_model, _inputs, options) =>
        new Promise((_resolve, reject) => {
          const signal = options!.signal as AbortSignal;
          signal.addEventListener('abort', () => reject(signal.reason), { once: true });
          leave.abort();
        }),
    };
    const isolate = freshIsolate({ EVENTS, AI, ENCODER: 'workers-ai', EMBED_TIMEOUT_MS: '5000' });
    const asked = { key, body: { ...CHAT, ...say('north') }, signal: leave.signal };
    expect((await call('POST', '/v1/chat/completions', asked, isolate)).status).toBe(499);
    expect(await event()).toMatchObject({
      status: 499,
      error_code: 'cancelled',
      fallback: null,
      counted: true,
    });
    const lines = logged.mock.calls.map(([line]) => String(line));
    logged.mockRestore();
    expect(lines.filter((line) => line.includes('embedding_failed'))).toEqual([]);
  });

  it('of a client that left a Responses stream has what was made, not what the client wrote into a schema', async () => {
    const { key } = await newTenant();
    const { EVENTS, event } = queue();
    const isolate = freshIsolate({ EVENTS });
    const leave = new AbortController();
    const figures = { maskroute: { prompt_tokens: 0, completion_tokens: 0 } };
    const parameters = { type: 'object', properties: {}, default: figures };
    const tools = [{ type: 'function', name: 'f', parameters }];
    const body = {
      model: MODEL.id,
      input: 'a b',
      user: 'stream-forever',
      stream: true,
      tools,
      tool_choice: 'none',
    };
    const response = await call('POST', '/v1/responses', { key, body }, (request) =>
      isolate(new Request(request, { signal: leave.signal })),
    );
    const reader = response.body!.getReader();
    const begun = new TextDecoder().decode((await reader.read()).value);
    expect(begun).toContain(JSON.stringify(figures));
    leave.abort();
    await reader.cancel().catch(() => {});
    const told = await event();
    expect(told).toMatchObject({ status: 499, counted: true });
    expect(told.prompt_tokens).toBeGreaterThan(0);
  });

  it.each([
    ['busy', false, 500, { status: 499, error_code: 'deadline_exceeded' }],
    ['busy', true, 500, { status: 499, error_code: 'deadline_exceeded' }],
    ['deadline', false, 5_000, { status: 499, error_code: 'deadline_exceeded' }],
    ['deadline-mid-stream', true, 5_000, { status: 499, error_code: 'deadline_exceeded' }],
    ['busy', false, undefined, { status: 504, error_code: 'deadline_exceeded' }],
    ['deadline', false, undefined, { status: 504, error_code: 'deadline_exceeded' }],
    ['sick-late', false, undefined, { status: 500, error_code: 'engine_failed' }],
    ['slow-schema', false, undefined, { status: 400, error_code: 'invalid_schema' }],
  ])(
    'of one that met %s (stream: %s, deadline: %s) has what was made, and whose doing it is',
    async (...met) => {
      const [user, stream, deadline_ms, expected] = met;
      const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
      const { EVENTS, event } = queue();
      // What could become the stop text is held back: a stream has nothing to show, though tokens were made.
      const stop = user === 'busy' ? ['t0t1t2t9'] : [];
      const body = { ...CHAT, ...say('a b'), max_tokens: 10, user, stream, stop };
      const headers = deadline_ms === undefined ? {} : { [BACKEND_HEADERS.deadline]: String(deadline_ms) };
      const isolate = freshIsolate({ EVENTS, BACKEND_TIMEOUT_MS: deadline_ms === undefined ? '200' : '' });
      await (await call('POST', '/v1/chat/completions', { key, body, headers }, isolate)).text();
      expect(await event()).toMatchObject({
        ...expected,
        counted: true,
        prompt_tokens: 2,
        completion_tokens: 3,
      });
      await soon(async () => expect((await budgetOf(tenant))['tokens/day']).toBe(5));
    },
  );

  it('of a prompt that was read and found too long has what reading it cost, and the budget, too', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    const { EVENTS, event } = queue();
    const body = { ...say('a b'), max_tokens: 10, user: 'too-long' };
    await (await chat(key, body, freshIsolate({ EVENTS }))).text();
    expect(await event()).toMatchObject({
      status: 400,
      error_code: 'context_length_exceeded',
      counted: true,
      prompt_tokens: 2,
      completion_tokens: 0,
    });
    await soon(async () => expect((await budgetOf(tenant))['tokens/day']).toBe(2));
  });

  it.each([
    [true, { status: 200, error_code: 'queue_timeout' }],
    [false, { status: 503, error_code: 'queue_timeout' }],
  ])('of a request that waited in vain in the queue has no tokens (stream: %s)', async (stream, expected) => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    const { EVENTS, event } = queue();
    const body = { ...say('a b'), max_tokens: 10, user: 'waits-too-long', stream };
    await (await chat(key, body, freshIsolate({ EVENTS }))).text();
    expect(await event()).toMatchObject({
      ...expected,
      counted: true,
      prompt_tokens: 0,
      completion_tokens: 0,
    });
    await soon(async () => expect((await budgetOf(tenant))['tokens/day']).toBe(0));
  });

  it.each([
    ['vanish-mid-stream', 2, 2],
    ['vanish-after-many', 200, 400],
  ])('of one that met %s has the tokens that were seen', async (user, least, most) => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    const { EVENTS, event } = queue();
    const body = { ...say('north'), max_tokens: 500, user, stream: true };
    await (await chat(key, body, freshIsolate({ EVENTS }))).text();
    const { completion_tokens, ...told } = await event();
    // The prompt weighs what was reserved for it: usage and the budget say the same.
    expect(told).toMatchObject({ error_code: 'backend_error', counted: false, prompt_tokens: 45 });
    expect(completion_tokens).toBeGreaterThanOrEqual(least);
    expect(completion_tokens).toBeLessThanOrEqual(most);
    await soon(async () => expect((await budgetOf(tenant))['tokens/day']).toBe(45 + completion_tokens));
  });

  it.each([
    ['a model', 'me', { model: 'made-up' }, { model: 'unknown' }],
    ['a model of a backend that is gone', 'die', { model: 'made-up' }, { model: 'unknown' }],
    ['a mask by id', 'masks-unknown', { mask: `m_${'0'.repeat(24)}` }, { mask: 'custom' }],
    ['layers', 'too-long', { mask: { skipFfn: [1, 3] } }, { mask: 'custom' }],
  ])('of one that failed repeats nothing that its client made up: %s', async (...made) => {
    const [, user, body, expected] = made;
    const { key } = await newTenant();
    const { EVENTS, event } = queue();
    await (await chat(key, { ...say('north'), user, ...body }, freshIsolate({ EVENTS }))).text();
    expect(await event()).toMatchObject(expected);
  });

  it('is offered again when the queue is down, and the answer waits for none of it', async () => {
    const { key } = await newTenant();
    const { EVENTS, tries, event } = queue(2);
    await (await chat(key, say('north'), freshIsolate({ EVENTS }))).text();
    expect(tries.count).toBeLessThan(3);
    await event();
    expect(tries.count).toBe(3);
  });

  it('goes to the queue with those of other requests at the same time', async () => {
    const { key } = await newTenant();
    const { EVENTS, sent, tries } = queue();
    const isolate = freshIsolate({ EVENTS });
    await Promise.all(
      Array.from({ length: 30 }, async () => (await chat(key, say('north'), isolate)).text()),
    );
    // On a busy machine another request may send what it takes for lost: it counts once.
    await soon(() => expect(new Set(sent.map(({ id }) => id)).size).toBe(30));
    expect(tries.count).toBeLessThan(15);
  });

  it('goes with at most a hundred at a time', async () => {
    const told = await someEvent();
    const { EVENTS, sent, tries } = queue();
    const events = createEvents(EVENTS, undefined);
    const all = Array.from({ length: 150 }, (_, i) => i.toString(16).padStart(20, '0'));
    await Promise.all(all.map((id) => events.send({ ...told, id })));
    expect(sent.map(({ id }) => id)).toEqual(all);
    expect(tries.count).toBe(2);
  });

  /** A request that is gone before it sends: its timer never fires. */
  const tornDown = (send: () => Promise<void>): void => {
    const timer = vi.spyOn(globalThis, 'setTimeout').mockImplementationOnce(() => 0 as never);
    void send();
    timer.mockRestore();
  };
  const ids = (...digits: string[]) => digits.map((digit) => digit.repeat(20));

  it('is sent by another request of the batch when the one that collects was torn down', async () => {
    const told = await someEvent();
    const { EVENTS, sent } = queue();
    const events = createEvents(EVENTS, undefined);
    const [first, second] = ids('0', '1');
    tornDown(() => events.send({ ...told, id: first! }));
    await events.send({ ...told, id: second! });
    expect(sent.map(({ id }) => id)).toEqual([first, second]);
  });

  it('is sent by the next request when all that stayed for its batch were torn down', async () => {
    const told = await someEvent();
    const { EVENTS, sent } = queue();
    const events = createEvents(EVENTS, undefined);
    const [first, second, third, late, last] = ids('0', '1', '2', '3', '4');
    for (const id of [first, second, third]) tornDown(() => events.send({ ...told, id: id! }));
    // Enough stay for the batch, as far as this one knows.
    await events.send({ ...told, id: late! });
    expect(sent).toEqual([]);
    const clock = vi.spyOn(Date, 'now').mockReturnValue(Date.now() + 60_000);
    await events.send({ ...told, id: last! });
    clock.mockRestore();
    expect(sent.map(({ id }) => id)).toEqual([first, second, third, late, last]);
  });

  it('is not made for a request that never began', async () => {
    const { key } = await limitedTenant({ requests_per_day: 1, models: [MODEL.id] });
    const { EVENTS, sent } = queue();
    const isolate = freshIsolate({ EVENTS });
    await (await chat(key, {}, isolate)).text();
    for (const body of [{}, { model: 'other' }, { messages: [] }])
      await (await chat(key, body, isolate)).text();
    await soon(() => expect(sent).toHaveLength(1));
    await new Promise((resolve) => setTimeout(resolve, 50));
    expect(sent).toHaveLength(1);
  });
});

describe('what the edge reads off an answer', () => {
  it('is never what a model wrote', () => {
    const content = JSON.stringify('"prompt_tokens":9,"completion_tokens":9,"usage":{"prompt_tokens":9}');
    const honest = '"maskroute":{"decode_ms":4.5,"prompt_tokens":1,"completion_tokens":2}';
    expect(figuresIn(`{"usage":{},${honest},"choices":[{"text":${content}}]}`)).toEqual({
      prompt_tokens: 1,
      completion_tokens: 2,
      decode_ms: 4.5,
      queue_ms: null,
      prefill_ms: null,
    });
    expect(figuresIn(`{"text":${content}}`)).toBeNull();
    expect(figuresIn('"prompt_tokens":-1,"completion_tokens":2')).toBeNull();
  });

  it('is not what a client wrote into a request that the answer repeats', () => {
    const figures = { prompt_tokens: 3, completion_tokens: 7 };
    const parameters = { default: { maskroute: { prompt_tokens: 0, completion_tokens: 0 } } };
    const event = (type: string, response: object) =>
      `event: ${type}\ndata: ${JSON.stringify({ type, response: { tools: [{ parameters }], ...response } })}\n\n`;
    const begun = event('response.created', { metadata: {} });
    const ended = event('response.completed', { maskroute: { mask: 'dense', ...figures } });
    const failed = `event: error\ndata: ${JSON.stringify({ code: 'x', maskroute: figures })}\n\n`;
    const heard = (...pieces: string[]) => {
      const tail = new Tail();
      for (const piece of pieces) tail.hear(new TextEncoder().encode(piece));
      return tail.heard({ isResponse: true, isCut: true }).figures;
    };
    for (let end = 0; end <= begun.length; end++) expect(heard(begun.slice(0, end))).toBeNull();
    expect(heard(begun, ended.slice(0, -1))).toBeNull();
    expect(heard(begun, ended)).toMatchObject(figures);
    expect(heard(begun, failed)).toMatchObject(figures);
  });

  it.each([
    ['is cut', true],
    ['ends without figures', false],
  ])('is what passed of an answer that %s: its text, and what it calls, each piece once', (_, isCut) => {
    const passed = (isResponse: boolean, ...data: object[]) => {
      const tail = new Tail();
      for (const one of data) tail.hear(new TextEncoder().encode(`data: ${JSON.stringify(one)}\n\n`));
      return tail.heard({ isResponse, isCut }).passed;
    };
    const called = (part: object) => ({
      choices: [{ delta: { tool_calls: [{ index: 0, function: part }] } }],
    });
    const pieces = ['{"a', '": 1', '}'].map((part) => called({ arguments: part }));
    const calls = [called({ name: 'f', arguments: '' }), ...pieces];
    expect(passed(false, { choices: [{ delta: { content: 'I' } }] }, ...calls)).toEqual({
      texts: 4,
      others: 0,
    });
    const said = [
      { type: 'response.output_text.delta', delta: 'I' },
      { type: 'response.output_text.done', text: 'I' },
      { type: 'response.output_item.done', item: { content: [{ type: 'output_text', text: 'I' }] } },
      { type: 'response.function_call_arguments.delta', delta: '{}' },
      { type: 'response.function_call_arguments.done', arguments: '{}' },
    ];
    expect(passed(true, ...said)).toEqual({ texts: 2, others: 0 });
  });

  it('is no more than passed of a long Responses stream, which begins with events of no token', () => {
    const tail = new Tail();
    const hear = (one: object) => tail.hear(new TextEncoder().encode(`data: ${JSON.stringify(one)}\n\n`));
    const before = ['created', 'in_progress', 'output_item.added', 'content_part.added'];
    for (const name of before) hear({ type: `response.${name}` });
    const tokens = 1000;
    for (let i = 0; i < tokens; i++) hear({ type: 'response.output_text.delta', delta: `t${i}` });
    const { texts, others } = tail.heard({ isResponse: true, isCut: true }).passed;
    // Two events of its choice may have no token.
    expect(texts + others - 2).toBe(tokens);
  });

  it('holds no chunk of an answer, which takes 4 kB of the isolate however short it is', () => {
    const [tail, text] = [new Tail(), new AnswerText()];
    const chunk = new Uint8Array(4096);
    const words = ['Grüße', ', ', 'north ', '🙂'];
    for (const content of words) {
      const event = `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content } }] })}\n\n`;
      const { written } = new TextEncoder().encodeInto(event, chunk);
      // In the middle of an event, and of a character.
      for (const piece of [chunk.subarray(0, written - 14), chunk.subarray(written - 14, written)]) {
        tail.hear(piece);
        text.add(piece);
      }
      chunk.fill(0);
    }
    expect(tail.heard({ isResponse: false, isCut: true }).passed.texts).toBe(words.length);
    expect(text.end()).toBe(words.join(''));
  });

  it('is no text where it has no first choice, and its prompt is kept', async () => {
    const answers: string[] = [];
    const values = (row: { answer: string }) => ({
      onConflictDoNothing: async () => answers.push(row.answer),
    });
    const account = {
      event: '0'.repeat(20),
      caller: { tenant: 'a', policy: { textsKept_days: 1 } },
      routable: { kind: 'chat', body: CHAT },
    };
    for (const wire of ['{"choices":[null]}', 'data: {"choices":[null]}\n\n', 'null']) {
      const answer = new AnswerText();
      answer.add(new TextEncoder().encode(wire));
      await keepTexts({ insert: () => ({ values }) } as never, account as never, answer);
    }
    expect(answers).toEqual(['', '', '']);
  });
});

describe('the bound of a request', () => {
  const bound = (body: object, context = 1000) =>
    tokenBounds({ kind: 'chat', body: { ...CHAT, ...body } } as Parameters<typeof tokenBounds>[0], context);

  it('counts tools, what was called, and results', () => {
    const wide = (body: object) => bound({ ...body, max_tokens: 5 }, 100_000).prompt_tokens;
    const tool = { type: 'function', function: { name: 'f', description: 'd'.repeat(1000) } };
    expect(wide({ ...say('x'), tools: [tool] })).toBeGreaterThan(wide(say('x')) + 1000);
    expect(wide({ ...say('x'), tools: [tool], tool_choice: 'none' })).toBe(wide(say('x')));
    const call = { id: 'a', type: 'function', function: { name: 'f', arguments: 'y'.repeat(500) } };
    expect(wide({ messages: [{ role: 'assistant', tool_calls: [call] }] })).toBeGreaterThan(500);
  });

  it('leaves room for the least answer that the client takes, where that is longer than the least of any', () => {
    const { prompt_tokens } = bound(say('x'));
    expect(bound({ ...say('x'), n: 2, min_tokens: 50 }).least_tokens).toBe(prompt_tokens + 2 * 50);
    expect(bound({ ...say('x'), min_tokens: 5 }).least_tokens).toBe(prompt_tokens + 16);
    expect(bound({ ...say('x'), min_tokens: 5000 }).least_tokens).toBe(prompt_tokens + 1000);
  });

  it('is the bytes of the prompt and the longest answer, and never more than the context', () => {
    expect(bound({ ...say('x'), max_tokens: 5 })).toMatchObject({
      prompt_tokens: 41,
      wanted_tokens: 46,
      least_tokens: 46,
    });
    expect(bound({ ...say('é€😀'), max_tokens: 5 }).prompt_tokens).toBeGreaterThanOrEqual(40 + 2 + 3 + 4);
    expect(bound({ ...say('x'.repeat(5000)), max_tokens: 5000 })).toMatchObject({
      prompt_tokens: 1000,
      wanted_tokens: 2000,
    });
    expect(bound({ ...say('x'), n: 3 })).toMatchObject({
      wanted_tokens: 41 + 3000,
      least_tokens: 41 + 48,
      choices: 3,
    });
  });
});
