/**
 * Sends events to the queue, outside the request's path and in batches over requests: a message for each would take
 * more than everything else that the edge does for a request. Events that the queue refuses are logged.
 *
 * The request that begins a batch sends it. The runtime may tear that request down, so the next few requests stay as
 * guards, which send the batch if it is overdue (an event that is sent twice counts once). If all of them are torn
 * down, the next request finds the overdue batch and sends it.
 */
import { hmac } from '@noble/hashes/hmac.js';
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex } from '@noble/hashes/utils.js';
import {
  type EdgeEvent,
  type EdgeMessage,
  edgeEventSchema,
  type RequestEvent,
} from '../../shared/admin/requests-wire.ts';
import { randomHex, sameSecret } from '../base/secrets.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { retried, sleep, steadyNow_ms } from '../base/waiting.ts';
import { EVENT_BATCH, EVENT_RETRY_DELAYS_ms } from '../limits.ts';

export interface Events {
  /** The promise, for `waitUntil`, settles when this request need not stay alive for the event; never throws. */
  send(event: EdgeEvent): Promise<void>;
}

type EventQueue = Pick<Queue<EdgeMessage>, 'sendBatch'>;

type Batch = {
  readonly events: EdgeEvent[];
  readonly begun_ms: number;
  /** Number of requests that stay until the batch is sent. */
  guards: number;
  sent: Promise<'sent'>;
};

/** Each guard costs a timer and a wait. */
const GUARDS_MAX = 2;

export function createEvents(
  queue: EventQueue,
  metrics: Pick<AnalyticsEngineDataset, 'writeDataPoint'> | undefined,
): Events {
  let open: Batch | undefined;

  const collect = async (batch: Batch): Promise<'sent'> => {
    await sleep(EVENT_BATCH.wait_ms);
    if (open === batch) open = undefined;
    await deliver(queue, batch.events);
    return 'sent';
  };

  const begin = async (event: EdgeEvent): Promise<void> => {
    const batch: Batch = {
      events: [event],
      begun_ms: steadyNow_ms(),
      guards: 0,
      sent: Promise.resolve('sent'),
    };
    open = batch;
    batch.sent = collect(batch);
    await batch.sent;
  };

  const join = async (batch: Batch, event: EdgeEvent): Promise<void> => {
    batch.events.push(event);
    if (batch.events.length >= EVENT_BATCH.eventsMax) open = undefined;
    if (batch.guards >= GUARDS_MAX) return;
    batch.guards++;
    const outcome = await Promise.race([batch.sent, sleep(EVENT_BATCH.lost_ms)]);
    if (outcome === 'sent') return;
    if (open === batch) open = undefined;
    await deliver(queue, batch.events);
  };

  return {
    async send(event) {
      if (event.kind === 'request') metrics?.writeDataPoint(dataPoint(event));
      if (open === undefined) return await begin(event);
      if (steadyNow_ms() - open.begun_ms < 2 * EVENT_BATCH.lost_ms) return await join(open, event);
      const lost = open;
      await Promise.all([deliver(queue, lost.events), begin(event)]);
    },
  };
}

async function deliver(queue: EventQueue, events: readonly EdgeEvent[]): Promise<void> {
  const messages = messagesOf(events).map((body) => ({ body }));
  await retried(EVENT_RETRY_DELAYS_ms, () => queue.sendBatch(messages)).catch((error) => {
    const reason = reasonOf(error);
    for (const event of events) log('error', 'event_not_queued', { reason, message: JSON.stringify(event) });
  });
}

/**
 * Most events in one message. The consumer gets at most 100 messages in a delivery, whose cost hardly depends on its
 * size. A message holds 128 kB; an event takes 0.7 kB, at most 2.5 kB.
 */
const MESSAGE_EVENTS_MAX = 40;

function messagesOf(events: readonly EdgeEvent[]): EdgeMessage[] {
  const requests = events.filter((event) => event.kind === 'request');
  const messages: EdgeMessage[] = events.filter((event) => event.kind !== 'request');
  for (let at = 0; at < requests.length; at += MESSAGE_EVENTS_MAX) {
    messages.push(requests.slice(at, at + MESSAGE_EVENTS_MAX));
  }
  return messages;
}

/** The events of a message; unreadable ones are logged and dropped. */
export const readMessage = (body: unknown): EdgeEvent[] =>
  (Array.isArray(body) ? body : [body]).flatMap((entry) => {
    const parsed = edgeEventSchema.safeParse(entry);
    if (parsed.success) return parsed.data;
    log('error', 'event_malformed', { reason: parsed.error.message });
    return [];
  });

/**
 * One data point for each request for Analytics Engine, for dashboards outside this project. Writing does not wait and
 * may drop points; nothing here is counted from them. Columns are identified only by position.
 */
const dataPoint = (event: RequestEvent): AnalyticsEngineDataPoint => ({
  indexes: [event.tenant],
  blobs: [
    ...[event.model, event.version ?? '', event.mask, event.experiment, event.variant],
    ...[event.region, event.fallback ?? '', event.error_code ?? '', event.endpoint, event.backend ?? ''],
    event.experiment_owner,
  ],
  doubles: [
    ...[event.status, event.prompt_tokens, event.completion_tokens],
    ...[event.ttft_ms ?? -1, event.tpot_ms ?? -1, event.total_ms],
    ...[event.sparsity ?? -1, event.cluster ?? -1, event.similarity ?? -2],
  ],
});

/*
 * Completion ids that the edge can verify without storing them: an event's id, which also names the request's
 * reservation, and a signature over it and the tenant. So a caller can refer only to its own completions, immediately
 * and without a database.
 *
 * An event's id has 8 digits of time (in quarters of a second) and 12 random digits. The time puts events that are
 * counted together next to each other in the index; with random ids every row of a batch would write another page.
 */

const encoder = new TextEncoder();

const TIME_UNIT_ms = 256;
const TIME_DIGITS = 8;
/** The time wraps around after this many units (34 years). */
const TIMES = 16 ** TIME_DIGITS;
const CHANCE_DIGITS = 12;
/** 64 bits. */
const SIGNATURE_DIGITS = 16;
const COMPLETION_ID = /^(?:chatcmpl-|cmpl-|resp_)?([0-9a-f]{20})\.([0-9a-f]{16})$/;

export interface CompletionIds {
  /** `event`: 20 hexadecimal digits. `completion`: the text from which the backend makes the answer's `id`. */
  create(tenant: string): { event: string; completion: string };
  /** The event of an answer's `id`; null when this tenant has no such completion. */
  eventOf(id: string, tenant: string): string | null;
}

/** Ids are signed with the first secret; signatures with the others are also accepted. */
export function createCompletionIds(secrets: readonly string[]): CompletionIds {
  const signers = secrets.map(createIdSigner);
  const sign = signers[0]!;
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
  // The key is hashed once in advance, which halves the time of a signature.
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

/** A number from an event's id, uniform in [0, 1). */
export const lotOf = (event: string): number =>
  Number.parseInt(event.slice(TIME_DIGITS), 16) / 16 ** CHANCE_DIGITS;

/** The age of an event's id; negative if it was made by a clock that is ahead. */
export function ageOf_ms(event: string, now_ms: number): number {
  const units = now_ms / TIME_UNIT_ms - Number.parseInt(event.slice(0, TIME_DIGITS), 16);
  return (units - TIMES * Math.round(units / TIMES)) * TIME_UNIT_ms;
}
