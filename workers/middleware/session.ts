/** The dashboard's session: its cookie, and whom it stands for. */
import { deleteCookie, getCookie, setCookie } from 'hono/cookie';
import { createMiddleware } from 'hono/factory';
import { CSRF_HEADER, type Session } from '../../shared/dashboard.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import { type AdminCaller, type AppContext, type AppEnv, holdOf } from '../context.ts';
import type { Caller } from '../services/api-keys.ts';
import { requireIntent, type SessionClaims } from '../services/sessions.ts';

/** What an administrator sees is kept by no cache on the way, nor by the browser: some of it is a new key. */
export const noStore = createMiddleware<AppEnv>(async (c, next) => {
  c.header('cache-control', 'no-store');
  await next();
});

export const ROOT: AdminCaller = { actor: 'root', tenant: undefined };

/** @throws MaskrouteError `forbidden` for a key that sends completions. */
export function adminCaller(caller: Caller): AdminCaller {
  if (caller.kind === 'tenant') throw new MaskrouteError('forbidden', 'This key administrates nothing.');
  return { actor: caller.keyId, tenant: caller.kind === 'admin' ? undefined : caller.tenant };
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
 * The request's session; undefined when it has no cookie. The key behind it is looked up again, so revoking
 * the key ends the session.
 * @throws MaskrouteError `invalid_session` for one that has ended, what `readClaims` throws, and what looking up the
 * session and the key throws.
 */
export async function readSession(
  c: AppContext,
): Promise<{ admin: AdminCaller; claims: SessionClaims } | undefined> {
  const claims = await readClaims(c);
  if (claims === undefined) return undefined;
  const { sessions, apiKeys } = c.get('services');
  const hold = holdOf(c);
  const { keySha256 } = claims;
  const live = sessions.requireLive(claims, hold);
  // Asked at once, judged after the key: of both ends the key's says more.
  live.catch(() => {});
  const admin = keySha256 === null ? ROOT : adminCaller(await apiKeys.authenticateSha256(keySha256, hold));
  await live;
  return { admin, claims };
}

export const toSession = (admin: AdminCaller, claims: SessionClaims): Session => ({
  actor: admin.actor,
  tenant: admin.tenant ?? null,
  csrf: claims.csrf,
  expires_at: new Date(claims.expiresAt_s * 1000).toISOString(),
});

export function setSessionCookie(c: AppContext, token: string, expiresAt_s: number): void {
  setCookie(c, cookieName(c), token, { ...cookieScope(c), expires: new Date(expiresAt_s * 1000) });
}

export function clearSessionCookie(c: AppContext): void {
  deleteCookie(c, cookieName(c), cookieScope(c));
}

const isSecure = (c: AppContext): boolean => new URL(c.req.url).protocol === 'https:';

/** With the prefix the browser holds the cookie to this very host; it demands https, which a local edge lacks. */
const cookieName = (c: AppContext): string =>
  isSecure(c) ? '__Host-maskroute-session' : 'maskroute-session';

/** The admin API lies outside of the page's folder, so the path is the whole host. */
const cookieScope = (c: AppContext) =>
  ({ path: '/', httpOnly: true, sameSite: 'Strict', secure: isSecure(c) }) as const;
