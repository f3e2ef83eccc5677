/** What a start makes sure of, when the edge has a bad moment. The edge is scripted here; publish.test.ts has the real one. */
import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, expect, test } from 'vitest';
import { ensureApiKey } from '../../../gpu-backend/dev/seed.ts';
import { createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';

let server: Server;
afterEach(() => server.close());

const NEW_KEY = {
  ...{ id: 'k_1', kind: 'tenant', tenant: 'local', name: 'npm start', prefix: 'mr_live_new' },
  ...{ key: 'mr_live_new', created_at: '2026-01-01T00:00:00.000Z' },
  ...{ expires_at: null, revoked_at: null, replaced_by: null },
};
const THERE_ALREADY = { error: { code: 'conflict', message: 'there', type: 'x', param: null } };

/** An edge that answers `statuses` about a kept key, one after the other, and makes keys. */
async function edgeWith(statuses: number[]) {
  server = createServer((request, response) => {
    if (request.url === '/v1/models') return response.writeHead(statuses.shift() ?? 500).end();
    const isKey = request.url!.endsWith('/keys');
    response.writeHead(isKey ? 201 : 409, { 'content-type': 'application/json' });
    return response.end(JSON.stringify(isKey ? NEW_KEY : THERE_ALREADY));
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  return createAdminClient(url, 'an-admin-key-of-this-test-0123456789');
}

test('a kept key that the edge knows stays', async () => {
  expect(await ensureApiKey(await edgeWith([200]), 'mr_live_kept')).toBe('mr_live_kept');
});

test('a failure says nothing about a kept key: it is asked about again', async () => {
  expect(await ensureApiKey(await edgeWith([503, 401]), 'mr_live_kept')).toBe('mr_live_new');
  server.close();
  expect(await ensureApiKey(await edgeWith([503, 200]), 'mr_live_kept')).toBe('mr_live_kept');
});
