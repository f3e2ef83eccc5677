/** What the three roles may do: read, administrate one tenant, administrate everything. */
import { expect, it } from 'vitest';
import { EDGE_URL } from '../../support/edge/constants.ts';
import { admin, call, errorCode, newKey, newTenant } from '../support/edge.ts';

const READ = [
  '/tenants',
  '/keys',
  '/mask-sets',
  '/publications',
  '/experiments',
  '/stats',
  '/requests',
  '/audit',
  '/usage',
];

it('a viewer reads everything that its tenant has, or all tenants have, and changes nothing', async () => {
  const { tenant } = await newTenant();
  const { tenant: other } = await newTenant();
  const { key: ofAll } = await newKey({ kind: 'viewer' });
  const { key: ofOne } = await newKey({ kind: 'viewer', tenant });
  for (const key of [ofAll, ofOne]) {
    expect(key).toMatch(/^mr_view_/);
    for (const path of READ) expect((await admin('GET', path, undefined, key)).status, path).toBe(200);
    for (const [method, path, body] of [
      ['PATCH', `/tenants/${tenant}`, { name: 'changed' }],
      ['POST', '/keys', { name: 'mine', kind: 'tenant', tenant }],
      ['POST', '/publications/rollback', {}],
      ['DELETE', '/experiments/none', undefined],
    ] as const) {
      expect(await errorCode(admin(method, path, body, key)), path).toBe('403 forbidden');
    }
    expect(await errorCode(call('GET', '/v1/models', { key }))).toBe('403 forbidden');
    // Its own sessions are its own.
    expect((await admin('DELETE', '/sessions', undefined, key)).status).toBe(200);
  }
  expect((await admin('GET', `/tenants/${other}`, undefined, ofAll)).status).toBe(200);
  expect(await errorCode(admin('GET', `/tenants/${other}`, undefined, ofOne))).toBe('404 not_found');
  expect(await errorCode(admin('GET', '/backends', undefined, ofOne))).toBe('403 forbidden');
});

it('a session has the role of its key', async () => {
  const { tenant } = await newTenant();
  for (const [kind, of] of [
    ['viewer', ''],
    ['viewer', tenant],
    ['tenant_admin', tenant],
    ['admin', ''],
  ] as const) {
    const { key } = await newKey({ kind, tenant: of });
    const login = { body: { key }, headers: { origin: EDGE_URL } };
    const session = await (await call('POST', '/dashboard/session', login)).json();
    expect(session).toMatchObject({ role: kind, tenant: of === '' ? null : of });
  }
});

it('an administrator of one tenant makes viewers of that tenant alone', async () => {
  const { tenant } = await newTenant();
  const { tenant: other } = await newTenant();
  const { key } = await newKey({ kind: 'tenant_admin', tenant });
  const make = (body: object) => admin('POST', '/keys', { name: 'reads', kind: 'viewer', ...body }, key);
  expect((await make({})).status).toBe(201);
  expect(await errorCode(make({ tenant: other }))).toBe('403 forbidden');
});
