/** Who gets in, and for how long. */
import { afterEach, describe, expect, it, vi } from 'vitest';
import { addressGroup } from '../../../workers/base/place.ts';
import { ADMIN_KEY, BACKEND_KEY, EDGE_URL } from '../../support/edge/constants.ts';
import {
  admin,
  badD1,
  CHAT,
  call,
  chat,
  errorCode,
  freshIsolate,
  later,
  newKey,
  newTenant,
  soon,
} from '../support/edge.ts';

afterEach(() => {
  vi.useRealTimers();
});

describe('a tenant key', () => {
  it('lets requests in, and a wrong, missing or malformed one does not', async () => {
    const { key } = await newTenant();
    expect((await chat(key)).status).toBe(200);
    for (const authorization of [`Bearer ${key}x`, 'Bearer', 'Bearer a b', key, `Basic ${key}`, '']) {
      const answer = call('GET', '/v1/models', { headers: { authorization } });
      expect(await errorCode(answer), authorization).toBe('401 invalid_api_key');
    }
    expect(await errorCode(call('GET', '/v1/models'))).toBe('401 invalid_api_key');
  });

  it('is stored as a hash only', async () => {
    const { key } = await newTenant();
    const list = await (await admin('GET', '/keys')).text();
    expect(list).not.toContain(key);
    expect(list).toContain(key.slice(0, 14));
  });

  it('opens no other door', async () => {
    const { key } = await newTenant();
    expect(await errorCode(admin('GET', '/keys', undefined, key))).toBe('403 forbidden');
    expect(await errorCode(call('GET', '/internal/v1/masks/dense', { key }))).toBe('401 invalid_api_key');
    for (const other of [ADMIN_KEY, BACKEND_KEY]) {
      expect(await errorCode(chat(other))).toBe('401 invalid_api_key');
    }
    const { key: adminKey } = await newKey({ kind: 'admin' });
    expect((await admin('GET', '/tenants', undefined, adminKey)).status).toBe(200);
    expect(await errorCode(chat(adminKey))).toBe('403 forbidden');
  });

  it('stops at its expiry, though it is cached', async () => {
    const { tenant } = await newTenant();
    const { key } = await newKey({ tenant, expires_at: new Date(Date.now() + 3_000).toISOString() });
    expect((await chat(key)).status).toBe(200);
    later(3_001);
    expect(await errorCode(chat(key))).toBe('401 invalid_api_key');
  });
});

describe("an administrator's key", () => {
  const from = (address: string) => ({ 'cf-connecting-ip': address });
  const asAdmin = (key: string, address: string, isolate = freshIsolate()) =>
    call('GET', '/admin/v1/tenants', { key, headers: from(address) }, isolate);
  const login = (key: string, address: string, isolate = freshIsolate()) =>
    call(
      'POST',
      '/dashboard/session',
      { body: { key }, headers: { origin: EDGE_URL, ...from(address) } },
      isolate,
    );
  /** Wrong keys until the address is refused, at the admin API and the dashboard in turn. */
  const exhaust = async (address: string, isolate = freshIsolate()) => {
    const codes = new Set<string>();
    // The limiter's windows are the clock's, so one may end in between.
    for (let i = 0; i < 350 && codes.size < 2; i++) {
      codes.add(await errorCode((i % 2 === 0 ? asAdmin : login)(`wrong-key-${i}`, address, isolate)));
    }
    expect(codes).toEqual(new Set(['401 invalid_api_key', '429 rate_limit_exceeded']));
  };

  it('that is the root key gets in, however many wrong ones came from its address', async () => {
    await exhaust('198.51.100.1');
    for (const door of [asAdmin, login]) {
      expect((await door(ADMIN_KEY, '198.51.100.1')).status).toBe(200);
      expect((await door(ADMIN_KEY, '198.51.100.2')).status).toBe(200);
    }
  });

  it('that the isolate knows gets in likewise, and its session goes on', async () => {
    const isolate = freshIsolate();
    const { key } = await newKey({ kind: 'admin' });
    const cookie = (await login(key, '198.51.100.3', isolate)).headers.get('set-cookie')!.split(';')[0]!;
    await exhaust('198.51.100.3', isolate);
    expect((await asAdmin(key, '198.51.100.3', isolate)).status).toBe(200);
    const headers = { cookie, ...from('198.51.100.3') };
    expect((await call('GET', '/admin/v1/tenants', { headers }, isolate)).status).toBe(200);
  });

  it.each(['ADMIN_KEY', 'BACKEND_KEY'] as const)(
    'that is too short (%s) is refused with the reason',
    async (name) => {
      const [error, warn] = (['error', 'warn'] as const).map((level) =>
        vi.spyOn(console, level).mockImplementation(() => {}),
      );
      const isolate = freshIsolate({ [name]: 'twenty-three-characters' });
      expect((await call('GET', '/readyz', {}, isolate)).status).toBe(503);
      expect(await errorCode(asAdmin(ADMIN_KEY, '198.51.100.4', isolate))).toBe(
        '503 configuration_unavailable',
      );
      const lines = [error!, warn!].flatMap((spy) => spy.mock.calls.flat()).join('\n');
      vi.restoreAllMocks();
      expect(lines).toContain(`${name}: it needs 24 characters or more`);
      expect(lines).not.toContain('twenty-three-characters');
    },
  );
});

describe('where a request comes from', () => {
  const cf = { continent: 'EU', country: 'DE', colo: 'FRA' };
  const route = async (key: string, TRUSTED_FRONT: string) => {
    const request = new Request(`${EDGE_URL}/v1/route`, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${key}`,
        'content-type': 'application/json',
        'cf-ipcountry': 'FR',
        'cf-connecting-ip': '192.0.2.1',
        'x-forwarded-for': '192.0.2.2',
      },
      body: JSON.stringify(CHAT),
      cf,
    } as RequestInit);
    return (await freshIsolate({ TRUSTED_FRONT })(request)).headers.get('x-maskroute-region');
  };

  it('is what a front says that the operator trusts, and else nothing that a request says', async () => {
    const { key } = await newTenant();
    expect(await route(key, 'cloudflare')).toBe('EU/DE/FRA');
    for (const front of ['', 'none']) expect(await route(key, front)).toBe('local');
  });

  it('is no way to have keys of others refused where nobody is trusted', async () => {
    const isolate = freshIsolate({ TRUSTED_FRONT: '' });
    const guess = (i: number) =>
      call(
        'GET',
        '/v1/models',
        { key: `mr_live_none_${i}`, headers: { 'cf-connecting-ip': '192.0.2.9' } },
        isolate,
      );
    for (let i = 0; i < 250; i++) expect(await errorCode(guess(i))).toBe('401 invalid_api_key');
  });

  it.each([
    ['203.0.113.7', '203.0.113.7'],
    ['2001:db8::1', '2001:db8:0:0'],
    ['2001:0db8:0001:0002:0003:0004:0005:0006', '2001:db8:1:2'],
    ['::1', '0:0:0:0'],
    ['fe80::', 'fe80:0:0:0'],
  ])('%s is counted as %s', (address, group) => {
    expect(addressGroup(address)).toBe(group);
  });
});

describe('revocation', () => {
  it('holds at once in the isolate that did it, and doing it again changes nothing', async () => {
    const { key, keyId } = await newTenant();
    expect((await chat(key)).status).toBe(200);
    const first = await (await admin('DELETE', `/keys/${keyId}`)).json<{ revoked_at: string }>();
    expect(await errorCode(chat(key))).toBe('401 invalid_api_key');
    const second = await (await admin('DELETE', `/keys/${keyId}`)).json();
    expect(second).toEqual(first);
    expect(first.revoked_at).toBeTypeOf('string');
    expect(await errorCode(admin('DELETE', '/keys/k_none'))).toBe('404 not_found');
  });

  it('holds in every other isolate within 10 s, busy or idle', async () => {
    const { key, keyId } = await newTenant();
    const [busy, idle] = [freshIsolate(), freshIsolate()];
    expect((await chat(key, {}, busy)).status).toBe(200);
    expect((await chat(key, {}, idle)).status).toBe(200);
    await admin('DELETE', `/keys/${keyId}`);
    later(5_100);
    await chat(key, {}, busy);
    await vi.waitFor(async () => {
      expect(await errorCode(chat(key, {}, busy))).toBe('401 invalid_api_key');
    }, 20_000);
    later(10_100);
    expect(await errorCode(chat(key, {}, idle))).toBe('401 invalid_api_key');
  });
});

it('a revocation holds in an isolate that was idle, though D1 takes 400 ms to say so', async () => {
  const { key, keyId } = await newTenant();
  const d1 = badD1();
  const isolate = freshIsolate({ DB: d1.DB });
  expect((await chat(key, {}, isolate)).status).toBe(200);
  await admin('DELETE', `/keys/${keyId}`);
  d1.be('slow');
  later(1_800_000);
  expect(await errorCode(chat(key, {}, isolate))).toBe('401 invalid_api_key');
});

it('an isolate that slept through the end of an outage believes no key from before it', async () => {
  const { key, keyId } = await newTenant();
  const d1 = badD1();
  const isolate = freshIsolate({ DB: d1.DB });
  await chat(key, {}, isolate);
  d1.be('failing');
  later(10_000);
  expect((await chat(key, {}, isolate)).status).toBe(200);
  await admin('DELETE', `/keys/${keyId}`);
  d1.be('slow');
  later(1_800_000);
  expect(await errorCode(chat(key, {}, isolate))).toBe('401 invalid_api_key');
});

describe('while D1 is down', () => {
  it.each(['failing', 'stalled'] as const)('%s: known keys work, unknown ones get 503', async (mood) => {
    const { key } = await newTenant();
    const { key: unseen } = await newTenant();
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    expect((await chat(key, {}, isolate)).status).toBe(200);
    d1.be(mood);
    later(20_000);
    expect((await chat(key, {}, isolate)).status).toBe(200);
    const refused = await chat(unseen, {}, isolate);
    expect(refused.headers.get('retry-after')).toBe('1');
    expect(await errorCode(refused)).toBe('503 configuration_unavailable');
    expect(await errorCode(chat('mr_live_made_up', {}, isolate))).toBe('503 configuration_unavailable');
  });

  it('only the first request waits, and the key works again when D1 does', async () => {
    const { key } = await newTenant();
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    await chat(key, {}, isolate);
    d1.be('stalled');
    later(20_000);
    await chat(key, {}, isolate);
    const started = performance.now();
    for (let i = 0; i < 10; i++) expect((await chat(key, {}, isolate)).status).toBe(200);
    // Each would wait for two seconds.
    expect(performance.now() - started).toBeLessThan(10_000);
    d1.be('good');
    later(30_000);
    const { key: other } = await newTenant();
    await soon(async () => expect((await chat(other, {}, isolate)).status).toBe(200));
  });

  it('a key unseen for an hour is no longer believed', async () => {
    const { key } = await newTenant();
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    expect((await chat(key, {}, isolate)).status).toBe(200);
    d1.be('failing');
    later(3_600_001);
    expect(await errorCode(chat(key, {}, isolate))).toBe('503 configuration_unavailable');
  });
});

it('a wrong key in a loop asks D1 once in 2 s', async () => {
  const d1 = badD1();
  const isolate = freshIsolate({ DB: d1.DB });
  for (let i = 0; i < 20; i++) {
    expect(await errorCode(chat('mr_live_wrong', {}, isolate))).toBe('401 invalid_api_key');
  }
  expect(d1.asked()).toBe(1);
});

describe("a tenant's own admin key", () => {
  it('sees and changes its tenant only', async () => {
    const [own, other] = [await newTenant(), await newTenant()];
    const { key } = await newKey({ tenant: own.tenant, kind: 'tenant_admin' });
    const get = async (path: string) =>
      await (await admin('GET', path, undefined, key)).json<{ data: { id: string; tenant: string }[] }>();
    expect((await get('/tenants')).data.map(({ id }) => id)).toEqual([own.tenant]);
    expect(new Set((await get('/keys')).data.map(({ tenant }) => tenant))).toEqual(new Set([own.tenant]));

    const made = await admin('POST', '/keys', { name: 'mine' }, key);
    expect(made.status).toBe(201);
    expect(await made.json()).toMatchObject({ tenant: own.tenant, kind: 'tenant' });

    const refused: [string, string, unknown?][] = [
      ['POST', '/tenants', { id: 'another', name: 'x' }],
      ['POST', '/keys', { name: 'x', tenant: other.tenant }],
      ['GET', `/keys?tenant=${other.tenant}`],
      ['GET', `/mask-sets?tenant=${other.tenant}`],
      ['GET', `/publications?tenant=${other.tenant}`],
      ['POST', '/publications/rollback', { tenant: other.tenant }],
    ];
    for (const [method, path, body] of refused) {
      expect(await errorCode(admin(method, path, body, key)), path).toBe('403 forbidden');
    }
    expect(await errorCode(admin('DELETE', `/keys/${other.keyId}`, undefined, key))).toBe('404 not_found');
    expect((await chat(other.key)).status).toBe(200);
    const escalation = admin('POST', '/keys', { name: 'x', kind: 'admin', tenant: '' }, key);
    expect(await errorCode(escalation)).toBe('403 forbidden');
  });
});
