/** What probes are told: of an engine that works, one whose thread died, and one that is stuck. */
import { mkdtemp, rm } from 'node:fs/promises';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import type { Worker } from 'node:worker_threads';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { type GenerateRequest, PLAIN_SAMPLING } from '../../../gpu-backend/engine/engine.ts';
import { createEngine, Pulse } from '../../../gpu-backend/engine/start-engine.ts';
import { denseMask, type ModelHash } from '../../../shared/mask/mask.ts';
import { emitFromMemory, randomLlama } from '../../support/random-llama.ts';
import { eventually, serveModel, type TestServer } from './harness.ts';
import { bytesOf, scriptedEngine, scriptedModel } from './scripted-engine.ts';

const source = randomLlama({ contextTokens: 8192 });
let modelDir: string;
beforeAll(async () => {
  modelDir = await mkdtemp(join(tmpdir(), 'maskroute-liveness-'));
  await emitFromMemory(source, 'q8', modelDir, () => {});
});
afterAll(() => rm(modelDir, { recursive: true }));

/** The real engine, its thread, and what it says for the log. */
async function openEngine() {
  const errors: string[] = [];
  const thread = new Promise<Worker>((resolve) => process.once('worker', resolve));
  const engine = await createEngine({
    modelDir,
    hash: '0'.repeat(64) as ModelHash,
    config: source.config as never,
    threads: 1,
    onError: (detail) => errors.push(detail),
  });
  return { engine, thread: await thread, errors };
}

async function probes(server: TestServer): Promise<[number, number]> {
  const [live, ready] = await Promise.all([fetch(`${server.url}/healthz`), fetch(`${server.url}/readyz`)]);
  return [live.status, ready.status];
}
/** What anybody is told of a server that is down, whatever the reason: no more than the statuses say. */
const DOWN = [
  { error: { message: 'Down.', type: 'server_error', param: null, code: 'internal_error' } },
  { error: { message: 'Not ready.', type: 'server_error', param: null, code: 'not_ready' } },
];
const said = (server: TestServer) =>
  Promise.all(['/healthz', '/readyz'].map(async (path) => (await fetch(server.url + path)).json()));
const chat = (server: TestServer, more: object = {}) =>
  server.post('/v1/chat/completions', {
    model: 'scripted',
    messages: [{ role: 'user', content: 'hi' }],
    ignore_eos: true,
    max_tokens: 4,
    ...more,
  });

it('a probe in HTTP/1.0, which names no host, is answered', async () => {
  await using server = await serveModel(scriptedModel(scriptedEngine({ answer: () => bytesOf('ok') })));
  const socket = connect(Number(new URL(server.url).port), '127.0.0.1');
  socket.write('GET /healthz HTTP/1.0\r\n\r\n');
  expect(await text(socket)).toMatch(/^HTTP\/1\.1 200 /);
});

it('a request that expects what no server knows is answered as any other', async () => {
  await using server = await serveModel(scriptedModel(scriptedEngine({ answer: () => bytesOf('ok') })));
  const socket = connect(Number(new URL(server.url).port), '127.0.0.1');
  socket.write('GET /healthz HTTP/1.1\r\nHost: a\r\nExpect: wonders\r\nConnection: close\r\n\r\n');
  expect(await text(socket)).toMatch(/^HTTP\/1\.1 200 /);
});

it('an engine whose thread has died makes the process one to start again', async () => {
  const { engine, thread } = await openEngine();
  await using server = await serveModel(scriptedModel(engine));
  expect((await chat(server)).status).toBe(200);
  expect(await probes(server)).toEqual([200, 200]);
  // Between requests: a thread that is ended inside of ONNX Runtime often takes the whole process with it.
  await eventually(() => engine.stats().requestsRunning === 0);
  await thread.terminate();
  await eventually(async () => (await probes(server)).join() === '500,503');
  expect(await said(server)).toEqual(DOWN);
  expect(server.logs()).toContain('"why":"The engine has stopped."');
  expect((await chat(server)).status).toBe(500);
});

it('a request to a thread that is about to end fails, and the log has the reason', async () => {
  const { engine, thread, errors } = await openEngine();
  await using server = await serveModel(scriptedModel(engine));
  expect((await chat(server)).status).toBe(200);
  await eventually(() => engine.stats().requestsRunning === 0);
  const ended = thread.terminate();
  const request: GenerateRequest = {
    requestId: 'late',
    tenant: '',
    promptTokenIds: Int32Array.of(1, 2),
    sampling: PLAIN_SAMPLING,
    plan: { mask: denseMask(8), kv: 'preserve' },
    maxTokens: 4,
    minTokens: 0,
    stopTokenIds: [],
    logprobs: undefined,
    promptLogprobs: undefined,
  };
  const events = engine.generate(request, new AbortController().signal)[Symbol.asyncIterator]();
  await expect(events.next()).rejects.toMatchObject({ code: 'engine_failed' });
  await ended;
  expect(errors).toEqual(["The engine's thread ended with code 1."]);
});

it('an engine that works answers between its steps, however busy it is', async () => {
  const { engine } = await openEngine();
  await using server = await serveModel(scriptedModel(engine), { engineSilence_ms: 5_000 });
  const running = chat(server, { max_tokens: 8000, stream: true });
  await eventually(() => engine.stats().requestsRunning === 1);
  const first = engine.silence_ms();
  await eventually(() => engine.silence_ms() === 0);
  expect(first).toBe(0);
  expect(await probes(server)).toEqual([200, 200]);
  await (await running).body?.cancel();
  await engine.close();
});

it('an engine that gives no sign of life for too long is stuck', async () => {
  const engine = scriptedEngine({ answer: () => bytesOf('x') });
  await using server = await serveModel(scriptedModel(engine), { engineSilence_ms: 1_000 });
  engine.script = { ...engine.script, silence_ms: 999 };
  expect(await probes(server)).toEqual([200, 200]);
  engine.script = { ...engine.script, silence_ms: 1_001 };
  expect(await probes(server)).toEqual([500, 503]);
  expect(await said(server)).toEqual(DOWN);
  // Probes come all the time: the log has the reason once.
  expect(server.logs().match(/"why":"The engine does not answer."/g)).toHaveLength(1);
  engine.script = { ...engine.script, silence_ms: 0 };
  expect(await probes(server)).toEqual([200, 200]);
});

it('a server that drains is well, and not ready', async () => {
  const engine = scriptedEngine({ answer: () => bytesOf('x'), step_ms: 100 });
  await using server = await serveModel(scriptedModel(engine));
  const running = chat(server, { max_tokens: 5 });
  await eventually(() => engine.stats().requestsRunning === 1);
  const closed = server.close();
  expect(await probes(server)).toEqual([200, 503]);
  expect((await running).status).toBe(200);
  await closed;
});

it('a thread is asked once, and its silence counts from then on', () => {
  let [now_ms, asked] = [0, 0];
  const pulse = new Pulse(
    () => asked++,
    () => now_ms,
  );
  expect(pulse.silence_ms()).toBe(0);
  now_ms = 7;
  expect([pulse.silence_ms(), asked]).toEqual([7, 1]);
  pulse.answered();
  expect([pulse.silence_ms(), asked]).toEqual([0, 2]);
});
