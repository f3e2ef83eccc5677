/**
 * A secret that has to survive a restart: sealed with AES-256-GCM under a key that follows from the backend key, so
 * that a copy of the disk does not open what the edge's administrators may do.
 */
import { createCipheriv, createDecipheriv, hkdfSync, randomBytes } from 'node:crypto';

const ALGORITHM = 'aes-256-gcm';
const IV_BYTES = 12;
const TAG_BYTES = 16;

const keyOf = (backendKey: string, purpose: string): Buffer =>
  Buffer.from(hkdfSync('sha256', backendKey, '', `maskroute ${purpose}`, 32));

/** `purpose` binds it to its place: a secret of one job does not open as another's. */
export function seal(secret: string, backendKey: string, purpose: string): Buffer {
  const iv = randomBytes(IV_BYTES);
  const cipher = createCipheriv(ALGORITHM, keyOf(backendKey, purpose), iv);
  const text = Buffer.concat([cipher.update(secret, 'utf8'), cipher.final()]);
  return Buffer.concat([iv, cipher.getAuthTag(), text]);
}

/** @throws Error when it was sealed under another key or for another purpose, or is damaged. */
export function unseal(sealed: Uint8Array, backendKey: string, purpose: string): string {
  const bytes = Buffer.from(sealed);
  const decipher = createDecipheriv(ALGORITHM, keyOf(backendKey, purpose), bytes.subarray(0, IV_BYTES));
  decipher.setAuthTag(bytes.subarray(IV_BYTES, IV_BYTES + TAG_BYTES));
  const text = bytes.subarray(IV_BYTES + TAG_BYTES);
  return Buffer.concat([decipher.update(text), decipher.final()]).toString('utf8');
}
