/** Hashing and comparing secrets, and the door for backends. */
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex } from '@noble/hashes/utils.js';
import { MaskrouteError } from '../../shared/errors.ts';
import { importTokenKey, isFor, type TokenKey, verifyToken } from '../../shared/service-token.ts';
import type { Config } from '../env.ts';

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
