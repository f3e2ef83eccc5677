/** The registry that follows its backends: real backends that start and drain, and the worker in workerd. */
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { createRegistrar } from '../../../gpu-backend/publication/register.ts';
import type { BackendEntry } from '../../../shared/wire/backend-load.ts';
import { BACKEND_KEY, serveModel, type TestServer } from '../api/harness.ts';
import { bytesOf, scriptedEngine, scriptedModel } from '../api/scripted-engine.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const NOBODY = 'http://127.0.0.1:9';

let edge: Edge;
const servers: TestServer[] = [];
beforeAll(async () => {
  edge = await startEdge({
    projectFolder: path.resolve('.'),
    stateFolder: undefined,
    port: 0,
    bindings: { BACKEND_URL: NOBODY, BACKEND_KEY, ADMIN_KEY },
  });
}, 60_000);
afterAll(async () => {
  await edge?.close();
  for (const server of servers) await server[Symbol.asyncDispose]();
});

async function backend(): Promise<TestServer> {
  const engine = scriptedEngine({ answer: () => bytesOf('a story'), step_ms: 30 });
  const server = await serveModel(scriptedModel(engine), {}, { audience: undefined });
  servers.push(server);
  return server;
}

async function entries(): Promise<string[]> {
  const headers = { authorization: `Bearer ${ADMIN_KEY}` };
  const response = await fetch(`${edge.url}/admin/v1/backends`, { headers });
  const { data } = (await response.json()) as { data: BackendEntry[] };
  return data.map(({ id, url, regions, enabled }) => `${id} ${url} ${regions} ${enabled}`).toSorted();
}

const change = (id: string, body: object) =>
  fetch(`${edge.url}/admin/v1/backends/${id}`, {
    method: 'PATCH',
    headers: { authorization: `Bearer ${ADMIN_KEY}`, 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });

/** Stands for a DNS: it knows where each number is. */
async function names(addresses: Map<string, string>) {
  const server = createServer((request, response) => {
    const [, n = '', rest = ''] = /^\/(\d+)(.*)$/.exec(request.url ?? '') ?? [];
    const url = addresses.get(n);
    if (url === undefined) response.destroy();
    else response.writeHead(307, { location: url + rest }).end();
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, close: () => server.close() };
}

it('has an entry for each backend while it is ready, and keeps its hands off what somebody disabled', async () => {
  const [zero, one, two] = [await backend(), await backend(), await backend()];
  const addresses = new Map([['0', zero.url]]);
  const dns = await names(addresses);
  const look = createRegistrar(createAdminClient(edge.url, ADMIN_KEY), {
    count: 4,
    id: 'pod-{n}',
    url: 'https://pod-{n}.example.com',
    probe: `${dns.url}/{n}`,
    regions: ['EU', 'AF'],
  });
  const entry = (n: number, enabled = true) => `pod-${n} https://pod-${n}.example.com EU,AF ${enabled}`;
  expect(await look()).toMatchObject({ added: ['pod-0'], removed: [] });
  expect(await look()).toMatchObject({ added: [], removed: [] });
  addresses.set('1', one.url).set('2', two.url);
  expect(await look()).toMatchObject({ added: ['pod-1', 'pod-2'], removed: [] });
  expect(await entries()).toEqual([entry(0), entry(1), entry(2)]);

  // One drains and says so; one is silent, which is believed the second time.
  const running = await one.post('/v1/chat/completions', {
    model: 'scripted',
    messages: [{ role: 'user', content: 'go' }],
    stream: true,
    max_tokens: 20,
  });
  const closing = one.close();
  addresses.delete('0');
  expect(await look()).toMatchObject({ added: [], removed: ['pod-1'] });
  expect(await look()).toMatchObject({ added: [], removed: ['pod-0'] });
  await running.text();
  await closing;

  await change('pod-2', { enabled: false });
  expect(await look()).toMatchObject({ added: [], removed: [] });
  expect(await entries()).toEqual([entry(2, false)]);

  // Nobody is ready: it is left as it is.
  await change('pod-2', { enabled: true });
  addresses.clear();
  for (let i = 0; i < 3; i++) expect(await look()).toMatchObject({ added: [], removed: [] });
  expect(await entries()).toEqual([entry(2)]);
  dns.close();
});

it('leaves alone what has its name and another address: the backends of another region', async () => {
  const here = await backend();
  const client = createAdminClient(edge.url, ADMIN_KEY);
  const fleet = { count: 1, id: 'same-{n}', regions: ['*'] };
  const lookInEu = createRegistrar(client, { ...fleet, url: 'https://{n}.eu.example.com', probe: here.url });
  expect(await lookInEu()).toMatchObject({ added: ['same-0'], foreign: [] });
  const there = await backend();
  const lookInUs = createRegistrar(client, { ...fleet, url: 'https://{n}.us.example.com', probe: there.url });
  expect(await lookInUs()).toEqual({ added: [], removed: [], foreign: ['same-0'] });

  // Two backends are ready there, and the one whose name the other region has drains.
  const more = await backend();
  const dns = await names(
    new Map([
      ['0', there.url],
      ['1', more.url],
    ]),
  );
  const both = { ...fleet, count: 2, url: 'https://{n}.us.example.com', probe: `${dns.url}/{n}` };
  const running = await there.post('/v1/chat/completions', {
    model: 'scripted',
    messages: [{ role: 'user', content: 'go' }],
    stream: true,
    max_tokens: 20,
  });
  const closing = there.close();
  expect(await createRegistrar(client, both)()).toMatchObject({ added: ['same-1'], removed: [] });
  expect(await entries()).toContain('same-0 https://0.eu.example.com * true');
  await running.text();
  await closing;
  dns.close();
});
