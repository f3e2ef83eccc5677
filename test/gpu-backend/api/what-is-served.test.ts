/** What a backend says of its load, and that it works for nobody whose time is over. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BACKEND_HEADERS, loadReportSchema, parseLoad } from '../../../shared/wire/backend-load.ts';
import { BACKEND_KEY, eventually, parseSse, serveModel, type TestServer } from './harness.ts';
import { bytesOf, type ScriptedEngine, scriptedEngine, scriptedModel } from './scripted-engine.ts';

const CHAT = '/v1/chat/completions';
const body = (more: object = {}) => ({
  model: 'scripted',
  messages: [{ role: 'user', content: 'hi' }],
  max_tokens: 3,
  ...more,
});

let engine: ScriptedEngine;
let server: TestServer;
const script = { answer: () => bytesOf('abc') };
beforeAll(async () => {
  engine = scriptedEngine(script);
  server = await serveModel(scriptedModel(engine), { commit_ms: 50 });
});
afterAll(() => server[Symbol.asyncDispose]());

const load = async () => {
  const response = await fetch(`${server.url}/v1/load`, {
    headers: { authorization: `Bearer ${BACKEND_KEY}` },
  });
  return loadReportSchema.parse(await response.json());
};
const within = (limit: string) => ({
  headers: {
    authorization: `Bearer ${BACKEND_KEY}`,
    'content-type': 'application/json',
    [BACKEND_HEADERS.deadline]: limit,
  },
});

describe('the load', () => {
  it('is for callers with a key only', async () => {
    expect((await fetch(`${server.url}/v1/load`)).status).toBe(401);
  });

  it('counts what runs', async () => {
    engine.script = { ...script, step_ms: 200 };
    const answer = server.post(CHAT, body());
    await eventually(async () => (await load()).running === 1);
    expect(await load()).toMatchObject({ model: 'scripted', waiting: 0, capacity: 16, draining: false });
    await (await answer).text();
    engine.script = script;
  });

  it('is in a header of answers and of refusals', async () => {
    for (const request of [body(), body({ model: 'another' }), {}]) {
      const response = await server.post(CHAT, request);
      await response.text();
      expect(parseLoad(response.headers.get(BACKEND_HEADERS.load))).toMatchObject({ capacity: 16 });
    }
  });
});

describe('a deadline', () => {
  it('that passes before the answer ends the work with 504', async () => {
    engine.script = { ...script, step_ms: 600_000 };
    const response = await server.post(CHAT, body(), within('100'));
    expect(response.status).toBe(504);
    expect(response.headers.get('x-should-retry')).toBe('false');
    expect(await response.json()).toMatchObject({ error: { code: 'deadline_exceeded' } });
    await eventually(async () => engine.stats().requestsRunning === 0);
  });

  it('that passes before the first token of a stream is an error event', async () => {
    engine.script = { ...script, prefill_ms: 5000 };
    const response = await server.post(CHAT, body({ stream: true }), within('200'));
    const { events } = parseSse(await response.text());
    expect(events.at(-1)).toMatchObject({ event: 'error' });
    expect(events.at(-1)!.data).toContain('deadline_exceeded');
  });

  it('says nothing once a stream has begun', async () => {
    engine.script = { ...script, step_ms: 100 };
    const response = await server.post(CHAT, body({ stream: true }), within('250'));
    expect(await response.text()).toContain('[DONE]');
  });

  it('counts from the arrival of the request, not of its whole body', async () => {
    engine.script = { ...script, step_ms: 50 };
    const bytes = new TextEncoder().encode(JSON.stringify(body()));
    const slow = new ReadableStream({
      async start(controller) {
        controller.enqueue(bytes.subarray(0, 10));
        await new Promise((resolve) => setTimeout(resolve, 300));
        controller.enqueue(bytes.subarray(10));
        controller.close();
      },
    });
    const sent = { ...within('200'), body: slow, duplex: 'half' } as RequestInit;
    const response = await server.post(CHAT, '', sent);
    expect(response.status).toBe(504);
  });

  it('is a number of milliseconds', async () => {
    engine.script = script;
    for (const bad of ['soon', '-5', '0', '1.5']) {
      expect((await server.post(CHAT, body(), within(bad))).status).toBe(400);
    }
    expect((await server.post(CHAT, body(), within('9999999999'))).status).toBe(200);
  });
});
