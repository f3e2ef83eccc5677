/**
 * Names of completions that the edge knows again without having kept them: an event's id, which also names the
 * request's reservation, and a signature over it and the tenant. So nobody can speak of a completion that is not
 * theirs, right after it was made and with no database to ask.
 *
 * An event's digits are the time (8, in quarters of a second), chance (11), and its number in a series of four (1). By
 * the time events that are counted together lie together in the database, where a batch else writes a page of its index
 * a row; and one hash signs a series, which spares most requests the dearest thing that is computed for them.
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
const CHANCE_DIGITS = 11;
const SERIES = 4;
/** Of a tenant with few requests the last of a series would else bear the time of a first one days ago. */
const SERIES_LASTS_ms = 3_600_000;
/** 64 bits: a series takes all of a hash. */
const SIGNATURE_DIGITS = 16;
const COMPLETION_ID = /^(?:chatcmpl-|cmpl-)?([0-9a-f]{19})([0-3])\.([0-9a-f]{16})$/;
/** Series that are begun: one more and all of them are. */
const TENANTS_MAX = 1_000;

type Series = {
  readonly stem: string;
  readonly signatures: string;
  readonly begun_ms: number;
  used: number;
};

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
  const sign = (stem: string, tenant: string): string => {
    const text = encoder.encode(`maskroute-completion-v2\n${tenant}\n${stem}`);
    return bytesToHex(keyed.clone().update(text).digest());
  };
  const signature = (signatures: string, number: number): string =>
    signatures.slice(number * SIGNATURE_DIGITS, (number + 1) * SIGNATURE_DIGITS);

  const series = new Map<string, Series>();
  const seriesOf = (tenant: string): Series => {
    const known = series.get(tenant);
    const now_ms = Date.now();
    if (known !== undefined && known.used < SERIES && now_ms - known.begun_ms < SERIES_LASTS_ms) return known;
    if (series.size >= TENANTS_MAX) series.clear();
    const stem = newStem(now_ms);
    const begun = { stem, signatures: sign(stem, tenant), begun_ms: now_ms, used: 0 };
    series.set(tenant, begun);
    return begun;
  };
  return {
    create(tenant) {
      const of = seriesOf(tenant);
      const number = of.used++;
      const event = `${of.stem}${number}`;
      return { event, completion: `${event}.${signature(of.signatures, number)}` };
    },
    eventOf(id, tenant) {
      const match = COMPLETION_ID.exec(id);
      if (match === null) return null;
      const [, stem, digit, given] = match;
      const right = signature(sign(stem!, tenant), Number(digit));
      return sameSecret(given!, right) ? `${stem}${digit}` : null;
    },
  };
}

function newStem(now_ms: number): string {
  const time = Math.floor(now_ms / TIME_UNIT_ms) % TIMES;
  const chance = randomHex(Math.ceil(CHANCE_DIGITS / 2)).slice(0, CHANCE_DIGITS);
  return time.toString(16).padStart(TIME_DIGITS, '0') + chance;
}

/**
 * Of an event's id: evenly from 0 up to 1. Each of a series begins two digits of chance further on, so that they do not
 * all draw the same.
 */
export function lotOf(event: string): number {
  const start = TIME_DIGITS + 2 * Number(event.at(-1));
  return Number.parseInt(event.slice(start, start + LOT_DIGITS), 16) / 16 ** LOT_DIGITS;
}
const LOT_DIGITS = CHANCE_DIGITS - 2 * (SERIES - 1);

/** Of an event's id: how long ago its series was begun, an hour before itself at most; negative by a clock ahead of ours. */
export function ageOf_ms(event: string, now_ms: number): number {
  const units = now_ms / TIME_UNIT_ms - Number.parseInt(event.slice(0, TIME_DIGITS), 16);
  return (units - TIMES * Math.round(units / TIMES)) * TIME_UNIT_ms;
}
