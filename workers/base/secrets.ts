/** Hashing, comparing and making secrets. */
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex } from '@noble/hashes/utils.js';

const encoder = new TextEncoder();

/** 64 hexadecimal digits. */
export const sha256Hex = (text: string): string => bytesToHex(sha256(encoder.encode(text)));

/** Compares digests in constant time, so the timing reveals neither content nor length of the secret. */
export function sameSecret(given: string, secret: string): boolean {
  return crypto.subtle.timingSafeEqual(sha256(encoder.encode(given)), sha256(encoder.encode(secret)));
}

/** `bytes` random bytes as hexadecimal. */
export const randomHex = (bytes: number): string => bytesToHex(crypto.getRandomValues(new Uint8Array(bytes)));
