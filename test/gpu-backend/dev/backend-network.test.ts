/** The local edge and backends over https: whom it trusts, and that everything travels as over http. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { type AddressInfo, connect } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createServer, type Server } from 'node:tls';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { ensureApiKey } from '../../../gpu-backend/dev/seed.ts';
import { createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { backendSchema } from '../../../shared/wire/backend-load.ts';
import { startBackend } from '../../support/edge/backend-server.ts';
import { ADMIN_KEY, BACKEND_KEY, MODEL, type Recorded } from '../../support/edge/constants.ts';
import type { RunningServer } from '../../support/edge/http-server.ts';

let folder: string;
let backend: RunningServer;
let edge: Edge;
let key: string;
const doors: Server[] = [];

/** A TLS door to the backend. `openssl` makes its certificate here, so that no key lies in the project. */
async function openDoor(name: string): Promise<string> {
  const at = (file: string) => path.join(folder, `${name}.${file}`);
  const subject = ['-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost'];
  const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2'];
  const files = ['-keyout', at('key'), '-out', at('crt')];
  execFileSync('openssl', ['req', '-x509', ...kind, ...subject, ...files], { stdio: 'ignore' });
  const target = Number(new URL(backend.url).port);
  const server = createServer({ key: readFileSync(at('key')), cert: readFileSync(at('crt')) }, (client) => {
    const inside = connect({ host: '127.0.0.1', port: target });
    client.pipe(inside).pipe(client);
    for (const end of [client, inside])
      end.on('error', () => {}).on('close', () => [client, inside].map((one) => one.destroy()));
  });
  server.on('tlsClientError', () => {});
  await new Promise<void>((resolve) => server.listen(0, 'localhost', resolve));
  doors.push(server);
  return `https://localhost:${(server.address() as AddressInfo).port}`;
}

beforeAll(async () => {
  folder = mkdtempSync(path.join(tmpdir(), 'backend-network-'));
  backend = await startBackend();
  const trusted = await openDoor('trusted');
  vi.stubEnv('NODE_EXTRA_CA_CERTS', path.join(folder, 'trusted.crt'));
  edge = await startEdge({
    projectFolder: path.resolve('.'),
    stateFolder: undefined,
    port: 0,
    bindings: { BACKEND_URL: trusted, BACKEND_KEY, ADMIN_KEY },
  });
  key = await ensureApiKey(createAdminClient(edge.url, ADMIN_KEY), undefined);
}, 90_000);
afterAll(async () => {
  vi.unstubAllEnvs();
  await edge?.close();
  for (const door of doors) door.close();
  await backend?.close();
  if (folder !== undefined) rmSync(folder, { recursive: true });
});

const chat = (id: string, more: object = {}, signal?: AbortSignal) =>
  fetch(`${edge.url}/v1/chat/completions`, {
    method: 'POST',
    headers: {
      'content-type': 'application/json',
      authorization: `Bearer ${key}`,
      'x-request-id': id,
    },
    body: JSON.stringify({
      model: MODEL.id,
      messages: [{ role: 'user', content: 'What is 2 and 2?' }],
      ...more,
    }),
    ...(signal === undefined ? {} : { signal }),
  });
const recorded = async (id: string): Promise<Recorded | null> =>
  (await (await fetch(`${backend.url}/recorded/${id}`)).json()) as Recorded | null;

test('an answer and a stream come over https', async () => {
  const whole = await chat('whole');
  expect(whole.status, await whole.text()).toBe(200);
  const stream = await chat('stream', { stream: true });
  expect(await stream.text()).toMatch(/data: \[DONE\]\s*$/);
}, 60_000);

test('a client that hangs up is heard of over https', async () => {
  const leave = new AbortController();
  const answer = chat('hang-up', { user: 'stream-forever', stream: true }, leave.signal);
  const reading = answer.then((response) => response.text());
  reading.catch(() => {});
  await vi.waitFor(async () => expect(await recorded('hang-up')).toMatchObject({ hungUp: false }), 10_000);
  leave.abort();
  await expect(reading).rejects.toThrow();
  await vi.waitFor(async () => expect((await recorded('hang-up'))!.hungUp).toBe(true), 10_000);
}, 60_000);

test('a backend whose certificate nobody trusts is none', async () => {
  const body = { id: 'stranger', url: await openDoor('stranger') };
  await createAdminClient(edge.url, ADMIN_KEY).request(
    { method: 'POST', path: '/backends', body },
    backendSchema,
  );
  const answer = await chat('stranger');
  expect(answer.status).toBe(503);
  expect(await answer.json()).toMatchObject({ error: { code: 'backend_unreachable' } });
  expect(await recorded('stranger')).toBeNull();
}, 60_000);
