/**
 * Sessions of the dashboard: a signed token (a JWT, HS256) that stands in for the admin key, so that the browser
 * never keeps the key. The signing key is derived from ADMIN_KEY (HKDF-SHA256, RFC 5869): a new ADMIN_KEY ends
 * every session. D1 has those that were ended before their time, one by one or all of a key.
 */
import { hkdf } from '@noble/hashes/hkdf.js';
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex, utf8ToBytes } from '@noble/hashes/utils.js';
import { deleteCookie, getCookie, setCookie } from 'hono/cookie';
import { createMiddleware } from 'hono/factory';
import { sign, verify } from 'hono/jwt';
import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import { CSRF_HEADER, type Session } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { d1 } from '../db/d1.ts';
import { keySubject, sessionSubject } from '../db/key-rows.ts';
import { RETRY_AFTER_s, SESSION_ENDS, SESSION_ENDS_KNOWN_MAX, SESSION_LIFETIME_s } from '../limits.ts';
import { createSwrCache, type SourceHealth } from '../routing/swr-cache.ts';
import type { Caller } from '../tenants/api-keys.ts';
import { randomHex, sameSecret } from './authentication.ts';
import { type AdminCaller, type AppContext, type AppEnv, holdOf } from './context.ts';
import type { Hold } from './waiting.ts';

/** `keySha256` finds the key again, so that revoking it ends its sessions; null for the root key. */
type SessionClaims = {
  readonly id: string;
  /** The id of the key that opened it, or `root`. */
  readonly actor: string;
  readonly keySha256: string | null;
  readonly csrf: string;
  readonly issuedAt_ms: number;
  readonly expiresAt_s: number;
};

export interface Sessions {
  issue(actor: string, keySha256: string | null): Promise<{ token: string; claims: SessionClaims }>;
  /** Whose token it is, ended or not. @throws MaskrouteError `invalid_session`: forged, malformed or too old. */
  verify(token: string): Promise<SessionClaims>;
  /**
   * @throws MaskrouteError `invalid_session` for one that was ended, `configuration_unavailable` when that cannot be
   * found out.
   */
  requireLive(claims: SessionClaims, hold: Hold): Promise<void>;
  /** Ends one: here at once, whatever D1 says. @throws MaskrouteError `configuration_unavailable`: it goes on elsewhere. */
  end(claims: SessionClaims): Promise<void>;
  /** Ends all that a key, or `root`, opened until now; gives that time. @throws as `end`. */
  endAll(actor: string): Promise<number>;
  /** D1 has it from the key's revocation or rotation; makes it hold here at once. */
  noteEndOfAll(actor: string, endedAt_ms: number): void;
}

/** Where ends are kept. */
type SessionEnds = {
  /** 0: nobody ended it. */
  find(subject: string): Promise<number>;
  save(subject: string, endedAt_ms: number, over_ms: number): Promise<void>;
};

const INFO = 'maskroute dashboard session v1';
const KEY_BYTES = 32;
const CSRF_RANDOM_BYTES = 16;
const ID_RANDOM_BYTES = 12;

const payloadSchema = z.object({
  jti: z.string().min(ID_RANDOM_BYTES * 2),
  sub: z.string().min(1),
  key: z
    .string()
    .regex(/^[0-9a-f]{64}$/)
    .nullable(),
  csrf: z.string().min(CSRF_RANDOM_BYTES * 2),
  /** `iat` has seconds: who logs in right after all sessions ended is not to be taken for one of them. */
  iat_ms: z.int(),
  exp: z.int(),
});

export function createSessions(adminKey: string, ends: SessionEnds, health?: SourceHealth): Sessions {
  const secret = bytesToHex(hkdf(sha256, utf8ToBytes(adminKey), undefined, utf8ToBytes(INFO), KEY_BYTES));
  const cache = createSwrCache('ended sessions', ends.find, SESSION_ENDS, health);
  const known = new LRUCache<string, number>({ max: SESSION_ENDS_KNOWN_MAX });
  const note = (subject: string, endedAt_ms: number): void => {
    known.set(subject, Math.max(endedAt_ms, known.get(subject) ?? 0));
  };
  const save = async (subject: string, endedAt_ms: number): Promise<void> => {
    note(subject, endedAt_ms);
    await d1(ends.save(subject, endedAt_ms, endedAt_ms - SESSION_LIFETIME_s * 1000));
  };
  return {
    async issue(actor, keySha256) {
      const issuedAt_ms = Date.now();
      const expiresAt_s = Math.floor(issuedAt_ms / 1000) + SESSION_LIFETIME_s;
      const csrf = randomHex(CSRF_RANDOM_BYTES);
      const id = randomHex(ID_RANDOM_BYTES);
      const payload = { jti: id, sub: actor, key: keySha256, csrf, iat_ms: issuedAt_ms, exp: expiresAt_s };
      const token = await sign(payload, secret, 'HS256');
      return { token, claims: { id, actor, keySha256, csrf, issuedAt_ms, expiresAt_s } };
    },
    async verify(token) {
      try {
        const payload = payloadSchema.parse(await verify(token, secret, 'HS256'));
        const { jti: id, sub: actor, key: keySha256, csrf, iat_ms: issuedAt_ms, exp: expiresAt_s } = payload;
        return { id, actor, keySha256, csrf, issuedAt_ms, expiresAt_s };
      } catch (error) {
        throw hasEnded(error);
      }
    },
    async requireLive({ id, actor, issuedAt_ms }, hold) {
      const [session, key] = [sessionSubject(id), keySubject(actor)];
      const isEnded = (sessionEnd_ms = 0, keyEnd_ms = 0) => sessionEnd_ms > 0 || keyEnd_ms >= issuedAt_ms;
      // An end is for good, so one that is known needs no question.
      if (isEnded(known.get(session), known.get(key))) throw hasEnded();
      if (isEnded(cache.peek(session), cache.peek(key))) throw hasEnded();
      let found: (number | null)[];
      try {
        found = await Promise.all([cache.get(session, hold), cache.get(key, hold)]);
      } catch (error) {
        throw new MaskrouteError('configuration_unavailable', 'Sessions cannot be checked right now.', {
          retryAfter_s: RETRY_AFTER_s,
          cause: error,
        });
      }
      if (isEnded(...found.map((end_ms) => end_ms ?? 0))) throw hasEnded();
    },
    async end({ id }) {
      await save(sessionSubject(id), Date.now());
    },
    async endAll(actor) {
      const now_ms = Date.now();
      await save(keySubject(actor), now_ms);
      return now_ms;
    },
    noteEndOfAll: (actor, endedAt_ms) => note(keySubject(actor), endedAt_ms),
  };
}

const hasEnded = (cause?: unknown): MaskrouteError =>
  new MaskrouteError('invalid_session', 'The session has ended. Log in again.', { cause });

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

/* The dashboard's session: its cookie, and whom it stands for. */

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
