/**
 * Sessions of the dashboard: a signed token (a JWT, HS256) that stands in for the admin key, so that the browser
 * never keeps the key. The signing key is derived from ADMIN_KEY (HKDF-SHA256, RFC 5869): a new ADMIN_KEY ends
 * every session, and nothing has to be stored.
 */
import { hkdf } from '@noble/hashes/hkdf.js';
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex, utf8ToBytes } from '@noble/hashes/utils.js';
import { sign, verify } from 'hono/jwt';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/errors.ts';
import { SESSION_LIFETIME_s } from '../limits.ts';
import { randomHex, sameSecret } from './secrets.ts';

/** `keySha256` finds the key again, so that revoking it ends its sessions; null for the root key. */
export type SessionClaims = {
  readonly actor: string;
  readonly keySha256: string | null;
  readonly csrf: string;
  readonly expiresAt_s: number;
};

export interface Sessions {
  issue(actor: string, keySha256: string | null): Promise<{ token: string; claims: SessionClaims }>;
  /** @throws MaskrouteError `invalid_session` for a token that is forged, malformed or too old. */
  read(token: string): Promise<SessionClaims>;
}

const INFO = 'maskroute dashboard session v1';
const KEY_BYTES = 32;
const CSRF_RANDOM_BYTES = 16;

const payloadSchema = z.object({
  sub: z.string().min(1),
  key: z
    .string()
    .regex(/^[0-9a-f]{64}$/)
    .nullable(),
  csrf: z.string().min(CSRF_RANDOM_BYTES * 2),
  exp: z.int(),
});

export function createSessions(adminKey: string): Sessions {
  const secret = bytesToHex(hkdf(sha256, utf8ToBytes(adminKey), undefined, utf8ToBytes(INFO), KEY_BYTES));
  return {
    async issue(actor, keySha256) {
      const issuedAt_s = Math.floor(Date.now() / 1000);
      const expiresAt_s = issuedAt_s + SESSION_LIFETIME_s;
      const csrf = randomHex(CSRF_RANDOM_BYTES);
      const payload = { sub: actor, key: keySha256, csrf, exp: expiresAt_s };
      const token = await sign(payload, secret, 'HS256');
      return { token, claims: { actor, keySha256, csrf, expiresAt_s } };
    },
    async read(token) {
      try {
        const { sub, key, csrf, exp } = payloadSchema.parse(await verify(token, secret, 'HS256'));
        return { actor: sub, keySha256: key, csrf, expiresAt_s: exp };
      } catch (error) {
        throw new MaskrouteError('invalid_session', 'The session has ended. Log in again.', { cause: error });
      }
    },
  };
}

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
export function requireIntent(request: Request, given: string | undefined, csrf: string): void {
  if (SAFE_METHODS.includes(request.method)) return;
  requireOwnOrigin(request);
  if (given === undefined || !sameSecret(given, csrf)) {
    throw new MaskrouteError('forbidden', 'The request lacks the token of its session.');
  }
}
