/**
 * Who may call the backend: holders of the backend key, and the edge with a token signed by that key.
 * Nobody else, so a backend without a key does not start.
 */
import { createHash, timingSafeEqual } from 'node:crypto';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import {
  importTokenKey,
  isFor,
  TOKEN_PREFIX,
  TOKEN_SKEW_s,
  verifyToken,
} from '../../shared/wire/service-token.ts';

/*
 * Tokens that were used: each is for one request, so one that somebody caught on its way opens nothing. What is
 * remembered is bounded by the tokens' short life; past a number of them the oldest are forgotten first.
 */

type UsedTokens = {
  /** Whether this is the first use. `until_s`: when the token is worthless anyway. */
  use(nonce: string, until_s: number, now_s: number): boolean;
};

/** At a thousand requests a second, the ninety seconds that a token can be used in. */
const REMEMBERED_MAX = 100_000;

export function createUsedTokens(rememberedMax = REMEMBERED_MAX): UsedTokens {
  /** In order of use, which is nearly the order in which they end. */
  const until = new Map<string, number>();
  return {
    use(nonce, until_s, now_s) {
      for (const [old, end_s] of until) {
        if (end_s >= now_s && until.size < rememberedMax) break;
        until.delete(old);
      }
      if (until.has(nonce)) return false;
      until.set(nonce, until_s);
      return true;
    },
  };
}

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
   * The address by which the edge calls this backend: tokens for another one are refused. Unchecked without. A backend
   * that is called at the address that it listens at knows that only once it listens.
   */
  readonly audience?: string | Promise<string> | undefined;
};

/**
 * `authenticate` rejects with MaskrouteError `invalid_api_key` or `expired_token`.
 * @throws Error when `backendKey` is empty.
 */
export async function createAuthenticator(
  backendKey: string,
  { audience }: TokenRules = {},
): Promise<Authenticate> {
  if (backendKey.trim() === '') {
    throw new Error('The backend needs a key (MASKROUTE_BACKEND_KEY); it does not serve without one.');
  }
  const isBackendKey = isOneOf([backendKey]);
  const tokenKey = await importTokenKey(backendKey);
  const usedTokens = createUsedTokens();
  return async (authorization) => {
    const credential = bearer(authorization);
    if (isBackendKey(credential)) {
      return { tenant: undefined, edge: undefined, mayRunJobs: true };
    }
    if (credential.startsWith(TOKEN_PREFIX)) {
      const now_s = Math.floor(Date.now() / 1000);
      const claims = await verifyToken(tokenKey, credential, now_s);
      // It would be this backend's own, or another's, sent back by whoever it was for.
      if (claims.scope === 'masks') {
        throw new MaskrouteError('invalid_api_key', 'The service token is for an edge.');
      }
      if (audience !== undefined && !isFor(claims, await audience)) {
        throw new MaskrouteError('invalid_api_key', 'The service token is for another backend.');
      }
      if (!usedTokens.use(claims.nonce, claims.expiresAt_s + TOKEN_SKEW_s, now_s)) {
        throw new MaskrouteError('invalid_api_key', 'The service token was used before.');
      }
      const { tenant, edge, scope } = claims;
      return { tenant, edge: edge === '' ? undefined : edge, mayRunJobs: scope === 'jobs' };
    }
    throw new MaskrouteError('invalid_api_key', 'The backend key is not right.');
  };
}

/**
 * Whose figures are read by a scraper, which is trusted with nothing else: it has a key of its own. Without one only the
 * backend key reads them. What it gives throws MaskrouteError `invalid_api_key`.
 */
export function createScraperCheck(
  backendKey: string,
  metricsKey: string | undefined,
): (authorization: string | undefined) => void {
  const mayRead = isOneOf(metricsKey ? [backendKey, metricsKey] : [backendKey]);
  return (authorization) => {
    if (mayRead(bearer(authorization))) return;
    throw new MaskrouteError('invalid_api_key', 'The key is not right.');
  };
}

function bearer(authorization: string | undefined): string {
  const credential = /^Bearer +(\S+)$/i.exec(authorization ?? '')?.[1];
  if (credential !== undefined) return credential;
  throw new MaskrouteError('invalid_api_key', 'Send a key: `Authorization: Bearer KEY`.');
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
