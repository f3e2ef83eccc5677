/**
 * Who may call the backend: holders of the backend key, and the edge with a token signed by that key.
 * Nobody else, so a backend without a key does not start.
 */
import { createHash, createHmac, createSecretKey, timingSafeEqual } from 'node:crypto';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import {
  createVerifier,
  isFor,
  type ReadSigned,
  TOKEN_PREFIX,
  TOKEN_SKEW_s,
} from '../../shared/wire/service-token.ts';

export type Caller = {
  /** From the edge's token; a holder of the key itself has no tenant. */
  readonly tenant: string | undefined;
  /** Where unknown masks may be fetched, as the token says. */
  readonly edge: string | undefined;
  /** A holder of the key, or an operator of the edge: the edge says so in the token's scope. */
  readonly mayRunJobs: boolean;
};

export type Authenticate = (authorization: string | undefined) => Promise<Caller>;

type TokenRules = {
  /**
   * The address by which the edge calls this backend: tokens for another backend are refused. Unchecked without. A backend
   * that is called at the address that it listens at knows it only once it listens.
   */
  readonly audience?: string | Promise<string> | undefined;
  /** Taken besides the backend key while that is rotated; nothing is signed with it. */
  readonly otherBackendKey?: string | undefined;
};

/**
 * `authenticate` rejects with MaskrouteError `invalid_api_key` or `expired_token`.
 * @throws Error when `backendKey` is empty.
 */
export async function createAuthenticator(
  backendKey: string,
  { audience, otherBackendKey }: TokenRules = {},
): Promise<Authenticate> {
  if (backendKey.trim() === '') {
    throw new Error('The backend needs a key (MASKROUTE_BACKEND_KEY); it does not serve without one.');
  }
  const backendKeys = [backendKey, ...(otherBackendKey ? [otherBackendKey] : [])];
  const isBackendKey = isOneOf(backendKeys);
  const verify = createVerifier(backendKeys.map(readSignedWith), 'backend');
  const usedTokens = new UsedTokens();
  return async (authorization) => {
    const credential = bearer(authorization);
    if (isBackendKey(credential)) return { tenant: undefined, edge: undefined, mayRunJobs: true };
    if (!credential.startsWith(TOKEN_PREFIX)) throw invalidKey('The backend key is not right.');
    const now_s = Math.floor(Date.now() / 1000);
    const claims = await verify(credential, now_s);
    // A backend signed it, this one or another, and whoever got it sends it back.
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

/**
 * As `readSignedBy`, but on this thread: WebCrypto hashes in another one, which takes longer than the hash itself, and waits for
 * a core while the engine has them all.
 */
function readSignedWith(backendKey: string): ReadSigned {
  const key = createSecretKey(backendKey, 'utf8');
  return (token) => {
    const [head, payload = '', signature = '', ...more] = token.split('.');
    const own = createHmac('sha256', key).update(`${head}.${payload}`).digest();
    const given = Buffer.from(signature, 'base64url');
    if (more.length > 0 || given.length !== own.length || !timingSafeEqual(given, own)) return undefined;
    try {
      return JSON.parse(Buffer.from(payload, 'base64url').toString());
    } catch {
      return undefined;
    }
  };
}

const invalidKey = (message: string): MaskrouteError => new MaskrouteError('invalid_api_key', message);

/**
 * Who may read the figures: a scraper with a key of its own, which opens nothing else, and holders of the backend key. The
 * check throws MaskrouteError `invalid_api_key`.
 */
export function createScraperCheck(
  ...keys: readonly (string | undefined)[]
): (authorization: string | undefined) => void {
  const mayRead = isOneOf(keys.filter((key) => key !== undefined && key !== '') as string[]);
  return (authorization) => {
    if (mayRead(bearer(authorization))) return;
    throw invalidKey('The key is not right.');
  };
}

function bearer(authorization: string | undefined): string {
  const credential = /^Bearer +(\S+)$/i.exec(authorization ?? '')?.[1];
  if (credential !== undefined) return credential;
  throw invalidKey('Send a key: `Authorization: Bearer KEY`.');
}

/** Digests have one length, so the comparison tells nothing about a key's. */
function isOneOf(keys: readonly string[]): (credential: string) => boolean {
  const digests = keys.map(digest);
  return (credential) => {
    const given = digest(credential);
    return digests.map((known) => timingSafeEqual(given, known)).includes(true);
  };
}

const digest = (text: string): Buffer => createHash('sha256').update(text).digest();

/**
 * Tokens that were used. Each is good for one request, so a token that somebody caught on its way opens nothing. The
 * tokens' short life bounds what is remembered; past a number of them the oldest are forgotten first.
 */
export class UsedTokens {
  readonly #rememberedMax: number;
  /** When each is worthless anyway, in order of use, which is nearly the order in which they end. */
  readonly #until_s = new Map<string, number>();

  constructor(rememberedMax = REMEMBERED_MAX) {
    this.#rememberedMax = rememberedMax;
  }

  /** Whether this is the first use. `until_s`: when the token is worthless anyway. */
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

/** At a thousand requests a second, the ninety seconds that a token can be used in. */
const REMEMBERED_MAX = 100_000;
