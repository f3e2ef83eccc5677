/**
 * The token that edge and backend sign for each other: a JWT with HMAC-SHA256 and the backend key.
 *
 * The backend key itself goes nowhere. A token is for one address, one purpose and a minute, so a caught token is worth
 * little.
 */
import { sign, verify } from 'hono/jwt';
import { z } from 'zod';
import { MaskrouteError } from './errors.ts';

/** The head of every token. A token that names another way to sign is refused, so that nobody is talked into it. */
export const TOKEN_PREFIX = `${btoa('{"alg":"HS256","typ":"JWT"}')}.`;
export const TOKEN_LIFETIME_s = 60;
/** How far the two clocks may be apart. */
export const TOKEN_SKEW_s = 30;
const TOKEN_CHARS_MAX = 2048;

const claimsSchema = z.strictObject({
  /** Tenant id: for the backend's logs, its turns, and whose prompts may begin with whose. */
  tenant: z.string().max(100),
  issuedAt_s: z.int(),
  expiresAt_s: z.int(),
  nonce: z.string().min(8).max(64),
  /** Where the backend may fetch masks that it does not know, as the edge's operator configured it; empty: nowhere. */
  edge: z.string().max(500),
  /** Whom it is for: a backend's address or the edge's. Everybody else refuses it. */
  audience: z.string().max(500).optional(),
  /**
   * `jobs`: for the edge's operator, who may have the backend learn. `masks`: a backend's, for the edge, which tells it
   * what a mask is. Absent: an edge's, for requests alone. A version that does not know a scope refuses it.
   */
  scope: z.enum(['jobs', 'masks']).optional(),
});
type TokenClaims = z.infer<typeof claimsSchema>;

/** What a token says beside its time and nonce. */
export type TokenPurpose = Omit<TokenClaims, 'issuedAt_s' | 'expiresAt_s' | 'nonce'>;
export type SignFor = (purpose: TokenPurpose) => Promise<string>;

/** Node and workerd each have a `CryptoKey`; this names whichever is there. */
type TokenKey = Awaited<ReturnType<typeof crypto.subtle.importKey>>;

const encoder = new TextEncoder();

export const importTokenKey = (backendKey: string): Promise<TokenKey> =>
  crypto.subtle.importKey('raw', encoder.encode(backendKey), { name: 'HMAC', hash: 'SHA-256' }, false, [
    'sign',
    'verify',
  ]);

/** What a token says that its key signed; undefined for any other. */
export type ReadSigned = (token: string) => unknown;

/** By WebCrypto, which both sides have. */
export function readSignedBy(backendKey: string): ReadSigned {
  let tokenKey: Promise<TokenKey> | undefined;
  return async (token) => {
    tokenKey ??= importTokenKey(backendKey);
    return signedBy(await tokenKey, token);
  };
}

/**
 * What checks tokens that any of the keys signed: while a key is rotated, both sides take the one before and the one after.
 * It throws as {@link verifyToken}.
 */
export function createVerifier(
  readers: readonly ReadSigned[],
  verifier: 'backend' | 'edge',
): (token: string, now_s: number) => Promise<TokenClaims> {
  return async (token, now_s) => {
    for (const read of isToken(token) ? readers : []) {
      const said = await read(token);
      if (said !== undefined) return checked(said, now_s, verifier);
    }
    return checked(undefined, now_s, verifier);
  };
}

/** Signs token after token. Importing the key costs more than signing, so it is done once. */
export function createSigner(backendKey: string): SignFor {
  let tokenKey: Promise<TokenKey> | undefined;
  /** Nonces need to be new, not secret: chance names the signer, and it counts. */
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

/**
 * @param verifier whose clock `now_s` is, for people.
 * @throws MaskrouteError `invalid_api_key` for a forged, malformed or too long-lived token,
 * `expired_token` outside its time by the verifier's clock.
 */
export async function verifyToken(
  key: TokenKey,
  token: string,
  now_s: number,
  verifier: 'backend' | 'edge' = 'backend',
): Promise<TokenClaims> {
  return checked(isToken(token) ? await signedBy(key, token) : undefined, now_s, verifier);
}

const isToken = (token: string): boolean => token.length <= TOKEN_CHARS_MAX && token.startsWith(TOKEN_PREFIX);

/** Undefined for what is no token of this key. */
const signedBy = (key: TokenKey, token: string): Promise<unknown> =>
  verify(token, key, 'HS256').catch(() => undefined);

function checked(said: unknown, now_s: number, verifier: 'backend' | 'edge'): TokenClaims {
  const claims = claimsSchema.safeParse(said);
  if (!claims.success) throw new MaskrouteError('invalid_api_key', 'The service token is not valid.');
  requireTime(claims.data, now_s, verifier);
  return claims.data;
}

/** Whether a token is for whoever has this address, however the two are spelled. */
export const isFor = ({ audience }: TokenClaims, address: string): boolean =>
  audience !== undefined && spelled(audience) === spelled(address);

const spelled = (address: string): string =>
  (URL.canParse(address) ? new URL(address).href : address).replace(/\/+$/, '');

/** The two clocks are never mentioned to a client: the edge puts this into its log. */
function requireTime({ issuedAt_s, expiresAt_s }: TokenClaims, now_s: number, verifier: string): void {
  // Replays are remembered for a token's life, so no token may live longer.
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
