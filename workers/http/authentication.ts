/**
 * Who may come in: tenants by their keys, administrators by theirs or by the session of the dashboard (a cookie that
 * stands in for the key), and backends by tokens that they sign.
 */
import { deleteCookie, getCookie, setCookie } from 'hono/cookie';
import { createMiddleware } from 'hono/factory';
import { CSRF_HEADER, type Session } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { networkOf } from '../base/place.ts';
import { sameSecret } from '../base/secrets.ts';
import { BURST } from '../limits.ts';
import { bearerKey, type Caller } from '../tenants/api-keys.ts';
import type { SessionClaims } from '../tenants/sessions.ts';
import { type AdminCaller, type AppContext, type AppEnv, holdOf } from './context.ts';

/**
 * A tenant's key. Other kinds are refused: a key that administrates should not sit in chat clients.
 * @throws MaskrouteError `rate_limit_exceeded` when the tenant sends more at once than any may, budget or not.
 */
export const tenantOnly = createMiddleware<AppEnv>(async (c, next) => {
  const caller = await authenticate(c, bearerKey(c.req.header('authorization')));
  if (caller.kind !== 'tenant') throw new MaskrouteError('forbidden', 'This key sends no completions.');
  const asked = c.get('services').bursts.tenant.enter(caller.tenant);
  if (asked !== undefined) await asked;
  c.set('caller', caller);
  await next();
});

/** The dashboard's session when no key comes along, else who the key belongs to. */
export const adminOnly = createMiddleware<AppEnv>(async (c, next) => {
  const authorization = c.req.header('authorization');
  const session = authorization === undefined ? await readSession(c) : undefined;
  const admin =
    session === undefined ? await adminOf(c, bearerKey(authorization)) : await within(c, session.admin);
  c.set('admin', admin);
  await next();
});

/** Who only reads changes nothing, but may end the sessions that are its own. */
export const mayChange = createMiddleware<AppEnv>(async (c, next) => {
  const isOwnSessions = c.req.path.endsWith('/sessions') && c.req.path.split('/').length === 4;
  if (c.get('admin').role === 'viewer' && !SAFE_METHODS.includes(c.req.method) && !isOwnSessions) {
    throw new MaskrouteError('forbidden', 'This key reads, and changes nothing.');
  }
  await next();
});

/**
 * The root key, a key of kind `admin`, or a tenant's own admin key (which is held to that tenant).
 *
 * The root key is compared first, in constant time, and nothing stands before it: whoever sends wrong keys, from whatever
 * address, must not keep the operator out. It needs no bound on guesses, since nobody guesses 96 random bits (`env.ts`
 * refuses a shorter one); all other keys are as random. Wrong ones are held to the rate of unknown keys, which is for the
 * database's sake.
 * @throws MaskrouteError `invalid_api_key`, `forbidden` for a key of another kind, `rate_limit_exceeded`.
 */
export async function adminOf(c: AppContext, key: string): Promise<AdminCaller> {
  const { ADMIN_KEY, ADMIN_KEY_2 } = c.get('services').config;
  const isSecond = ADMIN_KEY_2 !== undefined && sameSecret(key, ADMIN_KEY_2);
  const isRoot = sameSecret(key, ADMIN_KEY) || isSecond;
  return await within(c, isRoot ? ROOT : adminCaller(await authenticate(c, key)));
}

/**
 * Every question of an administrator is one to the database that all requests need. A tenant may make itself as many
 * admin keys as it likes, so all of them count together. @throws MaskrouteError `rate_limit_exceeded`.
 */
async function within(c: AppContext, admin: AdminCaller): Promise<AdminCaller> {
  const { actor, tenant } = admin;
  await c.get('services').bursts.admin.enter(tenant === undefined ? `key:${actor}` : `tenant:${tenant}`);
  return admin;
}

/**
 * A key that this isolate does not know costs a question to the database, so one address (of IPv6: one network) may have
 * only so many of them answered: whoever guesses keys must not take the database from those who have one. Keys that it
 * knows pass, whatever else comes from their address. Where nobody says who the client is there is no such limit.
 */
async function authenticate(c: AppContext, key: string): Promise<Caller> {
  const { apiKeys, config } = c.get('services');
  const network = apiKeys.isKnown(key) ? undefined : networkOf(c.req.raw, config.TRUSTED_FRONT);
  if (network !== undefined) {
    const outcome = await c.env.UNKNOWN_KEY_BURST?.limit({ key: network }).catch(() => undefined);
    if (outcome?.success === false) {
      throw new MaskrouteError('rate_limit_exceeded', 'Too many unknown keys from this address.', {
        retryAfter_s: BURST.window_s,
      });
    }
  }
  return await apiKeys.authenticate(key, holdOf(c));
}

/** A backend that asks for a mask. */
export const backendOnly = createMiddleware<AppEnv>(async (c, next) => {
  await c.get('services').expectBackend(bearerKey(c.req.header('authorization')));
  await next();
});

/* The dashboard's session: its cookie, and whom it stands for. */

/**
 * What an administrator sees is kept by no cache on the way, nor by the browser: some of it is a new key. It says what time
 * it is at the edge: times in it mean nothing by a clock that is wrong.
 */
export const noStore = createMiddleware<AppEnv>(async (c, next) => {
  c.header('cache-control', 'no-store');
  c.header('date', new Date().toUTCString());
  await next();
});

export const ROOT: AdminCaller = { actor: 'root', tenant: undefined, role: 'admin' };

/** @throws MaskrouteError `forbidden` for a key that sends completions. */
function adminCaller(caller: Caller): AdminCaller {
  if (caller.kind === 'tenant') throw new MaskrouteError('forbidden', 'This key administrates nothing.');
  return { actor: caller.keyId, tenant: caller.tenant || undefined, role: caller.kind };
}

/**
 * The claims of the request's session, ended or not; undefined when it has no cookie.
 * @throws MaskrouteError `invalid_session` for a bad cookie, `forbidden` when a request that changes something
 * does not prove that our page sent it.
 */
export async function readClaims(c: AppContext): Promise<SessionClaims | undefined> {
  const token = getCookie(c, cookieName(c));
  if (token === undefined) return undefined;
  const claims = await c.get('services').sessions.verify(token);
  requireIntent(c.req.raw, c.req.header(CSRF_HEADER), claims.csrf);
  return claims;
}

/**
 * The request's session; undefined when it has no cookie. The key behind it is looked up again, or the tenant of whoever
 * signed in without a key: a revoked key and a disabled tenant let nobody in.
 * @throws MaskrouteError `invalid_session` for a session that has ended, `tenant_disabled`, what `readClaims` throws, and
 * what looking up the session and the key throws.
 */
export async function readSession(
  c: AppContext,
): Promise<{ admin: AdminCaller; claims: SessionClaims } | undefined> {
  const claims = await readClaims(c);
  if (claims === undefined) return undefined;
  const { sessions, apiKeys } = c.get('services');
  const hold = holdOf(c);
  const { keySha256, grant, actor } = claims;
  const live = sessions.requireLive(claims, hold);
  // Asked at once, judged after the key: of both ends the key's says more.
  live.catch(() => {});
  const admin =
    grant !== null
      ? { actor, role: grant.role, tenant: grant.tenant ?? undefined }
      : keySha256 === null
        ? ROOT
        : adminCaller(await apiKeys.authenticateSha256(keySha256, hold));
  await live;
  return { admin, claims };
}

export const toSession = (admin: AdminCaller, claims: SessionClaims): Session => ({
  actor: admin.actor,
  tenant: admin.tenant ?? null,
  role: admin.role,
  csrf: claims.csrf,
  expires_at: new Date(claims.expiresAt_s * 1000).toISOString(),
});

export function setSessionCookie(c: AppContext, token: string, expiresAt_s: number): void {
  setCookie(c, cookieName(c), token, { ...cookieScope(c), expires: new Date(expiresAt_s * 1000) });
}

export function clearSessionCookie(c: AppContext): void {
  deleteCookie(c, cookieName(c), cookieScope(c));
}

export const isSecure = (c: AppContext): boolean => new URL(c.req.url).protocol === 'https:';

/** With the prefix the browser holds the cookie to this very host; it demands https, which a local edge lacks. */
const cookieName = (c: AppContext): string =>
  isSecure(c) ? '__Host-maskroute-session' : 'maskroute-session';

/** The admin API lies outside of the page's folder, so the path is the whole host. */
const cookieScope = (c: AppContext) =>
  ({ path: '/', httpOnly: true, sameSite: 'Strict', secure: isSecure(c) }) as const;

const SAFE_METHODS = ['GET', 'HEAD', 'OPTIONS'];

/** @throws MaskrouteError `forbidden` when another site's page made the browser send the request. */
export function requireOwnOrigin(request: Request): void {
  if (request.headers.get('origin') !== new URL(request.url).origin) {
    throw new MaskrouteError('forbidden', 'The request did not come from this page.');
  }
}

/**
 * A request that changes something comes from our own page and proves it twice: by its origin, which other
 * sites cannot forge, and by a token that they cannot read.
 * @throws MaskrouteError `forbidden`
 */
function requireIntent(request: Request, given: string | undefined, csrf: string): void {
  if (SAFE_METHODS.includes(request.method)) return;
  requireOwnOrigin(request);
  if (given === undefined || !sameSecret(given, csrf)) {
    throw new MaskrouteError('forbidden', 'The request lacks the token of its session.');
  }
}
