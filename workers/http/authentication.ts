/** Three kinds of callers, three doors: tenants, those who administrate, and backends. */
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex } from '@noble/hashes/utils.js';
import { createMiddleware } from 'hono/factory';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { importTokenKey, isFor, type TokenKey, verifyToken } from '../../shared/wire/service-token.ts';
import type { Config } from '../env.ts';
import { BURST } from '../limits.ts';
import { networkOf } from '../routing/assignment.ts';
import { bearerKey, type Caller } from '../tenants/api-keys.ts';
import { type AdminCaller, type AppContext, type AppEnv, holdOf } from './context.ts';
import { adminCaller, ROOT, readSession } from './sessions.ts';

/* Hashing and comparing secrets, and the door for backends. */

const encoder = new TextEncoder();

/** 64 hexadecimal digits. */
export const sha256Hex = (text: string): string => bytesToHex(sha256(encoder.encode(text)));

/** Compares digests in constant time, so neither the content nor the length of the secret shows in the time. */
export function sameSecret(given: string, secret: string): boolean {
  return crypto.subtle.timingSafeEqual(sha256(encoder.encode(given)), sha256(encoder.encode(secret)));
}

/**
 * Lets backends ask for masks, with a token that one of them signed for this edge and for that alone; a token of the edge
 * itself, for a backend, opens nothing here, and neither does the backend key. A token may come twice: what it gets is
 * what its id says, every time, and isolates share no memory of those that were used.
 * The result throws MaskrouteError `invalid_api_key`, `expired_token`, or `configuration_unavailable` when nobody said
 * which address is this edge's.
 */
export function createMaskDoor({
  BACKEND_KEY,
  EDGE_URL,
}: Pick<Config, 'BACKEND_KEY' | 'EDGE_URL'>): (token: string) => Promise<void> {
  let tokenKey: Promise<TokenKey> | undefined;
  return async (token) => {
    tokenKey ??= importTokenKey(BACKEND_KEY);
    const claims = await verifyToken(await tokenKey, token, Math.floor(Date.now() / 1000), 'edge');
    if (claims.scope !== 'masks') {
      throw new MaskrouteError('invalid_api_key', 'The service token is for something else than masks.');
    }
    if (EDGE_URL === undefined) {
      const message = 'This edge does not know its own address: EDGE_URL is not configured.';
      throw new MaskrouteError('configuration_unavailable', message);
    }
    if (!isFor(claims, EDGE_URL)) {
      throw new MaskrouteError('invalid_api_key', 'The service token is for another edge.');
    }
  };
}

/** `bytes` random bytes as hexadecimal. */
export const randomHex = (bytes: number): string => bytesToHex(crypto.getRandomValues(new Uint8Array(bytes)));

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
  const isRoot = sameSecret(key, c.get('services').config.ADMIN_KEY);
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
