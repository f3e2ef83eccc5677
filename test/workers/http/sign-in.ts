/** Signing in through a real OpenID Connect provider. */

import { afterEach, expect, inject, it, vi } from 'vitest';
import { CSRF_HEADER, type Session, SIGN_IN_HEADER } from '../../../shared/admin/admin-wire.ts';
import type { Env } from '../../../workers/env.ts';
import { EDGE_URL } from '../../support/edge/constants.ts';
import { admin, badD1, call, errorCode, freshIsolate, newTenant } from '../support/edge.ts';

afterEach(() => void vi.useRealTimers());

const edge = (change: Partial<Env> = {}) =>
  freshIsolate({
    ...change,
    OIDC_ISSUER: inject('oidcUrl'),
    OIDC_CLIENT_ID: 'maskroute',
    OIDC_CLIENT_SECRET: 'a-secret-of-the-tests',
  });

const cookiesOf = (response: Response): string[] =>
  response.headers.getSetCookie().map((cookie) => cookie.split(';')[0]!);

/** What a browser does: it follows the provider's redirects until one leads to the edge. */
async function signIn(who: string, isolate: ReturnType<typeof freshIsolate>) {
  const begun = await call('GET', '/dashboard/sign-in', {}, isolate);
  expect(begun.status).toBe(302);
  let at = new URL(begun.headers.get('location')!);
  at.searchParams.set('login_hint', who);
  const jar = new Map<string, string>();
  while (at.origin !== EDGE_URL) {
    const cookie = [...jar].map(([name, value]) => `${name}=${value}`).join('; ');
    const response = await fetch(at, { redirect: 'manual', headers: { cookie } });
    for (const pair of cookiesOf(response)) jar.set(...(pair.split(/=(.*)/s, 2) as [string, string]));
    expect([302, 303], await response.clone().text()).toContain(response.status);
    at = new URL(response.headers.get('location')!, at);
  }
  return { callback: at.pathname + at.search, cookie: cookiesOf(begun)[0]! };
}

const back = (
  { callback, cookie }: Awaited<ReturnType<typeof signIn>>,
  isolate: ReturnType<typeof freshIsolate>,
) => call('GET', callback, { headers: { cookie } }, isolate);

it('gives a session with the role that the provider says, and every change its name', async () => {
  const { tenant } = await newTenant();
  const isolate = edge();
  expect((await call('GET', '/dashboard/session', {}, isolate)).headers.get(SIGN_IN_HEADER)).toMatch(/^127/);
  for (const [role, of] of [
    ['admin', null],
    ['viewer', null],
    ['tenant_admin', tenant],
    ['viewer', tenant],
  ] as const) {
    const who = of === null ? role : `${role}:${of}`;
    const response = await back(await signIn(who, isolate), isolate);
    expect(response.status).toBe(302);
    const cookie = cookiesOf(response).find((pair) => pair.includes('session'))!;
    const headers = { cookie };
    const resumed = await call('GET', '/dashboard/session', { headers }, isolate);
    // Whoever logs out needs the link to come back.
    expect(resumed.headers.get(SIGN_IN_HEADER)).toMatch(/^127/);
    const session = await resumed.json<Session>();
    expect(session).toMatchObject({ actor: `oidc:${who}`, role, tenant: of });
    const change = call(
      'PATCH',
      `/admin/v1/tenants/${tenant}`,
      { body: { name: who }, headers: { cookie, origin: EDGE_URL, [CSRF_HEADER]: session.csrf } },
      isolate,
    );
    expect((await change).status).toBe(role === 'viewer' ? 403 : 200);
    const log = await call('GET', `/admin/v1/audit?q=oidc:${who}`, { headers }, isolate);
    expect((await log.json<{ data: unknown[] }>()).data).toHaveLength(role === 'viewer' ? 0 : 1);
  }
});

it('is offered where it works alone', async () => {
  const half = freshIsolate({ OIDC_ISSUER: inject('oidcUrl') });
  expect((await call('GET', '/dashboard/session', {}, half)).headers.get(SIGN_IN_HEADER)).toBeNull();
  expect(await errorCode(call('GET', '/dashboard/sign-in', {}, half))).toBe('404 not_found');
});

it('gives nothing to who has no role, comes from another browser, or comes twice', async () => {
  const isolate = edge();
  const { tenant } = await newTenant();
  for (const who of ['nobody', `admin:${tenant}`, `tenant_admin:${tenant}:and-more`]) {
    expect(await errorCode(back(await signIn(who, isolate), isolate)), who).toBe('403 forbidden');
  }
  const ofNoTenant = await back(await signIn('tenant_admin:nowhere', isolate), isolate);
  expect([
    await errorCode(ofNoTenant),
    cookiesOf(ofNoTenant).filter((pair) => pair.includes('session')),
  ]).toEqual(['403 forbidden', []]);
  const begun = await signIn('admin', isolate);
  const other = await signIn('admin', isolate);
  expect(await errorCode(back({ ...begun, cookie: '' }, isolate))).toBe('401 invalid_session');
  expect(await errorCode(back({ ...begun, cookie: other.cookie }, isolate))).toBe('401 invalid_session');
  expect((await back(begun, isolate)).status).toBe(302);
  expect(await errorCode(back(begun, isolate))).toBe('401 invalid_session');
});

it('gives a session that, like a key, lets nobody in while its tenant is disabled, and asks D1 as rarely', async () => {
  const { tenant } = await newTenant();
  const d1 = badD1();
  const isolate = edge({ DB: d1.DB });
  const signedIn = await back(await signIn(`tenant_admin:${tenant}`, isolate), isolate);
  const cookie = cookiesOf(signedIn).find((pair) => pair.includes('session'))!;
  const session = () => call('GET', '/dashboard/session', { headers: { cookie } }, isolate);
  const isEnabled = async (enabled: boolean) => {
    expect((await admin('PATCH', `/tenants/${tenant}`, { enabled })).status).toBe(200);
    // A change of terms holds within 5 s.
    vi.setSystemTime(Date.now() + 5_001);
  };
  vi.useFakeTimers({ toFake: ['Date'] });
  expect((await session()).status).toBe(200);
  const asked = d1.asked();
  for (let i = 0; i < 3; i++) expect((await session()).status).toBe(200);
  expect(d1.asked()).toBe(asked);
  await isEnabled(false);
  expect(await errorCode(session())).toBe('403 tenant_disabled');
  const own = call('GET', `/admin/v1/tenants/${tenant}`, { headers: { cookie } }, isolate);
  expect(await errorCode(own)).toBe('403 tenant_disabled');
  await isEnabled(true);
  expect((await session()).status).toBe(200);
});

it('is not there without a provider, and says so when the provider is away', async () => {
  expect(await errorCode(call('GET', '/dashboard/sign-in'))).toBe('404 not_found');
  const away = freshIsolate({ OIDC_ISSUER: 'http://127.0.0.1:9', OIDC_CLIENT_ID: 'maskroute' });
  expect(await errorCode(call('GET', '/dashboard/sign-in', {}, away))).toBe('503 configuration_unavailable');
});
