/** Lists of the admin API: page by page each item comes once, and none is left out without a word. */
import { env } from 'cloudflare:workers';
import { beforeAll, describe, expect, it } from 'vitest';
import type { UsageRow } from '../../../shared/admin/admin-wire.ts';
import {
  activate,
  admin,
  created,
  errorCode,
  makeMaskSet,
  newKey,
  newTenant,
  upload,
} from '../support/edge.ts';

type Item = { readonly id?: string; readonly version?: string };
type Answer<T> = { readonly data: T[]; readonly has_more: boolean; readonly next: string | null };

async function page<T = Item>(path: string, query: Record<string, string> = {}): Promise<Answer<T>> {
  const response = await admin('GET', `${path}?${new URLSearchParams(query)}`);
  const text = await response.text();
  expect(response.status, text).toBe(200);
  return JSON.parse(text);
}

const nameOf = ({ id, version }: Item) => id ?? version;

describe('pages', () => {
  let tenant = '';
  const add: Record<string, (name: string) => Promise<unknown>> = {
    '/keys': (name) => newKey({ tenant, name }),
    '/tenants': (name) => created(admin('POST', '/tenants', { id: `${tenant}-${name}`, name })),
    '/mask-sets': (name) => upload(makeMaskSet(name), tenant),
    '/publications': async (name) =>
      activate((await upload(makeMaskSet(`live-${name}`), tenant)).version, { tenant }),
    '/experiments': async (name) => {
      const variants = ['a', 'b'].map((arm) => ({ name: arm, weight: 1, mask_set: 'dense' }));
      await created(admin('POST', '/experiments', { id: `${tenant}-${name}`, tenant, variants }));
    },
  };

  beforeAll(async () => {
    ({ tenant } = await newTenant());
    for (const make of Object.values(add))
      for (const name of ['one', 'two', 'three', 'four']) await make(name);
    // Made in the same moment, as by a script: then their names say which comes first.
    for (const table of ['api_keys', 'tenants', 'mask_sets', 'experiments']) {
      await env.DB.prepare(`UPDATE ${table} SET created_at_ms = 1_000 WHERE rowid % 2 = 0`).run();
    }
  });

  it.each(Object.keys(add))('of %s have each item once, also when one is added meanwhile', async (path) => {
    const scope = path === '/tenants' ? {} : { tenant };
    const whole = await page(path, scope);
    expect(whole).toMatchObject({ object: 'list', has_more: false, next: null });
    expect(whole.data.length).toBeGreaterThanOrEqual(4);
    const seen: unknown[] = [];
    let before: string | null = null;
    do {
      const { data, has_more, next }: Answer<Item> = await page(path, {
        ...scope,
        limit: '2',
        ...(before === null ? {} : { before }),
      });
      expect(data.length).toBeLessThanOrEqual(2);
      expect(has_more).toBe(next !== null);
      if (before === null) await add[path]!('late');
      seen.push(...data.map(nameOf));
      before = next;
    } while (before !== null);
    expect(seen).toEqual(whole.data.map(nameOf));
  });

  it.each(Object.keys(add))('of %s that begin nowhere, or have no size, are refused', async (path) => {
    const wrong = {
      before: ['', 'x', '1', '~', '1~', '-1~a', '1~a~b', "1~'", '1e3~a'],
      limit: ['0', '201', '1.5', 'x', ''],
    };
    for (const [name, values] of Object.entries(wrong)) {
      for (const value of values) {
        const response = await admin('GET', `${path}?${new URLSearchParams({ [name]: value })}`);
        const { error } = await response.clone().json<{ error: { param: string } }>();
        expect(await errorCode(response), value).toBe('400 invalid_request');
        expect(error.param).toBe(name);
      }
    }
    const past = await page(path, { before: '0~z' });
    expect(past).toMatchObject({ data: [], has_more: false, next: null });
  });
});

it.each([
  ...['/tenants', '/keys', '/mask-sets', '/publications', '/experiments', '/audit', '/backends', '/ratings'],
  ...['/usage', '/requests', '/audit/export', '/audit/1', '/requests/x'],
  // About the default they would answer, and not about the tenant.
  ...['/publications/live', '/publications/in-use', '/publications/comparison'],
  ...['/mask-sets/x', '/mask-sets/x/evaluation', '/experiments/x', '/experiments/x/results'],
])('%s refuses a field that it does not know', async (path) => {
  const response = await admin('GET', `${path}?sate=working`);
  const { error } = await response.clone().json<{ error: { message: string } }>();
  expect(await errorCode(response)).toBe('400 invalid_request');
  expect(error.message).toMatch(/^sate: there is no such field here, only /);
});

it.each([
  ...['/keys', '/mask-sets', '/publications', '/publications/live', '/experiments', '/experiments/x'],
  ...['/usage', '/stats', '/requests', '/ratings', '/audit/export'],
])('%s refuses a field that it is given twice', async (path) => {
  const response = await admin('GET', `${path}?tenant=&tenant=nobody`);
  expect(await response.json()).toMatchObject({
    error: { code: 'invalid_request', param: 'tenant', message: 'tenant: it is given more than once.' },
  });
});

it('backends are found by their id, their address and their regions', async () => {
  const found = async (q: string) => (await page('/backends', { q })).data.map(nameOf);
  expect(await found('default')).toEqual(['default']);
  expect(await found('east')).toEqual([]);
  await created(admin('POST', '/backends', { id: 'east-1', url: 'http://one.test', regions: ['AS'] }));
  await created(admin('POST', '/backends', { id: 'west-1', url: 'http://two.test', regions: ['EU', 'NA'] }));
  try {
    expect(await found('EAST')).toEqual(['east-1']);
    expect(await found('two.test')).toEqual(['west-1']);
    expect(await found('"EU"')).toEqual(['west-1']);
    expect(await found('-1')).toEqual(['east-1', 'west-1']);
    // What BACKEND_URL stands for is in use only where there is no entry.
    expect(await found('default')).toEqual([]);
  } finally {
    for (const id of ['east-1', 'west-1']) await admin('DELETE', `/backends/${id}`);
  }
  expect(await errorCode(admin('GET', '/backends?q='))).toBe('400 invalid_request');
});

it('keys that work are found behind any number of others', async () => {
  const { tenant, keyId } = await newTenant();
  const add = (name: string, expiresAt_ms: number | null, revokedAt_ms: number | null) =>
    env.DB.prepare(
      `INSERT INTO api_keys (id, kind, tenant_id, name, prefix, sha256, created_at_ms, expires_at_ms, revoked_at_ms)
      WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 150)
      SELECT ?1 || ?2 || i, 'tenant', ?1, 'x', 'mr', ?1 || ?2 || i, ?3, ?4, ?5 FROM n`,
    )
      .bind(tenant, name, Date.now() + 1_000, expiresAt_ms, revokedAt_ms)
      .run();
  await add('-revoked-', null, 1);
  await add('-expired-', Date.now() - 1_000, null);
  const newest = await page('/keys', { tenant });
  expect(newest).toMatchObject({ has_more: true });
  expect(newest.data).toHaveLength(200);
  const working = await page('/keys', { tenant, state: 'working' });
  expect(working).toMatchObject({ has_more: false });
  expect(working.data.map(nameOf)).toEqual([keyId]);
  expect(await errorCode(admin('GET', '/keys?state=broken'))).toBe('400 invalid_request');
});

describe('usage', () => {
  const MASKS = 700;
  let tenant = '';
  const query = (more: Record<string, string> = {}) => ({
    tenant,
    from: '2026-01-01',
    to: '2026-01-31',
    ...more,
  });

  beforeAll(async () => {
    ({ tenant } = await newTenant());
    await env.DB.prepare(
      `INSERT INTO usage (tenant_id, day, model, mask, requests, errors, prompt_tokens, completion_tokens)
      WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?2)
      SELECT ?1, day.value, 'a "model", of any name', 'm_' || i, 1, 0, 2, 3
      FROM n, json_each('["2026-01-05", "2026-01-06"]') AS day`,
    )
      .bind(tenant, MASKS)
      .run();
  });

  it('of more rows than an answer has says so, and goes on', async () => {
    const group = 'day,model,mask';
    const first = await page<UsageRow>('/usage', query({ group }));
    expect(first).toMatchObject({ object: 'list', has_more: true });
    expect(first.data).toHaveLength(1_000);
    const second = await page<UsageRow>('/usage', query({ group, after: first.next! }));
    expect(second).toMatchObject({ has_more: false, next: null });
    const rows = [...first.data, ...second.data].map(({ day, mask }) => `${day} ${mask}`);
    expect(rows).toHaveLength(2 * MASKS);
    expect(new Set(rows).size).toBe(2 * MASKS);
    expect(rows).toEqual([...rows].sort());
  });

  it('by one thing goes on as well, and what fits is the last page', async () => {
    const first = await page<UsageRow>('/usage', query({ group: 'day', limit: '1' }));
    expect(first.data).toMatchObject([{ day: '2026-01-05', requests: MASKS }]);
    const last = await page<UsageRow>('/usage', query({ group: 'day', limit: '1', after: first.next! }));
    expect(last.data).toMatchObject([{ day: '2026-01-06', requests: MASKS }]);
    expect(last).toMatchObject({ has_more: false, next: null });
  });

  it('from a place that is none is refused', async () => {
    for (const after of ['', 'x', '1', '{}', '[]', '[1]', '["a","b"]', '"a"', 'null']) {
      const response = await admin('GET', `/usage?${new URLSearchParams(query({ after }))}`);
      const { error } = await response.clone().json<{ error: { param: string } }>();
      expect(await errorCode(response), after).toBe('400 invalid_request');
      expect(error.param).toMatch(/^after/);
    }
  });
});
