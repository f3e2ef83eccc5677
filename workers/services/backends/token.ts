/** Signed tokens for backends: each is for one address, lives a minute, and is good once. */
import {
  importTokenKey,
  signToken,
  TOKEN_LIFETIME_s,
  type TokenClaims,
  type TokenKey,
} from '../../../shared/service-token.ts';
import { randomHex } from '../secrets.ts';

/** What differs from token to token, but for its time and nonce. */
export type TokenPurpose = Omit<TokenClaims, 'issuedAt_s' | 'expiresAt_s' | 'nonce'>;
export type SignFor = (purpose: TokenPurpose) => Promise<string>;

/** Importing the key costs more than signing, so it is done once. */
export function createSigner(backendKey: string): SignFor {
  let tokenKey: Promise<TokenKey> | undefined;
  /** Nonces need to be new, not secret: chance names the signer, and it counts. */
  let signer: string | undefined;
  let signed = 0;
  return async (purpose) => {
    tokenKey ??= importTokenKey(backendKey);
    signer ??= randomHex(16);
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
