/** Tenants: what their keys may do, who may change that, and how soon it holds. */
import { env } from 'cloudflare:workers';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { ApiKey, CreatedKey, Tenant } from '../../../shared/admin/admin-wire.ts';
import { MODEL } from '../../support/edge/constants.ts';
import {
  activate,
  admin,
  badD1,
  CHAT,
  call,
  chat,
  created,
  errorCode,
  freshIsolate,
  goLive,
  later,
  makeMaskSet,
  newKey,
  newTenant,
  recorded,
  say,
  upload,
} from '../support/edge.ts';
import { limitedTenant } from '../support/limits.ts';

afterEach(() => {
  vi.useRealTimers();
});

const change = (tenant: string, body: unknown, key?: string) =>
  admin('PATCH', `/tenants/${tenant}`, body, key);

describe('a tenant', () => {
  it('is made with its limits, read, and changed field by field', async () => {
    const limits = { models: [MODEL.id], sparsity_max: 0.25, tokens_per_day: 1_000_000 };
    const { tenant } = await limitedTenant(limits);
    const read = await (await admin('GET', `/tenants/${tenant}`)).json<Tenant>();
    expect(read).toMatchObject({ ...limits, id: tenant, enabled: true, requests_per_day: null });
    const changed = await change(tenant, { tokens_per_day: null, requests_per_day: 5, name: 'renamed' });
    expect(changed.status).toBe(200);
    const expected = { ...read, tokens_per_day: null, requests_per_day: 5, name: 'renamed' };
    expect(await changed.json()).toEqual(expected);
    expect(await (await admin('GET', `/tenants/${tenant}`)).json()).toEqual(expected);
    expect(await errorCode(change('nobody', { name: 'x' }))).toBe('404 not_found');
    const wrong = [
      {},
      { requests_per_day: 0 },
      { requests_per_day: 1.5 },
      { sparsity_max: 2 },
      { models: [] },
    ];
    for (const body of [...wrong, { id: 'other' }, { enabled: 'no' }, { name: null }]) {
      expect(await errorCode(change(tenant, body)), JSON.stringify(body)).toBe('400 invalid_request');
    }
  });

  it('that is disabled is refused within 5 s everywhere, and let in again when it is enabled', async () => {
    const { tenant, key } = await newTenant();
    const isolate = freshIsolate();
    expect((await chat(key, {}, isolate)).status).toBe(200);
    await change(tenant, { enabled: false });
    later(5_001);
    expect(await errorCode(chat(key, {}, isolate))).toBe('403 tenant_disabled');
    await change(tenant, { enabled: true });
    later(5_001);
    expect((await chat(key, {}, isolate)).status).toBe(200);
  });

  it('uses its own models only', async () => {
    const { key } = await limitedTenant({ models: ['another-model'] });
    const refused = chat(key);
    expect(await errorCode(refused)).toBe('403 model_not_allowed');
    expect(await errorCode(chat(key, { model: `${MODEL.id}:dense` }))).toBe('403 model_not_allowed');
    expect(await errorCode(call('POST', '/v1/route', { key, body: CHAT }))).toBe('403 model_not_allowed');
    const list = await (await call('GET', '/v1/models', { key })).json<{ data: unknown[] }>();
    expect(list.data).toEqual([]);
    const { key: allowed } = await limitedTenant({ models: [MODEL.id] });
    expect((await chat(allowed, { model: `${MODEL.id}:dense` })).status).toBe(200);
  });
});

describe('a ceiling of sparsity', () => {
  const clusterOf = async (key: string, body: object) =>
    (await chat(key, body)).headers.get('x-maskroute-cluster');

  it('gives a request the nearest mask that is not sparser, or dense with the reason', async () => {
    const { tenant, key } = await newTenant();
    const set = makeMaskSet('compass');
    // North and east skip two blocks of twelve, south none.
    const [north, east, south] = set.clusters;
    const { version } = await upload(
      { ...set, clusters: [north!, east!, { ...south!, bits: 'fff', mask: 'dense' }] },
      tenant,
    );
    await activate(version, { tenant });
    expect(await clusterOf(key, say('north'))).toBe('0');
    // A set that is live already, or everybody's, is held to a ceiling request by request.
    await change(tenant, { sparsity_max: 0.1 });
    later(5_001);
    expect(await clusterOf(key, say('north'))).toBe('2');
    await change(tenant, { sparsity_max: 2 / 12 });
    later(5_001);
    expect(await clusterOf(key, say('north'))).toBe('0');
    await goLive('compass', tenant);
    await change(tenant, { sparsity_max: 0.1 });
    later(5_001);
    const response = await chat(key, say('north'));
    expect(response.headers.get('x-maskroute-fallback')).toBe('over_ceiling');
    expect(response.headers.get('x-maskroute-mask')).toBe('dense');
  });

  it("holds for masks that the client names, too, whoever's set they are of", async () => {
    const { key } = await limitedTenant({ sparsity_max: 0.1 });
    const { tenant: other } = await newTenant();
    const { set } = await goLive('compass', other);
    const named = (mask: unknown) => chat(key, { mask }, freshIsolate());
    expect(await errorCode(named(set.clusters[0]!.mask))).toBe('403 sparsity_over_ceiling');
    expect(await errorCode(named(`m_${'0'.repeat(24)}`))).toBe('403 sparsity_over_ceiling');
    expect(await errorCode(named({ skipFfn: [1, 2] }))).toBe('403 sparsity_over_ceiling');
    expect((await named({ skipFfn: [1] })).status).toBe(200);
    expect((await named('dense')).status).toBe(200);
  });

  it('tells a mask that is just over it from the ceiling', async () => {
    const { key } = await limitedTenant({ sparsity_max: 1 / MODEL.blockCount - 0.001 });
    const refused = await chat(key, { mask: { skipFfn: [1] } }, freshIsolate());
    const { error } = await refused.json<{ error: { message: string } }>();
    const [, most, skipped] = /at most (\S+) % of blocks; this mask skips (\S+) %/.exec(error.message)!;
    expect(Number(most)).toBeLessThan(Number(skipped));
  });
});

describe('a floor of agreement', () => {
  const fallbackOf = async (key: string) =>
    (await chat(key, say('north'))).headers.get('x-maskroute-fallback');

  it('that is raised later holds for the set that is live, and the answer says so', async () => {
    const { tenant, key } = await newTenant();
    const { version } = await goLive('compass', tenant);
    const warned = await change(tenant, { agreement_min: 0.95 });
    expect(warned.status).toBe(200);
    const { warnings } = await warned.json<Tenant>();
    expect(warnings).toEqual([{ code: 'quality_below_floor', message: expect.stringContaining(version) }]);
    expect(warnings![0]!.message).toContain('90 %');
    later(5_001);
    expect(await fallbackOf(key)).toBe('under_floor');
    const route = await call('POST', '/v1/route', { key, body: { ...CHAT, ...say('north') } });
    expect(await route.json()).toMatchObject({ mask: 'dense', maskroute: { fallback: 'under_floor' } });
    expect(await (await change(tenant, { agreement_min: 0.9 })).json()).toMatchObject({ warnings: [] });
    later(5_001);
    expect(await fallbackOf(key)).toBeNull();
  });

  it('holds for the default set, and for the arms of an experiment', async () => {
    await goLive('compass');
    const { tenant, key } = await limitedTenant({ agreement_min: 0.95 });
    expect(await (await admin('GET', `/tenants/${tenant}`)).json()).toMatchObject({
      warnings: [{ code: 'quality_below_floor' }],
    });
    expect(await fallbackOf(key)).toBe('under_floor');
    const { version } = await upload(makeMaskSet('another'));
    const variants = [
      { name: 'control', weight: 1, mask_set: 'dense' },
      { name: 'masked', weight: 1, mask_set: version },
    ];
    await created(admin('POST', '/experiments', { id: 'for-everybody', variants }));
    await admin('POST', '/experiments/for-everybody/start');
    const { key: other } = await newTenant();
    const experimentOf = async (which: string) =>
      (await chat(which, say('north'), freshIsolate())).headers.get('x-maskroute-experiment');
    expect(await experimentOf(other)).toBe('for-everybody');
    expect(await experimentOf(key)).toBe('none');
    await admin('POST', '/experiments/for-everybody/stop');
  });

  it('and other terms are warned of, each with what becomes of the requests', async () => {
    const { tenant } = await newTenant();
    const set = makeMaskSet('compass');
    const [north, east, south] = set.clusters;
    const mixed = { ...set, clusters: [north!, east!, { ...south!, bits: 'fff', mask: 'dense' }] };
    await activate((await upload(mixed, tenant)).version, { tenant });
    const answer = await change(tenant, { sparsity_max: 0.1, models: ['another-model'] });
    const { warnings } = await answer.json<Tenant>();
    expect(warnings!.map(({ code }) => code)).toEqual(['sparsity_over_ceiling', 'model_not_allowed']);
    expect(warnings![0]!.message).toMatch(/2 of the 3 masks .* skip more than 10 %.*nearest other mask/);
  });
});

describe('a conversation', () => {
  const turn = (role: string, content: string) => ({ role, content });

  it.each(['first_user', 'last_user', 'conversation'] as const)('keeps its mask under %s', async (policy) => {
    const { tenant, key } = await limitedTenant({ routing_policy: policy });
    await goLive('compass', tenant);
    const messages = [turn('user', 'north')];
    for (const next of ['south', 'east', 'south']) {
      const response = await chat(key, { messages }, freshIsolate());
      expect(response.headers.get('x-maskroute-cluster')).toBe('0');
      messages.push(turn('assistant', 'I see.'), turn('user', next));
    }
  });

  it('opens with all that comes before the first answer to a user', async () => {
    const opens = async (policy: 'first_user' | 'last_user' | 'conversation', ...messages: object[]) => {
      const { tenant, key } = await limitedTenant({ routing_policy: policy });
      await goLive('compass', tenant);
      return (await chat(key, { messages })).headers.get('x-maskroute-cluster');
    };
    const greeting = [turn('assistant', 'south is warm')];
    expect(await opens('last_user', ...greeting, turn('user', 'north'), turn('user', 'east'))).toBe('1');
    expect(await opens('first_user', ...greeting, turn('user', 'north'), turn('user', 'east'))).toBe('0');
    expect(await opens('conversation', ...greeting, turn('user', 'north'))).toBe('2');
  });
});

describe('a key', () => {
  const rotate = (id: string, body: unknown = {}, key?: string) =>
    admin('POST', `/keys/${id}/rotate`, body, key);

  it('is rotated: both work for the overlap, then the new one', async () => {
    const { tenant, key, keyId } = await newTenant();
    const isolate = freshIsolate();
    expect((await chat(key, {}, isolate)).status).toBe(200);
    const fresh = await created<CreatedKey>(rotate(keyId, { overlap_s: 60 }));
    expect(fresh).toMatchObject({ tenant, kind: 'tenant', name: 'test', expires_at: null });
    expect((await chat(fresh.key, {}, isolate)).status).toBe(200);
    expect((await chat(key, {}, isolate)).status).toBe(200);
    const { data } = await (await admin('GET', `/keys?tenant=${tenant}`)).json<{ data: ApiKey[] }>();
    expect(data.find(({ id }) => id === keyId)).toMatchObject({ replaced_by: fresh.id });
    later(60_001);
    expect(await errorCode(chat(key, {}, isolate))).toBe('401 invalid_api_key');
    expect((await chat(fresh.key, {}, isolate)).status).toBe(200);
  });

  it('is rotated once, at once if wished, and never past its own end', async () => {
    const { tenant, key, keyId } = await newTenant();
    await created(rotate(keyId, { overlap_s: 0 }));
    expect(await errorCode(chat(key))).toBe('401 invalid_api_key');
    expect(await errorCode(rotate(keyId))).toBe('409 conflict');
    const both = await Promise.all([newKey({ tenant }).then(({ id }) => id)].flatMap((id) => [id, id]));
    const [first, second] = await Promise.all(both.map((id) => rotate(id)));
    expect([first!.status, second!.status].sort()).toEqual([201, 409]);
    const soon = await newKey({ tenant, expires_at: new Date(Date.now() + 2_000).toISOString() });
    await created(rotate(soon.id, { overlap_s: 3600 }));
    later(2_001);
    expect(await errorCode(chat(soon.key))).toBe('401 invalid_api_key');
    expect(await errorCode(rotate('k_none'))).toBe('404 not_found');
    for (const body of [{ overlap_s: -1 }, { overlap_s: 1e9 }, { more: 1 }, 'null']) {
      expect(await errorCode(rotate(keyId, body))).toBe('400 invalid_request');
    }
  });

  it('that would be over at once is refused, and a rotation to one leaves the old key as it is', async () => {
    const { tenant, key, keyId } = await newTenant();
    const over = { expires_at: new Date(Date.now() - 1_000).toISOString() };
    for (const answer of [
      admin('POST', '/keys', { name: 'x', tenant, ...over }),
      rotate(keyId, { overlap_s: 0, ...over }),
    ]) {
      expect(await errorCode(answer)).toBe('400 invalid_request');
    }
    expect((await chat(key)).status).toBe(200);
  });

  it('that was seen revoked stays revoked while D1 is down', async () => {
    const { key, keyId } = await newTenant();
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    expect((await chat(key, {}, isolate)).status).toBe(200);
    await admin('DELETE', `/keys/${keyId}`);
    later(5_001);
    expect(await errorCode(chat(key, {}, isolate))).toBe('401 invalid_api_key');
    d1.be('failing');
    later(1_000_000);
    expect(await errorCode(chat(key, {}, isolate))).toBe('401 invalid_api_key');
    later(10_000_000);
    expect(await errorCode(chat(key, {}, isolate))).toBe('503 configuration_unavailable');
  });

  it('that nobody knows is looked up so often an address', async () => {
    const isolate = freshIsolate();
    const guess = (i: number, address: string) =>
      call('GET', '/v1/models', { key: `mr_live_${i}`, headers: { 'cf-connecting-ip': address } }, isolate);
    const codes = new Set<string>();
    // The limiter's windows are the clock's, so one may end in between.
    for (let i = 0; i < 350 && codes.size < 2; i++) codes.add(await errorCode(guess(i, '203.0.113.7')));
    expect(codes).toEqual(new Set(['401 invalid_api_key', '429 rate_limit_exceeded']));
    expect(await errorCode(guess(1000, '203.0.113.8'))).toBe('401 invalid_api_key');
    const { key } = await newTenant();
    const headers = { 'cf-connecting-ip': '203.0.113.8' };
    expect((await call('GET', '/v1/models', { key, headers }, isolate)).status).toBe(200);
  });

  it('that nobody knows is looked up so often a network of IPv6, whichever of its addresses asks', async () => {
    const isolate = freshIsolate();
    const guess = (i: number, network: string) => {
      const headers = { 'cf-connecting-ip': `${network}::${(i + 1).toString(16)}` };
      return call('GET', '/v1/models', { key: `mr_live_six_${i}`, headers }, isolate);
    };
    const codes = new Set<string>();
    for (let i = 0; i < 350 && codes.size < 2; i++) codes.add(await errorCode(guess(i, '2001:db8:7:1')));
    expect(codes).toEqual(new Set(['401 invalid_api_key', '429 rate_limit_exceeded']));
    expect(await errorCode(guess(1000, '2001:db8:7:2'))).toBe('401 invalid_api_key');
  });
});

describe('one tenant', () => {
  it("cannot read, change or use another's", async () => {
    const [own, other] = [await newTenant(), await newTenant()];
    const { key } = await newKey({ tenant: own.tenant, kind: 'tenant_admin' });
    const { version } = await goLive('private', other.tenant);
    const refused: [string, string, unknown, string][] = [
      ['GET', `/tenants/${other.tenant}`, undefined, '404 not_found'],
      ['PATCH', `/tenants/${other.tenant}`, { name: 'mine' }, '404 not_found'],
      ['GET', `/tenants/${other.tenant}/budget`, undefined, '404 not_found'],
      ['GET', `/usage?tenant=${other.tenant}`, undefined, '403 forbidden'],
      ['POST', `/keys/${other.keyId}/rotate`, {}, '404 not_found'],
      ['DELETE', `/keys/${other.keyId}`, undefined, '404 not_found'],
      ['GET', `/mask-sets/${version}?tenant=${other.tenant}`, undefined, '403 forbidden'],
      ['GET', `/mask-sets/${version}`, undefined, '404 not_found'],
      ['GET', `/mask-sets?tenant=${other.tenant}`, undefined, '403 forbidden'],
      ['GET', `/keys?tenant=${other.tenant}`, undefined, '403 forbidden'],
      ['GET', `/publications?tenant=${other.tenant}`, undefined, '403 forbidden'],
      ['GET', `/publications/live?tenant=${other.tenant}`, undefined, '403 forbidden'],
      ['POST', '/publications/rollback', { tenant: other.tenant }, '403 forbidden'],
      ['GET', `/stats?tenant=${other.tenant}`, undefined, '403 forbidden'],
      ['GET', `/traffic?tenant=${other.tenant}&version=${version}`, undefined, '403 forbidden'],
      ['GET', `/experiments?tenant=${other.tenant}`, undefined, '403 forbidden'],
      ['POST', '/keys', { name: 'x', tenant: other.tenant }, '403 forbidden'],
      ['POST', `/mask-sets?tenant=${other.tenant}`, makeMaskSet('theirs'), '403 forbidden'],
      ['GET', '/backends', undefined, '403 forbidden'],
      ['GET', '/backends/default/jobs', undefined, '403 forbidden'],
      ['POST', '/publications', { version }, '404 not_found'],
      ['POST', '/publications', { version, tenant: own.tenant }, '404 not_found'],
    ];
    for (const [method, path, body, expected] of refused) {
      expect(await errorCode(admin(method, path, body, key)), `${method} ${path}`).toBe(expected);
    }
    expect((await chat(other.key)).headers.get('x-maskroute-version')).toBe(version);
    expect((await chat(own.key)).headers.get('x-maskroute-version')).not.toBe(version);
  });

  it('cannot raise its own limits, only say what it is called and how it is routed', async () => {
    const { tenant } = await limitedTenant({ requests_per_day: 5 });
    const { key } = await newKey({ tenant, kind: 'tenant_admin' });
    expect((await change(tenant, { name: 'x', routing_policy: 'last_user' }, key)).status).toBe(200);
    for (const body of [
      { requests_per_day: 9 },
      { sparsity_max: null, name: 'y' },
      { enabled: true },
      { models: null },
    ]) {
      expect(await errorCode(change(tenant, body, key))).toBe('403 forbidden');
    }
    expect(await (await admin('GET', `/tenants/${tenant}`)).json()).toMatchObject({
      name: 'x',
      requests_per_day: 5,
    });
  });

  it('cannot fill the database: there is so much room for what it stores itself', async () => {
    const { tenant, keyId } = await newTenant();
    const { key } = await newKey({ tenant, kind: 'tenant_admin' });
    await upload(makeMaskSet('fits'), tenant, key);
    // As if it had stored as much as it may, of everything.
    const { DB } = env;
    await DB.batch([
      DB.prepare('UPDATE mask_sets SET content_bytes = 99_999_900 WHERE owner = ?').bind(tenant),
      DB.prepare(
        `INSERT INTO api_keys (id, kind, tenant_id, name, prefix, sha256, created_at_ms)
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9998)
        SELECT 'k_full_' || i, 'tenant', ?1, 'x', 'mr', 'hash-' || i, 1 FROM n`,
      ).bind(tenant),
      DB.prepare(
        `INSERT INTO experiments (id, owner, definition, created_at_ms, revision, actor)
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
        SELECT 'full-' || i, ?1, '{}', 1, 0, 'x' FROM n`,
      ).bind(tenant),
    ]);
    const variants = ['a', 'b'].map((name) => ({ name, weight: 1, mask_set: 'dense' }));
    for (const [path, body] of [
      ['/mask-sets', makeMaskSet('one-more')],
      ['/keys', { name: 'one more' }],
      [`/keys/${keyId}/rotate`, {}],
      ['/experiments', { id: 'one-more', variants }],
    ] as const) {
      expect(await errorCode(admin('POST', path, body, key)), path).toBe('409 conflict');
    }
    // Its operator is not held to that, and others have their own room.
    await created(admin('POST', '/keys', { name: 'by the operator', tenant }));
    await upload(makeMaskSet('by-the-operator'), tenant);
    const other = await newTenant();
    const { key: otherKey } = await newKey({ tenant: other.tenant, kind: 'tenant_admin' });
    await upload(makeMaskSet('another'), other.tenant, otherKey);
  });

  it('gets back the room of keys that expired long ago, and not of others', async () => {
    const { tenant } = await newTenant();
    const { key } = await newKey({ tenant, kind: 'tenant_admin' });
    const fill = (name: string, count: number, expiredBefore_ms: number) =>
      env.DB.prepare(
        `INSERT INTO api_keys (id, kind, tenant_id, name, prefix, sha256, created_at_ms, expires_at_ms)
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?2)
        SELECT ?1 || ?3 || i, 'tenant', ?1, 'Playground', 'mr', ?1 || ?3 || i, 1, ?4 FROM n`,
      )
        .bind(tenant, count, name, Date.now() - expiredBefore_ms)
        .run();
    await fill('-lately-', 9_997, 29 * 86_400_000);
    await fill('-long-ago-', 500, 31 * 86_400_000);
    const { id } = await created<CreatedKey>(admin('POST', '/keys', { name: 'has room' }, key));
    const answer = admin('POST', '/keys', { name: 'has none' }, key);
    expect(await errorCode(answer)).toBe('409 conflict');
    expect(await errorCode(admin('POST', `/keys/${id}/rotate`, {}, key))).toBe('409 conflict');
    await env.DB.prepare("UPDATE api_keys SET expires_at_ms = 1 WHERE id = ? || '-lately-1'")
      .bind(tenant)
      .run();
    await created(admin('POST', `/keys/${id}/rotate`, {}, key));
  });

  it('is not needed for a key that expired long ago to be deleted', async () => {
    const expired = await Promise.all(
      [31, 29].map((days) =>
        newKey({ kind: 'viewer' }).then(async ({ id }) => {
          await env.DB.prepare('UPDATE api_keys SET expires_at_ms = ?2 WHERE id = ?1')
            .bind(id, Date.now() - days * 86_400_000)
            .run();
          return id;
        }),
      ),
    );
    const { id } = await newKey({ kind: 'viewer' });
    const { results } = await env.DB.prepare('SELECT id FROM api_keys WHERE id IN (?, ?, ?) ORDER BY id')
      .bind(...expired, id)
      .all();
    expect(results.map((row) => row.id)).toEqual([expired[1], id].sort());
  });

  it('that is out of budget or floods slows nobody else', async () => {
    const { key: greedy } = await limitedTenant({ requests_per_minute: 1 });
    const { key } = await limitedTenant({ requests_per_minute: 100 });
    const flood = Promise.all(Array.from({ length: 60 }, () => chat(greedy)));
    const answer = await chat(key);
    expect(answer.status).toBe(200);
    expect((await flood).filter(({ status }) => status === 429).length).toBeGreaterThan(50);
  });

  it('reaches the backend under its own name, by which it keeps turns and cached prompts apart', async () => {
    const { tenant, key } = await newTenant();
    const response = await chat(key);
    const { headers } = (await recorded(response.headers.get('x-request-id')!))!;
    const [, payload] = headers.authorization!.split('.');
    expect(JSON.parse(atob(payload!.replaceAll('-', '+').replaceAll('_', '/')))).toMatchObject({ tenant });
  });
});
