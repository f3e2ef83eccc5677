/**
 * Names of completions that the edge knows again without having kept them: an event's id, which also names the
 * request's reservation, and a signature over it and the tenant. So nobody can speak of a completion that is not
 * theirs, right after it was made and with no database to ask.
 *
 * An event's digits are the time (8, in quarters of a second) and chance (12). By the time, events that are counted
 * together lie together in the database: under names of chance alone, a batch writes a page of its index for every row.
 */
import { hmac } from '@noble/hashes/hmac.js';
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex } from '@noble/hashes/utils.js';
import { randomHex, sameSecret } from '../base/secrets.ts';

const encoder = new TextEncoder();

const TIME_UNIT_ms = 256;
const TIME_DIGITS = 8;
/** After so many units, 34 years, the digits begin anew. */
const TIMES = 16 ** TIME_DIGITS;
const CHANCE_DIGITS = 12;
/** 64 bits. */
const SIGNATURE_DIGITS = 16;
const COMPLETION_ID = /^(?:chatcmpl-|cmpl-|resp_)?([0-9a-f]{20})\.([0-9a-f]{16})$/;

export interface CompletionIds {
  /** `event`: 20 hexadecimal digits. `completion`: what the backend builds the answer's `id` of. */
  create(tenant: string): { event: string; completion: string };
  /** The event of an answer's `id`; null when this tenant has no such completion. */
  eventOf(id: string, tenant: string): string | null;
}

/** Ids are signed with `secret`; those that were signed with one of `others` are known again, too. */
export function createCompletionIds(secret: string, others: readonly string[] = []): CompletionIds {
  const sign = createIdSigner(secret);
  const signers = [sign, ...others.map(createIdSigner)];
  return {
    create(tenant) {
      const event = newEvent(Date.now());
      return { event, completion: `${event}.${sign(event, tenant)}` };
    },
    eventOf(id, tenant) {
      const match = COMPLETION_ID.exec(id);
      if (match === null) return null;
      const [, event, given] = match;
      return signers.some((signed) => sameSecret(given!, signed(event!, tenant))) ? event! : null;
    },
  };
}

function createIdSigner(secret: string): (event: string, tenant: string) => string {
  // The key is hashed in once: half of what a signature takes.
  const keyed = hmac.create(sha256, encoder.encode(secret));
  return (event, tenant) => {
    const text = encoder.encode(`maskroute-completion\n${tenant}\n${event}`);
    return bytesToHex(keyed.clone().update(text).digest()).slice(0, SIGNATURE_DIGITS);
  };
}

function newEvent(now_ms: number): string {
  const time = Math.floor(now_ms / TIME_UNIT_ms) % TIMES;
  return time.toString(16).padStart(TIME_DIGITS, '0') + randomHex(CHANCE_DIGITS / 2);
}

/** Of an event's id: evenly from 0 up to 1. */
export const lotOf = (event: string): number =>
  Number.parseInt(event.slice(TIME_DIGITS), 16) / 16 ** CHANCE_DIGITS;

/** Of an event's id: how long ago it was made; negative by a clock ahead of ours. */
export function ageOf_ms(event: string, now_ms: number): number {
  const units = now_ms / TIME_UNIT_ms - Number.parseInt(event.slice(0, TIME_DIGITS), 16);
  return (units - TIMES * Math.round(units / TIMES)) * TIME_UNIT_ms;
}
