/**
 * The token with which edge and backend authenticate to each other: a JWT signed with the backend key (HMAC-SHA256).
 *
 * The backend key itself is never sent. A token is for one address and one purpose and expires after a minute, so a
 * stolen token is of little use.
 */
import { sign, verify } from 'hono/jwt';
import { z } from 'zod';
import { MaskrouteError } from './errors.ts';

/** The encoded header of every token. Tokens with another algorithm are refused (algorithm confusion). */
export const TOKEN_PREFIX = `${btoa('{"alg":"HS256","typ":"JWT"}')}.`;
export const TOKEN_LIFETIME_s = 60;
/** Largest tolerated difference between the two clocks. */
export const TOKEN_SKEW_s = 30;
const TOKEN_CHARS_MAX = 2048;

const claimsSchema = z.strictObject({
  /** Tenant id, for the backend's logs, fair scheduling, and separation of prefix caches. */
  tenant: z.string().max(100),
  issuedAt_s: z.int(),
  expiresAt_s: z.int(),
  nonce: z.string().min(8).max(64),
  /** URL from which the backend may fetch unknown masks, as the edge's operator configured it; empty: none. */
  edge: z.string().max(500),
  /** The address of the backend or edge that the token is for. All others refuse it. */
  audience: z.string().max(500).optional(),
  /**
   * `jobs`: lets the edge manage the backend's jobs. `masks`: lets a backend fetch masks from the edge. Absent: lets
   * the edge send requests. A version that does not know a scope refuses the token.
   */
  scope: z.enum(['jobs', 'masks']).optional(),
});
type TokenClaims = z.infer<typeof claimsSchema>;

/** A token's claims without its times and nonce. */
export type TokenPurpose = Omit<TokenClaims, 'issuedAt_s' | 'expiresAt_s' | 'nonce'>;
export type SignFor = (purpose: TokenPurpose) => Promise<string>;

/** Node and workerd have different `CryptoKey` types; this is the present one. */
type TokenKey = Awaited<ReturnType<typeof crypto.subtle.importKey>>;

const encoder = new TextEncoder();

export const importTokenKey = (backendKey: string): Promise<TokenKey> =>
  crypto.subtle.importKey('raw', encoder.encode(backendKey), { name: 'HMAC', hash: 'SHA-256' }, false, [
    'sign',
    'verify',
  ]);

/**
 * Returns a function that verifies tokens signed with any of the keys: during a rotation both sides accept the old and
 * the new key. It throws a MaskrouteError: `invalid_api_key` for a forged, malformed or too long-lived token,
 * `expired_token` outside its time by the verifier's clock.
 * @param verifier whose clock `now_s` is; for the message.
 */
export function createVerifier(
  backendKeys: readonly string[],
  verifier: 'backend' | 'edge',
): (token: string, now_s: number) => Promise<TokenClaims> {
  let tokenKeys: Promise<TokenKey[]> | undefined;
  return async (token, now_s) => {
    tokenKeys ??= Promise.all(backendKeys.map(importTokenKey));
    for (const key of await tokenKeys) {
      const claims = await signedBy(key, token);
      if (claims !== undefined) return claimsOf(claims, now_s, verifier);
    }
    throw notValid();
  };
}

/** The token's claims; undefined if this key did not sign it. */
async function signedBy(key: TokenKey, token: string): Promise<unknown> {
  const isToken = token.length <= TOKEN_CHARS_MAX && token.startsWith(TOKEN_PREFIX);
  return isToken ? await verify(token, key, 'HS256').catch(() => undefined) : undefined;
}

function claimsOf(signed: unknown, now_s: number, verifier: 'backend' | 'edge'): TokenClaims {
  const claims = claimsSchema.safeParse(signed);
  if (!claims.success) throw notValid();
  requireTime(claims.data, now_s, verifier);
  return claims.data;
}

const notValid = () => new MaskrouteError('invalid_api_key', 'The service token is not valid.');

/** Returns a function that signs tokens. Importing the key costs more than signing, so it is done once. */
export function createSigner(backendKey: string): SignFor {
  let tokenKey: Promise<TokenKey> | undefined;
  /** Nonces must be unique, not secret: a random prefix for each signer, and a counter. */
  let signer: string | undefined;
  let signed = 0;
  return async (purpose) => {
    tokenKey ??= importTokenKey(backendKey);
    signer ??= crypto.randomUUID();
    const issuedAt_s = Math.floor(Date.now() / 1000);
    const expiresAt_s = issuedAt_s + TOKEN_LIFETIME_s;
    return await signToken(await tokenKey, {
      ...purpose,
      issuedAt_s,
      expiresAt_s,
      nonce: `${signer}.${signed++}`,
    });
  };
}

export const signToken = (key: TokenKey, claims: TokenClaims): Promise<string> => sign(claims, key, 'HS256');

/** Whether a token is for this address; different spellings of a URL are equal. */
export const isFor = ({ audience }: TokenClaims, address: string): boolean =>
  audience !== undefined && spelled(audience) === spelled(address);

const spelled = (address: string): string =>
  (URL.canParse(address) ? new URL(address).href : address).replace(/\/+$/, '');

/** The message is not sent to clients; the edge logs it. */
function requireTime({ issuedAt_s, expiresAt_s }: TokenClaims, now_s: number, verifier: string): void {
  // Nonces are remembered only for a token's lifetime, so no token may live longer.
  if (expiresAt_s - issuedAt_s > TOKEN_LIFETIME_s) {
    throw new MaskrouteError('invalid_api_key', 'The service token lives longer than it may.');
  }
  const outside =
    issuedAt_s - TOKEN_SKEW_s > now_s
      ? `was issued ${issuedAt_s - now_s} s in the future`
      : expiresAt_s + TOKEN_SKEW_s < now_s
        ? `ended ${now_s - expiresAt_s} s ago`
        : undefined;
  if (outside === undefined) return;
  const advice = `the clocks of edge and backend may differ by ${TOKEN_SKEW_s} s`;
  throw new MaskrouteError(
    'expired_token',
    `The service token ${outside} by this ${verifier}'s clock; ${advice}.`,
  );
}
