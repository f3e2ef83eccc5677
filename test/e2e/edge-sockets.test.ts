/**
 * The edge over real sockets: the bundled worker in workerd, a client and a backend that are other processes'
 * business to it. What only sockets show: when bytes arrive, and what happens when one side hangs up.
 */
import { request as httpRequest, type IncomingMessage } from 'node:http';
import { connect } from 'node:net';
import path from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { type Edge, startEdge } from '../../gpu-backend/dev/local-edge.ts';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { dryRunSchema } from '../../shared/wire/openai.ts';
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
    // The first request of an edge takes longer, and would find all chunks there.
    await (await post('/v1/chat/completions', chat({}))).text();
    const started_ms = performance.now();
    const response = await post('/v1/chat/completions', chat({ stream: true }));
    const arrivals_ms: number[] = [];
    for await (const _chunk of response.body!) arrivals_ms.push(performance.now() - started_ms);
    expect(arrivals_ms.length).toBeGreaterThanOrEqual(3);
    expect(arrivals_ms.at(-1)! - arrivals_ms[0]!).toBeGreaterThan(1.9 * STREAM_PAUSE_ms);
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
    await vi.waitFor(async () => expect((await recorded(id))!.hungUp).toBe(true), 20_000);
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
    await vi.waitFor(async () => expect(await recorded(id)).not.toBeNull(), 20_000);
    await new Promise((resolve) => setTimeout(resolve, 300));
    expect((await recorded(id))!.hungUp).toBe(false);
    const started_ms = performance.now();
    controller.abort();
    await expect(reading).rejects.toThrow();
    await vi.waitFor(async () => expect((await recorded(id))!.hungUp).toBe(true), 20_000);
    expect(performance.now() - started_ms).toBeLessThan(10_000);
  });
});

/** What was counted of a tenant: by its usage, and by its budget. */
async function account(tenant: string) {
  const read = async (route: string) => {
    const response = await fetch(`${edge.url}/admin/v1${route}`, {
      headers: { authorization: `Bearer ${ADMIN_KEY}` },
    });
    return ((await response.json()) as { data: Record<string, number | string>[] }).data;
  };
  const [usage, budget] = await Promise.all([
    read(`/usage?tenant=${tenant}`),
    read(`/tenants/${tenant}/budget`),
  ]);
  const sum = (name: string) => usage.reduce((total, row) => total + Number(row[name]), 0);
  const used = (unit: string) => Number(budget.find((one) => one.unit === unit)?.used);
  return {
    requests: sum('requests'),
    tokens: sum('prompt_tokens') + sum('completion_tokens'),
    budgetRequests: used('requests'),
    budgetTokens: used('tokens'),
  };
}

let tenants = 0;
async function limitedTenant(): Promise<{ tenant: string; key: string }> {
  const tenant = `limited-${++tenants}`;
  await admin('/tenants', { id: tenant, name: tenant, tokens_per_day: 1_000_000, requests_per_day: 1_000 });
  return { tenant, key: (await admin('/keys', { tenant, name: tenant })).key };
}

describe('what was made for a client that hung up is counted', () => {
  /** By usage and by budget alike. */
  const counted = (tenant: string, requests: number, ids: readonly string[]) =>
    vi.waitFor(
      async () => {
        const spent = await Promise.all(ids.map(spentOn));
        const tokens = spent.reduce((sum, one) => sum + one, 0);
        expect(tokens).toBeGreaterThan(0);
        expect(await account(tenant)).toEqual({
          requests,
          tokens,
          budgetRequests: requests,
          budgetTokens: tokens,
        });
      },
      { timeout: 30_000, interval: 250 },
    );
  /** What the backend itself says that it spent; nothing of a request that never reached it. */
  const spentOn = async (id: string): Promise<number> => {
    const seen = await recorded(id);
    if (seen === null) return 0;
    const { completion } = seen.body!.maskroute as { completion: string };
    const headers = { authorization: `Bearer ${BACKEND_KEY}` };
    const answer = await (await fetch(`${backend.url}/v1/answers/${completion}`, { headers })).json();
    const { prompt_tokens, completion_tokens } = answer as Record<string, number>;
    return prompt_tokens! + completion_tokens!;
  };
  /** Asks, and leaves when `moment` comes. */
  const leave = async (
    key: string,
    id: string,
    body: object,
    moment: (response: Promise<Response>) => Promise<unknown>,
  ) => {
    const controller = new AbortController();
    const headers = { authorization: `Bearer ${key}`, 'x-request-id': id };
    const response = post('/v1/chat/completions', chat(body), headers, controller.signal);
    response.then((whole) => whole.text()).catch(() => {});
    await moment(response);
    controller.abort();
  };
  const arrival = (id: string) =>
    vi.waitFor(async () => expect(await recorded(id)).not.toBeNull(), { timeout: 5_000, interval: 5 });
  const after = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

  it.each([
    ['before the first byte', { user: 'busy' }],
    ['before the first byte of a stream', { user: 'busy', stream: true }],
    ['after comments that held the stream open', { user: 'slow-tokens', stream: true }],
    ['in the middle of a stream', { user: 'stream-forever', stream: true }],
    ['in the middle of an answer in pieces', { user: 'unsized' }],
  ])('%s', async (_, body) => {
    const { tenant, key } = await limitedTenant();
    const id = `${tenant}-leaves`;
    await leave(key, id, body, async () => {
      await arrival(id);
      await after(100);
    });
    await counted(tenant, 1, [id]);
  });

  it('at whatever moment it was', async () => {
    const { tenant, key } = await limitedTenant();
    const moments = fc.sample(
      fc.record({
        body: fc.constantFrom<object>(
          { user: 'busy' },
          { user: 'busy', stream: true },
          { user: 'slow-whole' },
          { user: 'slow-first', stream: true },
          { stream: true },
          {},
        ),
        // From before the edge has read the request to after the last byte of its answer.
        leave_ms: fc.integer({ min: 0, max: 24 }).map((step) => step ** 2),
      }),
      { numRuns: 60, seed: 1 },
    );
    const ids = moments.map((_, index) => `${tenant}-${index}`);
    await Promise.all(
      moments.map(({ body, leave_ms }, index) => leave(key, ids[index]!, body, () => after(leave_ms))),
    );
    await after(500);
    const { budgetRequests } = await account(tenant);
    expect(budgetRequests).toBeGreaterThan(10);
    await counted(tenant, budgetRequests, ids);
  }, 60_000);

  it('and nothing is reserved or counted for one that left before its request was whole', async () => {
    const { tenant, key } = await limitedTenant();
    const socket = connect(Number(new URL(edge.url).port), '127.0.0.1');
    const head = `POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ${key}\r\n`;
    socket.write(`${head}Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{"model": `);
    await after(200);
    socket.destroy();
    await leave(key, `${tenant}-leaves`, { user: 'busy' }, () => arrival(`${tenant}-leaves`));
    await counted(tenant, 1, [`${tenant}-leaves`]);
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
  await vi.waitFor(() => expect(received).toContain('HTTP/1.1 401'), 20_000);
  socket.write('GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n');
  await vi.waitFor(() => expect(received).toContain('HTTP/1.1 200'), 20_000);
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
