/**
 * The edge over real sockets: the bundled worker in workerd, a client and a backend that are other processes'
 * business to it. What only sockets show: when bytes arrive, and what happens when one side hangs up.
 */
import { request as httpRequest, type IncomingMessage } from 'node:http';
import { connect } from 'node:net';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { type Edge, startEdge } from '../../gpu-backend/dev/edge.ts';
import { BACKEND_HEADERS } from '../../shared/backends.ts';
import { dryRunSchema } from '../../shared/dry-run.ts';
import { startBackend } from '../support/edge/backend-server.ts';
import { ADMIN_KEY, BACKEND_KEY, MODEL, type Recorded, STREAM_PAUSE_ms } from '../support/edge/constants.ts';
import type { RunningServer } from '../support/edge/http-server.ts';

let backend: RunningServer;
let edge: Edge;
let key: string;

beforeAll(async () => {
  backend = await startBackend();
  edge = await startEdge({
    projectFolder: path.resolve('.'),
    stateFolder: undefined,
    port: 0,
    bindings: { BACKEND_URL: backend.url, BACKEND_KEY, ADMIN_KEY },
  });
  await admin('/tenants', { id: 'sockets', name: 'sockets' });
  key = (await admin('/keys', { tenant: 'sockets', name: 'sockets' })).key;
}, 60_000);

afterAll(async () => {
  await edge.close();
  await backend.close();
});

async function admin(route: string, body: object): Promise<{ key: string }> {
  const response = await post(`/admin/v1${route}`, body, { authorization: `Bearer ${ADMIN_KEY}` });
  expect(response.status).toBe(201);
  return (await response.json()) as { key: string };
}

const post = (route: string, body: object, headers: Record<string, string> = {}, signal?: AbortSignal) =>
  fetch(edge.url + route, {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: `Bearer ${key}`, ...headers },
    body: JSON.stringify(body),
    ...(signal === undefined ? {} : { signal }),
  });

const chat = (more: object) => ({
  model: MODEL.id,
  messages: [{ role: 'user', content: 'What is 12 times 12?' }],
  ...more,
});

async function recorded(id: string): Promise<Recorded | null> {
  return (await (await fetch(`${backend.url}/recorded/${id}`)).json()) as Recorded | null;
}

describe('a stream', () => {
  it('reaches the client chunk by chunk', async () => {
    const started_ms = performance.now();
    const response = await post('/v1/chat/completions', chat({ stream: true }));
    const arrivals_ms: number[] = [];
    for await (const _chunk of response.body!) arrivals_ms.push(performance.now() - started_ms);
    expect(arrivals_ms.length).toBeGreaterThanOrEqual(3);
    expect(arrivals_ms.at(-1)! - arrivals_ms[0]!).toBeGreaterThan(2 * STREAM_PAUSE_ms);
  });

  it('is not read ahead for a client that does not read', async () => {
    // 64 MB of answer against a client that reads nothing: the backend must be held back.
    const id = 'slow-reader';
    const socket = await rawRequest(chat({ user: 'flood', stream: true }), id);
    socket.pause();
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    const { sent_bytes } = (await recorded(id))!;
    // The system's buffers of three connections hold 13 to 20 MB: they grow with the speed that they see.
    expect(sent_bytes).toBeLessThan(32 * 1024 * 1024);
    socket.destroy();
    await vi.waitFor(async () => expect((await recorded(id))!.hungUp).toBe(true), 5_000);
  });
});

/** A response whose body nobody reads yet. */
function rawRequest(body: object, id: string): Promise<IncomingMessage> {
  return new Promise((resolve, reject) => {
    const request = httpRequest(`${edge.url}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', authorization: `Bearer ${key}`, 'x-request-id': id },
    });
    request.on('response', resolve).on('error', reject).end(JSON.stringify(body));
  });
}

describe('a client that hangs up', () => {
  it.each([
    ['before the first byte', { user: 'hang' }],
    ['before the first byte of a stream', { user: 'hang', stream: true }],
    ['in the middle of a stream', { user: 'stream-forever', stream: true }],
  ])('%s: the backend learns of it', async (what, body) => {
    const id = `hang-up-${what.replaceAll(' ', '-')}`;
    const controller = new AbortController();
    const answer = post('/v1/chat/completions', chat(body), { 'x-request-id': id }, controller.signal);
    const reading = answer.then((response) => response.text());
    reading.catch(() => {});
    await vi.waitFor(async () => expect(await recorded(id)).not.toBeNull(), 5_000);
    await new Promise((resolve) => setTimeout(resolve, 300));
    expect((await recorded(id))!.hungUp).toBe(false);
    const started_ms = performance.now();
    controller.abort();
    await expect(reading).rejects.toThrow();
    await vi.waitFor(async () => expect((await recorded(id))!.hungUp).toBe(true), 5_000);
    expect(performance.now() - started_ms).toBeLessThan(1_000);
  });
});

it('leaves a backend that lets the time pass, also where that does not keep it', async () => {
  const id = 'too-late';
  const headers = { 'x-request-id': id, [BACKEND_HEADERS.deadline]: '200' };
  const response = await post('/v1/chat/completions', chat({ user: 'hang' }), headers);
  expect(response.status).toBe(504);
  await vi.waitFor(async () => expect((await recorded(id))!.hungUp).toBe(true), 10_000);
});

it('keeps the connection of a client that is refused before its body was read', async () => {
  const socket = connect(Number(new URL(edge.url).port), '127.0.0.1');
  let received = '';
  socket.setEncoding('utf8').on('data', (text) => {
    received += text;
  });
  const bytes = 500_000;
  const refused = `POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: ${bytes}\r\n\r\n`;
  socket.write(refused + ' '.repeat(bytes));
  await vi.waitFor(() => expect(received).toContain('HTTP/1.1 401'), 5_000);
  socket.write('GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n');
  await vi.waitFor(() => expect(received).toContain('HTTP/1.1 200'), 5_000);
  socket.destroy();
});

it('lets a client that sends 10 MB read the refusal', async () => {
  const response = await post('/v1/chat/completions', chat({ filler: 'x'.repeat(10 * 1024 * 1024) }));
  expect(response.status).toBe(413);
  expect(await response.json()).toMatchObject({ error: { code: 'body_too_large' } });
  expect((await post('/v1/chat/completions', chat({}))).status).toBe(200);
});

it('embeds with the table that is shipped', async () => {
  const ready = await fetch(`${edge.url}/readyz`);
  expect(await ready.json()).toMatchObject({ status: 'ready' });
  const response = await post('/v1/route', chat({}));
  const decision = dryRunSchema.parse(await response.json());
  expect(decision.maskroute).toMatchObject({ fallback: 'no_mask_set', region: 'local' });
});
