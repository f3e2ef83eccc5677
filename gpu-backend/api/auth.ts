/**
 * Authentication: callers hold the backend key, or a short-lived token that the edge signed with it. There is no other
 * access, so a backend without a key does not start.
 */
import { createHash, timingSafeEqual } from 'node:crypto';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { createVerifier, isFor, TOKEN_PREFIX, TOKEN_SKEW_s } from '../../shared/wire/service-token.ts';

export type Caller = {
  /** From the edge's token; undefined for a holder of the key itself. */
  readonly tenant: string | undefined;
  /** From the token: the edge's address, where unknown masks are fetched. */
  readonly edge: string | undefined;
  /** True for holders of the key, and for operators of the edge (token scope `jobs`). */
  readonly mayRunJobs: boolean;
};

export type Authenticate = (authorization: string | undefined) => Promise<Caller>;

export type TokenRules = {
  /**
   * The address by which the edge calls this backend; tokens for another address are refused. Without, any audience is
   * accepted. A promise, because a backend's own address is known only when it listens.
   */
  readonly audience?: string | Promise<string> | undefined;
  /** A second key that is accepted during a rotation; nothing is signed with it. */
  readonly otherBackendKey?: string | undefined;
};

/**
 * @param backendKey not empty, as the start of a backend checks.
 * @returns a function that rejects with MaskrouteError `invalid_api_key` or `expired_token`.
 */
export function createAuthenticator(
  backendKey: string,
  { audience, otherBackendKey }: TokenRules = {},
): Authenticate {
  const backendKeys = [backendKey, ...(otherBackendKey ? [otherBackendKey] : [])];
  const isBackendKey = isOneOf(backendKeys);
  const verify = createVerifier(backendKeys, 'backend');
  const usedTokens = new UsedTokens();
  return async (authorization) => {
    const credential = bearer(authorization);
    if (isBackendKey(credential)) return { tenant: undefined, edge: undefined, mayRunJobs: true };
    if (!credential.startsWith(TOKEN_PREFIX)) throw invalidKey('The backend key is wrong.');
    const now_s = Math.floor(Date.now() / 1000);
    const claims = await verify(credential, now_s);
    // Backends sign these for an edge. If such a token comes back, its receiver replays it.
    if (claims.scope === 'masks') throw invalidKey('The service token is for an edge.');
    if (audience !== undefined && !isFor(claims, await audience)) {
      throw invalidKey('The service token is for another backend.');
    }
    if (!usedTokens.use(claims.nonce, claims.expiresAt_s + TOKEN_SKEW_s, now_s)) {
      throw invalidKey('The service token was used before.');
    }
    const { tenant, edge, scope } = claims;
    return { tenant, edge: edge === '' ? undefined : edge, mayRunJobs: scope === 'jobs' };
  };
}

const invalidKey = (message: string): MaskrouteError => new MaskrouteError('invalid_api_key', message);

/**
 * Access to `/metrics`: the metrics key, which opens nothing else, and the backend keys.
 * @returns a check that throws MaskrouteError `invalid_api_key`.
 */
export function createScraperCheck(
  ...keys: readonly (string | undefined)[]
): (authorization: string | undefined) => void {
  const mayRead = isOneOf(keys.filter((key) => key !== undefined && key !== '') as string[]);
  return (authorization) => {
    if (mayRead(bearer(authorization))) return;
    throw invalidKey('The key is wrong.');
  };
}

function bearer(authorization: string | undefined): string {
  const credential = /^Bearer +(\S+)$/i.exec(authorization ?? '')?.[1];
  if (credential !== undefined) return credential;
  throw invalidKey('Send a key: `Authorization: Bearer KEY`.');
}

/** Compares digests, which all have one length, so that timing reveals nothing about a key's length. */
function isOneOf(keys: readonly string[]): (credential: string) => boolean {
  const digests = keys.map(digest);
  return (credential) => {
    const given = digest(credential);
    return digests.map((known) => timingSafeEqual(given, known)).includes(true);
  };
}

const digest = (text: string): Buffer => createHash('sha256').update(text).digest();

/**
 * Replay protection: each token is accepted once, so an intercepted token is useless. Tokens are remembered until they
 * expire; beyond `rememberedMax` the oldest are forgotten.
 */
export class UsedTokens {
  readonly #rememberedMax: number;
  /** When each nonce's token expires, in order of use, which is nearly the order of expiry. */
  readonly #until_s = new Map<string, number>();

  constructor(rememberedMax = REMEMBERED_MAX) {
    this.#rememberedMax = rememberedMax;
  }

  /** @returns whether this is the first use. `until_s`: when the token expires. */
  use(nonce: string, until_s: number, now_s: number): boolean {
    for (const [old, end_s] of this.#until_s) {
      if (end_s >= now_s && this.#until_s.size < this.#rememberedMax) break;
      this.#until_s.delete(old);
    }
    if (this.#until_s.has(nonce)) return false;
    this.#until_s.set(nonce, until_s);
    return true;
  }
}

/** A thousand requests a second for the ninety seconds in which a token is valid. */
const REMEMBERED_MAX = 100_000;
