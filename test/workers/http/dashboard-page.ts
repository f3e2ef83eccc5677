/** The dashboard's session and its page, as a browser meets them. */
import { createExecutionContext } from 'cloudflare:test';
import { env } from 'cloudflare:workers';
import { sign } from 'hono/jwt';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { type CreatedKey, CSRF_HEADER, type Session } from '../../../shared/admin/admin-wire.ts';
import type { TrafficSample } from '../../../shared/admin/stats-wire.ts';
import { TRIAL_HEADERS } from '../../../shared/wire/protocol.ts';
import edge from '../../../workers/index.ts';
import { SESSION_LIFETIME_s } from '../../../workers/limits.ts';
import { ADMIN_KEY, EDGE_URL } from '../../support/edge/constants.ts';
import {
  admin,
  badD1,
  CHAT,
  call,
  chat,
  created,
  errorCode,
  freshIsolate,
  goLive,
  hurry,
  later,
  newKey,
  newTenant,
  say,
  soon,
} from '../support/edge.ts';

afterEach(() => {
  vi.useRealTimers();
});

const OWN = { origin: EDGE_URL };

const login = (key: string, headers: Record<string, string> = OWN) =>
  call('POST', '/dashboard/session', { body: { key }, headers });

/** A browser that has logged in: it sends the cookie, and with `csrf` what the page sends too. */
async function browser(key: string) {
  const response = await login(key);
  expect(response.status).toBe(200);
  const session = await response.json<Session>();
  const cookie = response.headers.get('set-cookie')!.split(';')[0]!;
  const asPage = { ...OWN, cookie, [CSRF_HEADER]: session.csrf };
  return { session, cookie, asPage, setCookie: response.headers.get('set-cookie')! };
}

describe('a session', () => {
  it('opens with an admin key, and its cookie is for this host, https and no script', async () => {
    const { session, setCookie } = await browser(ADMIN_KEY);
    expect(session).toMatchObject({ actor: 'root', tenant: null });
    expect(setCookie).toMatch(/^__Host-maskroute-session=/);
    for (const part of ['HttpOnly', 'Secure', 'SameSite=Strict', 'Path=/', 'Expires=']) {
      expect(setCookie).toContain(part);
    }
    expect(setCookie).not.toContain(ADMIN_KEY);
    expect(atob(setCookie.split('.')[1]!)).not.toContain(ADMIN_KEY);
  });

  it('does not open with a wrong key, a key that sends completions, or from another page', async () => {
    const { key } = await newTenant();
    expect(await errorCode(login('wrong-key-0123456789'))).toBe('401 invalid_api_key');
    expect(await errorCode(login(key))).toBe('403 forbidden');
    expect(await errorCode(login(ADMIN_KEY, { origin: 'https://evil.test' }))).toBe('403 forbidden');
    expect(await errorCode(login(ADMIN_KEY, {}))).toBe('403 forbidden');
    for (const body of [{}, { key: 1 }, { key: 'k'.repeat(513) }, { key: 'k', more: 1 }, '{', null]) {
      const answer = await call('POST', '/dashboard/session', { body, headers: OWN });
      expect(answer.status).toBe(400);
    }
  });

  it('takes the place of a key in the admin API, and changes things only when the page asks', async () => {
    const { cookie, asPage } = await browser(ADMIN_KEY);
    const create = (id: string, headers: Record<string, string>) =>
      call('POST', '/admin/v1/tenants', { body: { id, name: id }, headers });
    expect((await call('GET', '/admin/v1/tenants', { headers: { cookie } })).status).toBe(200);
    expect((await create('by-page', asPage)).status).toBe(201);
    const forged: Record<string, string>[] = [
      { cookie },
      { ...OWN, cookie },
      { ...asPage, origin: 'https://evil.test' },
      { ...asPage, origin: 'null' },
      { ...asPage, [CSRF_HEADER]: '0'.repeat(32) },
      { cookie, [CSRF_HEADER]: asPage[CSRF_HEADER]! },
    ];
    for (const headers of forged) expect(await errorCode(create('forged', headers))).toBe('403 forbidden');
    expect(await (await admin('GET', '/tenants')).text()).not.toContain('forged');
  });

  it('of a tenant sees that tenant only', async () => {
    const own = await newTenant();
    const other = await newTenant();
    const { key } = await newKey({ tenant: own.tenant, kind: 'tenant_admin' });
    const { session, cookie } = await browser(key);
    expect(session.tenant).toBe(own.tenant);
    const keys = (tenant: string) => call('GET', `/admin/v1/keys?tenant=${tenant}`, { headers: { cookie } });
    expect((await keys(own.tenant)).status).toBe(200);
    expect(await errorCode(keys(other.tenant))).toBe('403 forbidden');
  });

  it('ends with its time, with its key, and with the admin key that signs it', async () => {
    const { tenant } = await newTenant();
    const { key, id } = await newKey({ tenant, kind: 'tenant_admin' });
    const ofKey = await browser(key);
    const ask = (cookie: string) => call('GET', '/admin/v1/tenants', { headers: { cookie } });
    expect((await ask(ofKey.cookie)).status).toBe(200);
    await admin('DELETE', `/keys/${id}`);
    expect(await errorCode(ask(ofKey.cookie))).toBe('401 invalid_api_key');

    const ofRoot = await browser(ADMIN_KEY);
    const elsewhere = freshIsolate({ ADMIN_KEY: 'another-admin-key-000000' });
    const headers = { cookie: ofRoot.cookie };
    const answer = call('GET', '/admin/v1/tenants', { headers }, elsewhere);
    expect(await errorCode(answer)).toBe('401 invalid_session');
    later(9 * 3_600_000);
    expect(await errorCode(ask(ofRoot.cookie))).toBe('401 invalid_session');
  });

  it('cannot be forged', async () => {
    const { cookie } = await browser(ADMIN_KEY);
    const name = cookie.split('=')[0]!;
    const exp = Math.floor(Date.now() / 1000) + 600;
    const payload = { sub: 'root', key: null, csrf: '0'.repeat(32), exp };
    const unsigned = `${btoa('{"alg":"none","typ":"JWT"}')}.${btoa(JSON.stringify(payload))}.`;
    const tokens = [
      'x',
      '',
      unsigned.replaceAll('=', ''),
      await sign(payload, ADMIN_KEY, 'HS256'),
      `${cookie.slice(name.length + 1, -4)}AAAA`,
    ];
    for (const token of tokens) {
      const answer = call('GET', '/admin/v1/tenants', { headers: { cookie: `${name}=${token}` } });
      expect(await errorCode(answer), token).toBe('401 invalid_session');
    }
  });

  it('is told to the page, and ends when it logs out', async () => {
    const { session, cookie, asPage } = await browser(ADMIN_KEY);
    const ask = (headers: Record<string, string>) => call('GET', '/dashboard/session', { headers });
    expect(await (await ask({ cookie })).json()).toEqual(session);
    expect((await ask({})).status).toBe(204);
    const forged = call('DELETE', '/dashboard/session', { headers: { cookie } });
    expect(await errorCode(forged)).toBe('403 forbidden');
    const out = await call('DELETE', '/dashboard/session', { headers: asPage });
    expect(out.status).toBe(204);
    expect(out.headers.get('set-cookie')).toMatch(/^__Host-maskroute-session=;.*Max-Age=0/);
  });

  it('opens no door to completions', async () => {
    const { asPage } = await browser(ADMIN_KEY);
    expect(await errorCode(call('GET', '/v1/models', { headers: asPage }))).toBe('401 invalid_api_key');
  });

  it('over http, as on one machine, has a cookie that a browser keeps without https', async () => {
    const request = new Request('http://localhost:8787/dashboard/session', {
      method: 'POST',
      headers: { origin: 'http://localhost:8787', 'content-type': 'application/json' },
      body: JSON.stringify({ key: ADMIN_KEY }),
    });
    const response = await edge.fetch(request as never, env, createExecutionContext());
    expect(response.headers.get('set-cookie')).toMatch(/^maskroute-session=(?!.*Secure)/);
  });
});

describe('a session that is ended', () => {
  type Ask = ReturnType<typeof freshIsolate>;
  const ask = (cookie: string, isolate?: Ask) =>
    call('GET', '/admin/v1/tenants', { headers: { cookie } }, isolate);
  const logOut = (headers: Record<string, string>, query = '', isolate?: Ask) =>
    call('DELETE', `/dashboard/session${query}`, { headers }, isolate);
  const ENDED = '401 invalid_session';

  it('is over for who copied its cookie, in every isolate within 5 s, and others go on', async () => {
    const [mine, other] = [await browser(ADMIN_KEY), await browser(ADMIN_KEY)];
    const elsewhere = freshIsolate();
    for (const { cookie } of [mine, other]) expect((await ask(cookie, elsewhere)).status).toBe(200);
    expect((await logOut(mine.asPage)).status).toBe(204);
    expect(await errorCode(ask(mine.cookie))).toBe(ENDED);
    expect(await errorCode(call('GET', '/dashboard/session', { headers: { cookie: mine.cookie } }))).toBe(
      ENDED,
    );
    expect(await errorCode(ask(mine.cookie, freshIsolate()))).toBe(ENDED);
    later(5_000);
    expect(await errorCode(ask(mine.cookie, elsewhere))).toBe(ENDED);
    for (const isolate of [undefined, elsewhere]) expect((await ask(other.cookie, isolate)).status).toBe(200);
    // It may log out again, but end no others.
    expect((await logOut(mine.asPage)).status).toBe(204);
    expect(await errorCode(logOut(mine.asPage, '?everywhere=true'))).toBe(ENDED);
    // Else one session would end, and its owner would believe that all had.
    for (const query of ['?everywhere=1', '?everywhere=true&everywhere=true']) {
      expect(await errorCode(logOut(other.asPage, query))).toBe('400 invalid_request');
    }
    expect((await ask(other.cookie)).status).toBe(200);
  });

  it('may be all of a key: those of others and later ones go on', async () => {
    const { tenant } = await newTenant();
    const ofTenant = await newKey({ tenant, kind: 'tenant_admin' });
    const keys = [ADMIN_KEY, (await newKey({ kind: 'admin' })).key, ofTenant.key];
    for (const key of keys) {
      const sessions = [await browser(key), await browser(key), await browser(key)];
      const others = await Promise.all(keys.filter((other) => other !== key).map(browser));
      const elsewhere = freshIsolate();
      for (const { cookie } of sessions) expect((await ask(cookie, elsewhere)).status).toBe(200);
      later(1);
      if (key === ofTenant.key) expect((await admin('DELETE', '/sessions', undefined, key)).status).toBe(200);
      else expect((await logOut(sessions[0]!.asPage, '?everywhere=true')).status).toBe(204);
      later(5_000);
      for (const { cookie } of sessions) {
        for (const isolate of [undefined, elsewhere]) {
          expect(await errorCode(ask(cookie, isolate))).toBe(ENDED);
        }
      }
      for (const { cookie } of others) expect((await ask(cookie)).status).toBe(200);
      expect((await ask((await browser(key)).cookie, elsewhere)).status).toBe(200);
    }
  });

  it('is forgotten once it would be over by itself', async () => {
    const over_ms = Date.now() - SESSION_LIFETIME_s * 1000 - 1_000;
    const rows = [`('session:old', ${over_ms})`, `('session:late', ${over_ms + 60_000})`];
    await env.DB.exec(`insert into ended_sessions values ${rows.join()}`);
    const { key } = await newKey({ kind: 'admin' });
    expect((await admin('DELETE', '/sessions', undefined, key)).status).toBe(200);
    const { results } = await env.DB.prepare(
      "select subject from ended_sessions where subject in ('session:old', 'session:late')",
    ).all();
    expect(results).toEqual([{ subject: 'session:late' }]);
  });

  it('goes with the key that is rotated, though the key works on for a while', async () => {
    const { key, id } = await newKey({ kind: 'admin' });
    const { cookie } = await browser(key);
    const elsewhere = freshIsolate();
    expect((await ask(cookie, elsewhere)).status).toBe(200);
    later(1);
    await created(admin('POST', `/keys/${id}/rotate`, { overlap_s: 3_600 }));
    expect(await errorCode(ask(cookie))).toBe(ENDED);
    later(5_000);
    expect(await errorCode(ask(cookie, elsewhere))).toBe(ENDED);
    expect((await admin('GET', '/tenants', undefined, key)).status).toBe(200);
  });

  it('names the same person with the next keys of a rotation, and another one with another key', async () => {
    const { tenant } = await newTenant();
    const first = await newKey({ tenant, kind: 'tenant_admin' });
    const { session } = await browser(first.key);
    expect(session).toMatchObject({ actor: first.id, person: first.id });
    let last = first;
    for (let i = 0; i < 2; i++) {
      last = await created<CreatedKey>(admin('POST', `/keys/${last.id}/rotate`, { overlap_s: 3_600 }));
      const again = await browser(last.key);
      expect(again.session).toMatchObject({ actor: last.id, person: first.id, tenant, role: session.role });
      const resumed = await call('GET', '/dashboard/session', { headers: { cookie: again.cookie } });
      expect(await resumed.json()).toMatchObject({ person: first.id });
    }
    const other = await newKey({ tenant, kind: 'tenant_admin' });
    expect((await browser(other.key)).session.person).toBe(other.id);
    expect((await browser(ADMIN_KEY)).session.person).toBe('root');
  });

  it('is ended by who manages the key, and by no other tenant', async () => {
    const [own, other] = [await newTenant(), await newTenant()];
    const { key, id } = await newKey({ tenant: own.tenant, kind: 'tenant_admin' });
    const { key: foreign } = await newKey({ tenant: other.tenant, kind: 'tenant_admin' });
    const { cookie } = await browser(key);
    const end = (by: string) => admin('DELETE', `/keys/${id}/sessions`, undefined, by);
    expect(await errorCode(end(foreign))).toBe('404 not_found');
    expect((await ask(cookie)).status).toBe(200);
    later(1);
    expect(await (await end(ADMIN_KEY)).json()).toMatchObject({ actor: id });
    expect(await errorCode(ask(cookie))).toBe(ENDED);
  });

  it.each(['stalled', 'failing'] as const)(
    'while D1 is %s is let in nowhere for longer than 5 s',
    { timeout: 40_000 },
    async (mood) => {
      const d1 = badD1();
      const isolate = freshIsolate({ DB: d1.DB });
      const [mine, copied, fresh] = [
        await browser(ADMIN_KEY),
        await browser(ADMIN_KEY),
        await browser(ADMIN_KEY),
      ];
      const page = (cookie: string) => call('GET', '/dashboard/session', { headers: { cookie } }, isolate);
      for (const { cookie } of [mine, copied]) expect((await page(cookie)).status).toBe(200);
      d1.be(mood);
      // Ended through this isolate, which cannot write it down but knows it; and through another one.
      hurry();
      const out = await logOut(mine.asPage, '', isolate);
      vi.useRealTimers();
      expect(out.status).toBe(503);
      expect(out.headers.get('set-cookie')).toMatch(/Max-Age=0/);
      expect(await errorCode(page(mine.cookie))).toBe(ENDED);
      expect((await logOut(copied.asPage)).status).toBe(204);
      expect(await errorCode(page(fresh.cookie))).toBe('503 configuration_unavailable');
      later(5_001);
      expect(await errorCode(page(copied.cookie))).toBe('503 configuration_unavailable');
      d1.be('good');
      await vi.waitFor(async () => {
        later(2_000);
        expect((await page(fresh.cookie)).status).toBe(200);
        expect(await errorCode(page(copied.cookie))).toBe(ENDED);
      }, 10_000);
      expect(await errorCode(page(mine.cookie))).toBe(ENDED);
    },
  );
});

describe('the page', () => {
  it('is the same for every path of it, and lets nothing run that is not its own', async () => {
    const first = await (await call('GET', '/dashboard')).text();
    expect(first).toContain('<div id="app">');
    for (const path of ['/dashboard/', '/dashboard/keys', '/dashboard/no/such/page']) {
      const response = await call('GET', path);
      expect(await response.text()).toBe(first);
      expect(response.headers.get('content-type')).toContain('text/html');
      const policy = response.headers.get('content-security-policy')!;
      expect(policy).toContain("default-src 'none'");
      expect(policy).not.toMatch(/unsafe|\*/);
      expect(response.headers.get('x-content-type-options')).toBe('nosniff');
      expect(response.headers.get('x-frame-options')).toBe('DENY');
      expect(response.headers.get('cache-control')).toBe('no-cache');
    }
  });

  it('loads files that never change, and says so when there is none', async () => {
    const html = await (await call('GET', '/dashboard')).text();
    const files = [...html.matchAll(/"(\/dashboard\/assets\/[^"]+)"/g)].map(([, file]) => file!);
    expect(files).toHaveLength(2);
    for (const file of files) {
      const response = await call('GET', file);
      expect(response.status).toBe(200);
      expect(response.headers.get('content-type')).toMatch(/javascript|css/);
      expect(response.headers.get('cache-control')).toContain('immutable');
      await response.body?.cancel();
    }
    expect(await errorCode(call('GET', '/dashboard/assets/none.js'))).toBe('404 not_found');
    expect(await errorCode(call('POST', '/dashboard/keys', { body: {} }))).toBe('405 method_not_allowed');
    expect(await errorCode(call('PUT', '/dashboard/session', { body: {} }))).toBe('405 method_not_allowed');
  });
});

describe('of the assets', () => {
  it('nothing but the files of the page is delivered, however the path is written', async () => {
    const table = 'encoder/static.bin';
    const ups = ['../..', '..%2f..', '..%2F..', '%2e%2e%2f%2e%2e', '..%252f..', '%252e%252e%252f%252e%252e'];
    const backwards = ['..\\..', '..%5c..', '..%255c..', '.%2e%5C..'];
    const paths = [...ups, ...backwards].flatMap((up) => [
      ...[`assets/${up}/${table}`, `assets/${up}%2f${table.replace('/', '%2f')}`],
      ...[`assets/${up}%2fencoder%252fstatic.bin`, `assets/x/${up}/../${table}`],
    ]);
    const others = [
      'assets/',
      'assets',
      'assets/..%2findex.html',
      'assets/.%2f',
      'assets//encoder/static.bin',
    ];
    const asked: [method: string, path: string][] = [...paths, ...others].map((path) => ['GET', path]);
    for (const method of ['HEAD', 'POST', 'OPTIONS', 'PROPFIND']) asked.push([method, paths[4]!]);
    for (const [method, path] of asked) {
      const response = await call(method, `/dashboard/${path}`);
      const text = await response.text();
      const isPage = response.headers.get('content-type')?.includes('text/html') === true;
      expect(isPage || [404, 405].includes(response.status), `${method} ${path} ${response.status}`).toBe(
        true,
      );
      expect(text.length, `${method} ${path}`).toBeLessThan(10_000);
    }
    for (const path of ['/encoder/static.bin', '/dashboard/../encoder/static.bin', '//encoder/static.bin']) {
      expect((await call('GET', path)).status).toBe(404);
    }
  });

  it('the scripts that a script loads are delivered, too', async () => {
    const html = await (await call('GET', '/dashboard')).text();
    const [, main] = /"(\/dashboard\/assets\/[^"]+\.js)"/.exec(html)!;
    const script = await (await call('GET', main!)).text();
    const chunks = [...script.matchAll(/"\.\/([^"]+\.js)"/g)].map(([, name]) => name!);
    expect(chunks.length).toBeGreaterThan(0);
    for (const name of chunks) {
      const response = await call('GET', `/dashboard/assets/${name}`);
      expect(response.status, name).toBe(200);
      await response.body?.cancel();
    }
  });
});

/** Between two directions at a right angle, as it is kept. */
const DIAGONAL = Number(Math.SQRT2.toFixed(4));

describe('the traffic on the map', () => {
  const traffic = async (tenant: string, version: string, key?: string): Promise<TrafficSample[]> => {
    const response = await admin('GET', `/traffic?tenant=${tenant}&version=${version}`, undefined, key);
    expect(response.status).toBe(200);
    return (await response.json<{ data: TrafficSample[] }>()).data;
  };

  it('is a sample of the requests but trials, as distances, and each tenant sees its own', async () => {
    const { version } = await goLive('traffic');
    const own = await newTenant();
    const other = await newTenant();
    const trial = { [TRIAL_HEADERS.source]: 'playground' };
    const body = { ...CHAT, ...say('east is red') };
    await (await call('POST', '/v1/chat/completions', { key: own.key, body, headers: trial })).text();
    await (await chat(own.key, say('north is cold'))).text();
    await (await chat(own.key, say('east is red'))).text();
    await soon(async () => expect(await traffic(own.tenant, version)).toHaveLength(1));
    const [sample] = await traffic(own.tenant, version);
    expect(sample).toMatchObject({ cluster: 0, distances: [0, DIAGONAL, DIAGONAL] });
    expect(Object.keys(sample!).sort()).toEqual(['cluster', 'created_at', 'distances']);

    later(6_000);
    await (await chat(own.key, say('east is red'))).text();
    await soon(async () => expect(await traffic(own.tenant, version)).toHaveLength(2));
    expect((await traffic(own.tenant, version))[0]).toMatchObject({ cluster: 1 });
    expect(await traffic(other.tenant, version)).toEqual([]);
    const { key } = await newKey({ tenant: other.tenant, kind: 'tenant_admin' });
    expect(await traffic('', version, key)).toEqual([]);
    expect(
      await errorCode(admin('GET', `/traffic?tenant=${own.tenant}&version=${version}`, undefined, key)),
    ).toBe('403 forbidden');
    expect(await errorCode(admin('GET', '/traffic?version=latest'))).toBe('400 invalid_request');
  });
});
