/** The audit log: who changed what, from where, before and after. */
import { env } from 'cloudflare:workers';
import { describe, expect, it } from 'vitest';
import type { AuditEntry } from '../../../shared/admin/admin-wire.ts';
import { madeUpEvaluation } from '../../support/evaluation.ts';
import {
  admin,
  badD1,
  call,
  created,
  errorCode,
  freshIsolate,
  makeMaskSet,
  newKey,
  newTenant,
  upload,
} from '../support/edge.ts';

async function entries(query = '', key?: string): Promise<AuditEntry[]> {
  const response = await admin('GET', `/audit?${query}`, undefined, key);
  expect(response.status).toBe(200);
  return (await response.json<{ data: AuditEntry[] }>()).data;
}

describe('the audit log', () => {
  it('has every change with who, what, from where, before and after, and no key', async () => {
    const { tenant } = await newTenant();
    const { key: adminKey, id: actor } = await newKey({ kind: 'admin' });
    const headers = { 'cf-connecting-ip': '203.0.113.9', 'x-request-id': `change-of-${tenant}` };
    const body = { name: 'Renamed', requests_per_day: 7 };
    const changed = await call('PATCH', `/admin/v1/tenants/${tenant}`, { key: adminKey, body, headers });
    expect(changed.status).toBe(200);
    const [change] = await entries(`q=change-of-${tenant}`);
    expect(change).toMatchObject({
      actor,
      tenant,
      address: '203.0.113.9',
      is_known: true,
      request_id: `change-of-${tenant}`,
      action: 'PATCH /tenants/:id',
      target: `/tenants/${tenant}`,
      before: { name: tenant, requests_per_day: null },
      after: { name: 'Renamed', requests_per_day: 7 },
    });

    const made = await newKey({ tenant, kind: 'tenant' });
    expect((await admin('DELETE', `/keys/${made.id}`)).status).toBe(200);
    const [revoked, first] = await entries(`tenant=${tenant}`);
    expect(revoked).toMatchObject({
      before: { revoked_at: null },
      after: { revoked_at: expect.any(String) },
    });
    expect(first).toMatchObject({ action: 'POST /keys', before: null, after: { id: made.id } });
    expect(JSON.stringify(await entries())).not.toContain(made.key);
  });

  it('shows a tenant what was changed of its own, also where the answer does not say whose it is', async () => {
    const { tenant } = await newTenant();
    const { key, id } = await newKey({ tenant, kind: 'tenant_admin' });
    const { version } = await upload(makeMaskSet(`audited-${tenant}`), tenant);
    const path = `/mask-sets/${version}/evaluation`;
    expect((await admin('PUT', `${path}?tenant=${tenant}`, madeUpEvaluation(version))).status).toBe(200);
    expect((await admin('DELETE', `/keys/${id}/sessions`)).status).toBe(200);
    const [ended, evaluated] = await entries('', key);
    expect(ended).toMatchObject({ action: 'DELETE /keys/:id/sessions', tenant, actor: 'root' });
    expect(evaluated).toMatchObject({ action: 'PUT /mask-sets/:version/evaluation', target: path, tenant });
  });

  it('has the size of a state that is too long to keep', async () => {
    const { tenant } = await newTenant();
    const variants = ['a', 'b'].map((name) => ({ name, weight: 1, mask_set: 'dense' }));
    const models = Array.from({ length: 50 }, (_, i) => `${i}${'"'.repeat(250)}`);
    const made = await created(admin('POST', '/experiments', { id: 'long', tenant, variants, models }));
    const [entry] = await entries(`tenant=${tenant}`);
    const after = { omitted_chars: JSON.stringify(made).length };
    expect(entry).toMatchObject({ action: 'POST /experiments', is_known: true, before: null, after });
  });

  it('has a change whose client left before the backend answered, as it may have been made', async () => {
    const leave = new AbortController();
    const BACKEND_NETWORK = {
      fetch: async (url: string) => {
        if (url.includes('/v1/jobs/')) leave.abort();
        throw new Error('gone');
      },
    };
    const isolate = freshIsolate({ BACKEND_NETWORK: BACKEND_NETWORK as never });
    const path = '/backends/default/jobs/job_00000000000000000000abcd/cancel';
    await call('POST', `/admin/v1${path}`, { key: env.ADMIN_KEY, signal: leave.signal }, isolate);
    const [entry] = await entries(`q=${path}`);
    expect(entry).toMatchObject({ action: 'POST /backends/:id/jobs/:job/cancel', is_known: false });
  });

  it('has nothing of what was refused or only asked', async () => {
    const { tenant } = await newTenant();
    const before = await entries(`tenant=${tenant}`);
    await admin('PATCH', `/tenants/${tenant}`, { sparsity_max: 2 });
    await admin('POST', '/tenants', { id: tenant, name: 'again' });
    await admin('GET', `/tenants/${tenant}`);
    expect(await entries(`tenant=${tenant}`)).toEqual(before);
    expect(await entries('q=/publications')).toEqual([]);
  });

  it('is read by page and as rows of JSON, a tenant by its own administrator', async () => {
    const { tenant } = await newTenant();
    const { key } = await newKey({ tenant, kind: 'tenant_admin' });
    for (let i = 0; i < 5; i++) await admin('PATCH', `/tenants/${tenant}`, { name: `name ${i}` });
    const own = await entries('limit=200', key);
    expect(own.length).toBe(8);
    expect(new Set(own.map((entry) => entry.tenant))).toEqual(new Set([tenant]));
    const page = await (await admin('GET', '/audit?limit=3', undefined, key)).json<{ next: string }>();
    expect(await entries(`limit=200&before=${page.next}`, key)).toEqual(own.slice(3));
    const exported = await admin('GET', '/audit/export', undefined, key);
    expect(exported.headers.get('content-type')).toContain('application/x-ndjson');
    const rows = (await exported.text())
      .trimEnd()
      .split('\n')
      .map((row) => JSON.parse(row));
    expect(rows).toEqual(own);
    const one = async (id: number | string, by?: string) => await admin('GET', `/audit/${id}`, undefined, by);
    expect(await (await one(own[2]!.id, key)).json()).toEqual(own[2]);
    const [ofAnother] = await entries(`tenant=${(await newTenant()).tenant}`);
    expect(await (await one(ofAnother!.id)).json()).toEqual(ofAnother);
    const inHex = `0x${own[2]!.id.toString(16)}`;
    for (const hidden of [ofAnother!.id, 'x', 1e9, inHex, `${own[2]!.id}e0`, '9'.repeat(400)]) {
      expect(await errorCode(one(hidden, key))).toBe('404 not_found');
    }
    const { tenant: other } = await newTenant();
    expect(await errorCode(admin('GET', `/audit?tenant=${other}`, undefined, key))).toBe('403 forbidden');
  });

  it('asks D1 for no change whose number is none', async () => {
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    d1.be('failing');
    const one = (id: string) => call('GET', `/admin/v1/audit/${id}`, { key: env.ADMIN_KEY }, isolate);
    expect(await errorCode(one('x'))).toBe('404 not_found');
    expect(await errorCode(one('1'))).toBe('503 configuration_unavailable');
  });

  it('refuses a change that it could not write down', async () => {
    const { tenant } = await newTenant();
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    d1.be('failing');
    const body = { name: 'unseen' };
    const refused = call('PATCH', `/admin/v1/tenants/${tenant}`, { key: env.ADMIN_KEY, body }, isolate);
    expect(await errorCode(refused)).toBe('503 configuration_unavailable');
    d1.be('good');
    expect(await (await admin('GET', `/tenants/${tenant}`)).json()).toMatchObject({ name: tenant });
  });
});

it('a list finds by text what lies beyond its first page', async () => {
  const ids = Array.from({ length: 6 }, (_, i) => `find-${i}`);
  for (const id of ids) await created(admin('POST', '/tenants', { id, name: `Number ${id}` }));
  const found = async (path: string) =>
    (await (await admin('GET', path)).json<{ data: { id: string }[] }>()).data.map(({ id }) => id);
  expect(await found('/tenants?limit=1&q=FIND-3')).toEqual(['find-3']);
  expect(await found('/tenants?q=number%20find-0')).toEqual(['find-0']);
  await created(admin('POST', '/tenants', { id: 'find-umlaut', name: 'Ärzte' }));
  expect(await found('/tenants?q=%C3%84RZTE')).toEqual(['find-umlaut']);
  // A text is a text, and no pattern.
  expect(await found('/tenants?q=find%25')).toEqual([]);
});
