/**
 * Many requests at a time through the worker in workerd, two real servers, and a balancer of connections between them, as a
 * cluster's is. A backend is replaced at its address meanwhile: what is under way ends as it began, and no client hears of
 * the change.
 */
import { once } from 'node:events';
import { type AddressInfo, connect, createServer } from 'node:net';
import path from 'node:path';
import { afterAll, beforeAll, expect, it, vi } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { ensureApiKey } from '../../../gpu-backend/dev/seed.ts';
import { createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { BACKEND_KEY, parseSse, serveModel, type TestServer } from '../api/harness.ts';
import { bytesOf, scriptedEngine, scriptedModel } from '../api/scripted-engine.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const LONG_TOKENS = 60;

let before: TestServer;
let after: TestServer;
let edge: Edge;
let balancer: ReturnType<typeof createServer>;
/** Where new connections go; those that are there stay where they are. */
let target: TestServer;
beforeAll(async () => {
  const model = () => scriptedModel(scriptedEngine({ answer: () => bytesOf('a'), step_ms: 30 }));
  [before, after] = await Promise.all(
    [1, 2].map(() => serveModel(model(), { drain_ms: 20_000 }, { audience: undefined })),
  );
  target = before;
  balancer = createServer((client) => {
    const server = connect(Number(new URL(target.url).port), '127.0.0.1');
    client.pipe(server).pipe(client);
    for (const socket of [client, server]) socket.on('error', () => socket.destroy());
  }).listen(0, '127.0.0.1');
  await once(balancer, 'listening');
  edge = await startEdge({
    projectFolder: path.resolve('.'),
    stateFolder: undefined,
    port: 0,
    bindings: {
      BACKEND_URL: `http://127.0.0.1:${(balancer.address() as AddressInfo).port}`,
      BACKEND_KEY,
      ADMIN_KEY,
    },
  });
}, 60_000);
afterAll(async () => {
  await edge?.close();
  balancer?.close();
  await before?.[Symbol.asyncDispose]();
  await after?.[Symbol.asyncDispose]();
});

const keyOf = () => ensureApiKey(createAdminClient(edge.url, ADMIN_KEY), undefined);
const chatOf =
  (key: string, path = 'chat/completions') =>
  (more: object) =>
    fetch(`${edge.url}/v1/${path}`, {
      method: 'POST',
      headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'scripted', messages: [{ role: 'user', content: 'go' }], ...more }),
    });

it('answers no request out of another that is over', async () => {
  // A dry run is over before what an isolate knows was read again behind it.
  const dryRun = chatOf(await keyOf(), 'route');
  const said = vi.spyOn(console, 'error').mockImplementation(() => {});
  const end_ms = Date.now() + 3_000;
  const client = async () => {
    while (Date.now() < end_ms) expect((await dryRun({})).status).toBe(200);
  };
  await Promise.all(Array.from({ length: 32 }, client));
  const lines = said.mock.calls.map(String);
  said.mockRestore();
  expect(lines.filter((line) => line.includes('different request context'))).toEqual([]);
});

it('loses no request, and blames nobody', async () => {
  const chat = chatOf(await keyOf());
  // Several at once leave several connections open.
  await Promise.all(Array.from({ length: 8 }, async () => (await chat({ max_tokens: 2 })).text()));
  const long = await chat({ stream: true, max_tokens: LONG_TOKENS });
  target = after;
  const closing = before.close();
  const statuses: number[] = [];
  for (let i = 0; i < 20; i++) {
    const response = await chat({ max_tokens: 1 });
    await response.text();
    statuses.push(response.status);
  }
  expect(statuses).toEqual(statuses.map(() => 200));
  const { events } = parseSse(await long.text());
  expect(events.at(-1)!.data).toBe('[DONE]');
  await closing;
  expect((await chat({ max_tokens: 1 })).status).toBe(200);
});
