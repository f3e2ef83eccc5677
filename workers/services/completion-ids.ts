/**
 * Names of completions that the edge knows again without having kept them: a random part, which also names the
 * request's event and its reservation, and a signature over it and the tenant. So nobody can speak of a
 * completion that is not theirs, right after it was made and with no database to ask.
 */
import { hmac } from '@noble/hashes/hmac.js';
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex } from '@noble/hashes/utils.js';
import { randomHex, sameSecret } from './secrets.ts';

const encoder = new TextEncoder();

const RANDOM_BYTES = 10;
/** 96 bits. */
const SIGNATURE_DIGITS = 24;
const COMPLETION_ID = /^(?:chatcmpl-|cmpl-)?([0-9a-f]{20})\.([0-9a-f]{24})$/;

export interface CompletionIds {
  /** `event`: 20 hexadecimal digits. `completion`: what the backend builds the answer's `id` of. */
  create(tenant: string): { event: string; completion: string };
  /** The event of an answer's `id`; null when this tenant has no such completion. */
  eventOf(id: string, tenant: string): string | null;
}

/** Ids signed with another `secret` are not known again. */
export function createCompletionIds(secret: string): CompletionIds {
  // The key is hashed in once: half of what a signature takes.
  const keyed = hmac.create(sha256, encoder.encode(secret));
  const sign = (event: string, tenant: string): string => {
    const text = encoder.encode(`maskroute-completion-v1\n${tenant}\n${event}`);
    return bytesToHex(keyed.clone().update(text).digest()).slice(0, SIGNATURE_DIGITS);
  };
  return {
    create(tenant) {
      const event = randomHex(RANDOM_BYTES);
      return { event, completion: `${event}.${sign(event, tenant)}` };
    },
    eventOf(id, tenant) {
      const match = COMPLETION_ID.exec(id);
      if (match === null) return null;
      const [, event, signature] = match;
      return sameSecret(signature!, sign(event!, tenant)) ? event! : null;
    },
  };
}
