/**
 * Authentication: tenants by their keys, administrators by theirs or by a dashboard session (a cookie in place of the
 * key), and backends by signed tokens.
 */
import { deleteCookie, getCookie, setCookie } from 'hono/cookie';
import { createMiddleware } from 'hono/factory';
import { CSRF_HEADER, ROLES, type Session } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { isFor } from '../../shared/wire/service-token.ts';
import { networkOf } from '../base/place.ts';
import { sameSecret, sha256Hex } from '../base/secrets.ts';
import { BURST } from '../limits.ts';
import { bearerKey, type Caller, firstKeyId } from '../tenants/api-keys.ts';
import type { SessionClaims } from '../tenants/sessions.ts';
import { type AdminCaller, type AppContext, type AppEnv, holdOf } from './context.ts';

/**
 * Requires a tenant's key, as a bearer or, from Azure's clients, in the header `api-key`. Other kinds are refused: admin keys
 * should not be used in chat clients.
 * @throws MaskrouteError `rate_limit_exceeded` when the tenant exceeds the burst limit, which holds with or without a
 * budget.
 */
export const tenantOnly = createMiddleware<AppEnv>(async (c, next) => {
  const azure = c.req.header('api-key');
  const authorization = c.req.header('authorization') ?? (azure && `Bearer ${azure}`);
  const caller = await authenticate(c, bearerKey(authorization));
  if (caller.kind !== 'tenant') throw new MaskrouteError('forbidden', 'This key may not send completions.');
  await c.get('services').bursts.tenant.enter(caller.tenant);
  c.set('caller', caller);
  await next();
});

/** Requires an administrator: by key, or without a key by the dashboard's session. */
export const adminOnly = createMiddleware<AppEnv>(async (c, next) => {
  const authorization = c.req.header('authorization');
  const session = authorization === undefined ? await readSession(c) : undefined;
  const admin =
    session === undefined ? await adminOf(c, bearerKey(authorization)) : await within(c, session.admin);
  c.set('admin', admin);
  await next();
});

/** Refuses changes by viewers, who may only end their own sessions. */
export const mayChange = createMiddleware<AppEnv>(async (c, next) => {
  const isOwnSessions = c.req.path.endsWith('/sessions') && c.req.path.split('/').length === 4;
  if (c.get('admin').role === 'viewer' && !SAFE_METHODS.includes(c.req.method) && !isOwnSessions) {
    throw new MaskrouteError('forbidden', 'This key may read, but not change anything.');
  }
  await next();
});

/**
 * The administrator of a key: the root key, a key of kind `admin`, or a tenant's own admin key (limited to that
 * tenant).
 *
 * The root key is compared first, in constant time and without a rate limit: wrong keys from any address must not lock
 * the operator out. Guessing needs no limit, since 96 random bits cannot be guessed (`env.ts` refuses shorter keys; all
 * other keys are as random). Wrong keys count against the limit of unknown keys, which protects the database.
 * @throws MaskrouteError `invalid_api_key`, `forbidden` for a key of another kind, `rate_limit_exceeded`.
 */
export async function adminOf(c: AppContext, key: string): Promise<AdminCaller> {
  const { ADMIN_KEY, ADMIN_KEY_2 } = c.get('services').config;
  const isSecond = ADMIN_KEY_2 !== undefined && sameSecret(key, ADMIN_KEY_2);
  const isRoot = sameSecret(key, ADMIN_KEY) || isSecond;
  return await within(c, isRoot ? ROOT : adminCaller(await authenticate(c, key)));
}

/**
 * Applies the administrators' rate limit, since each of their requests queries the shared database. A tenant can make
 * many admin keys, so they count together. @throws MaskrouteError `rate_limit_exceeded`.
 */
async function within(c: AppContext, admin: AdminCaller): Promise<AdminCaller> {
  const { actor, tenant } = admin;
  await c.get('services').bursts.admin.enter(tenant === undefined ? `key:${actor}` : `tenant:${tenant}`);
  return admin;
}

/**
 * Looks a key up. A key that this isolate does not know needs a database query, so each address (for IPv6: each
 * network) has a limit: guessing keys must not overload the database. Known keys pass, whatever else comes from their
 * address. Without a trusted proxy the address is unknown and there is no such limit.
 */
async function authenticate(c: AppContext, key: string): Promise<Caller> {
  const { apiKeys, config } = c.get('services');
  const sha256 = sha256Hex(key);
  const network = apiKeys.isKnown(sha256) ? undefined : networkOf(c.req.raw, config.TRUSTED_FRONT);
  if (network !== undefined) {
    const outcome = await c.env.UNKNOWN_KEY_BURST?.limit({ key: network }).catch(() => undefined);
    if (outcome?.success === false) {
      throw new MaskrouteError('rate_limit_exceeded', 'Too many unknown keys from this address.', {
        retryAfter_s: BURST.window_s,
      });
    }
  }
  return await apiKeys.authenticate(sha256, holdOf(c));
}

/**
 * Requires a token that a backend signed for this edge with the scope `masks`. The edge's own tokens for backends are
 * refused, and so is the backend key. Replays are not detected: isolates do not share used nonces, and a mask's content
 * is the same every time.
 * @throws MaskrouteError `invalid_api_key`, `expired_token`, or `configuration_unavailable` without `EDGE_URL`.
 */
export const backendOnly = createMiddleware<AppEnv>(async (c, next) => {
  const { config, verifyBackend } = c.get('services');
  const token = bearerKey(c.req.header('authorization'));
  const claims = await verifyBackend(token, Math.floor(Date.now() / 1000));
  if (claims.scope !== 'masks') {
    throw new MaskrouteError('invalid_api_key', 'The service token is not for masks.');
  }
  if (config.EDGE_URL === undefined) {
    const message = 'This edge does not know its own address: EDGE_URL is not configured.';
    throw new MaskrouteError('configuration_unavailable', message);
  }
  if (!isFor(claims, config.EDGE_URL)) {
    throw new MaskrouteError('invalid_api_key', 'The service token is for another edge.');
  }
  await next();
});

/* The dashboard's session and its cookie. */

/**
 * Forbids caching of administrators' answers, some of which contain a new key. The `Date` header tells the dashboard the
 * edge's time, since a browser's clock may be wrong.
 */
export const noStore = createMiddleware<AppEnv>(async (c, next) => {
  c.header('cache-control', 'no-store');
  await next();
  // Set last: with the time of its beginning a slow answer would look like a slow clock.
  c.header('date', new Date().toUTCString());
});

export const ROOT: AdminCaller = { actor: 'root', tenant: undefined, role: 'admin' };

/**
 * A kind that a later version of the edge stored must not have the rights of another one here.
 * @throws MaskrouteError `forbidden` for a key that sends completions, and for one of an unknown kind.
 */
function adminCaller(caller: Caller): AdminCaller {
  const role = ROLES.find((known) => known === caller.kind);
  if (role === undefined) throw new MaskrouteError('forbidden', 'This key is not an admin key.');
  return { actor: caller.keyId, tenant: caller.tenant || undefined, role };
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
 * The request's session; undefined when it has no cookie. Its key is looked up again, or for a sign-in without a key
 * its tenant: a revoked key or a disabled tenant ends access.
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
  // Queried in parallel but checked after the key, whose error says more.
  live.catch(() => {});
  const admin =
    grant !== null
      ? { actor, role: grant.role, tenant: grant.tenant ?? undefined }
      : keySha256 === null
        ? ROOT
        : adminCaller(await apiKeys.authenticate(keySha256, hold));
  await live;
  return { admin, claims };
}

export const toSession = (admin: AdminCaller, claims: SessionClaims): Session => ({
  actor: admin.actor,
  person: claims.keySha256 === null ? admin.actor : firstKeyId(admin.actor),
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

/** With the prefix `__Host-` the browser binds the cookie to this host; it requires https, which a local edge lacks. */
const cookieName = (c: AppContext): string =>
  isSecure(c) ? '__Host-maskroute-session' : 'maskroute-session';

/** The admin API is not below the page's path, so the cookie's path is `/`. */
const cookieScope = (c: AppContext) =>
  ({ path: '/', httpOnly: true, sameSite: 'Strict', secure: isSecure(c) }) as const;

export const SAFE_METHODS = ['GET', 'HEAD', 'OPTIONS'];

/** @throws MaskrouteError `forbidden` when another site's page made the browser send the request. */
export function requireOwnOrigin(request: Request): void {
  if (request.headers.get('origin') !== new URL(request.url).origin) {
    throw new MaskrouteError('forbidden', 'The request did not come from this page.');
  }
}

/**
 * CSRF protection: a request that changes something must have our own origin, which other sites cannot forge, and a
 * token that they cannot read.
 * @throws MaskrouteError `forbidden`
 */
function requireIntent(request: Request, given: string | undefined, csrf: string): void {
  if (SAFE_METHODS.includes(request.method)) return;
  requireOwnOrigin(request);
  if (given === undefined || !sameSecret(given, csrf)) {
    throw new MaskrouteError('forbidden', 'The request lacks the token of its session.');
  }
}
