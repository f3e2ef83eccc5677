/**
 * Hands events to the queue, off the request's path and a few requests' together: a message of its own would cost
 * more than all else that the edge does for a request. What the queue does not take, the log keeps.
 *
 * A batch is sent by the request that began it. Should that be torn down, the first few of the others notice and send
 * all of it (an event that is sent twice counts once); the rest need not stay for that. Were they all torn down, the
 * next request finds a batch that is too old, and sends it.
 */
import {
  type AnswererEntry,
  type EdgeEvent,
  type EdgeMessage,
  type MessageEntry,
  messageEntrySchema,
  type RequestEvent,
} from '../../shared/admin/request-event.ts';
import { log, reasonOf } from '../base/log.ts';
import { EVENT_BATCH, EVENT_RETRY_DELAYS_ms } from '../limits.ts';

/*
 * How events travel: requests' several together, and beside them who answered them. A field in the events themselves
 * would be malformed to a worker of the release before, which consumes some of them while a deployment is gradual, and
 * all that they say would be lost; of an entry of its own, only who answered is.
 */

/** The backend that answered, by the request's event. */
export type Answerers = ReadonlyMap<string, string>;

/**
 * Requests' events in one message. The consumer gets a hundred messages at most, and what a delivery costs it is much
 * the same however much is in it. A message holds 128 kB, and these take 0.7 kB each, 2.5 at the very most.
 */
const MESSAGE_EVENTS_MAX = 40;

function messagesOf(events: readonly EdgeEvent[], answerers: Answerers): EdgeMessage[] {
  const requests = events.filter((event) => event.kind === 'request');
  const messages: EdgeMessage[] = events.filter((event) => event.kind !== 'request');
  for (let at = 0; at < requests.length; at += MESSAGE_EVENTS_MAX) {
    const together = requests.slice(at, at + MESSAGE_EVENTS_MAX);
    messages.push([...together, ...answererEntries(together, answerers)]);
  }
  return messages;
}

function answererEntries(requests: readonly RequestEvent[], answerers: Answerers): AnswererEntry[] {
  const byBackend = new Map<string, string[]>();
  for (const { id } of requests) {
    const backend = answerers.get(id);
    if (backend !== undefined) byBackend.set(backend, [...(byBackend.get(backend) ?? []), id]);
  }
  return [...byBackend].map(([backend, answered]) => ({ kind: 'answerer', backend, requests: answered }));
}

/** What is in a message, with a line in the log for what can't be read, now or ever. */
export function readMessage(body: unknown): { events: EdgeEvent[]; answerers: Answerers } {
  const entries = (Array.isArray(body) ? body : [body]).flatMap((entry) => readEntry(entry) ?? []);
  const beside = entries.filter((entry) => entry.kind === 'answerer');
  return {
    events: entries.filter((entry) => entry.kind !== 'answerer'),
    answerers: new Map(beside.flatMap(({ backend, requests }) => requests.map((id) => [id, backend]))),
  };
}

function readEntry(entry: unknown): MessageEntry | null {
  const parsed = messageEntrySchema.safeParse(entry);
  if (parsed.success) return parsed.data;
  log('error', 'event_malformed', { reason: parsed.error.message });
  return null;
}

/*
 * One data point a request for Analytics Engine, which samples and keeps them for dashboards outside of this one.
 * The platform takes it without a wait and may drop some; nothing here is counted from it.
 */

/** Columns are known by their place alone, so places are only ever added. */
const dataPoint = (event: RequestEvent, backend = ''): AnalyticsEngineDataPoint => ({
  indexes: [event.tenant],
  blobs: [
    ...[event.model, event.version ?? '', event.mask, event.experiment, event.variant],
    ...[event.region, event.fallback ?? '', event.error_code ?? '', event.endpoint, backend],
    event.experiment_owner,
  ],
  doubles: [
    ...[event.status, event.prompt_tokens, event.completion_tokens],
    ...[event.ttft_ms ?? -1, event.tpot_ms ?? -1, event.total_ms],
    ...[event.sparsity ?? -1, event.cluster ?? -1, event.similarity ?? -2],
  ],
});

export interface Events {
  /**
   * Settles when this request has nothing more to do for the event; never throws. For `waitUntil`. `backend`: the one
   * that answered the request.
   */
  send(event: EdgeEvent, backend?: string): Promise<void>;
}

type Batch = {
  readonly events: EdgeEvent[];
  /** By event. */
  readonly answerers: Map<string, string>;
  readonly begun_ms: number;
  guards: number;
  sent: Promise<'sent'>;
};

/** Requests that stay until somebody else's batch is sent: each of them costs a timer and a wait. */
const GUARDS_MAX = 2;

export function createEvents(
  queue: Pick<Queue<EdgeMessage>, 'sendBatch'>,
  metrics: Pick<AnalyticsEngineDataset, 'writeDataPoint'> | undefined,
): Events {
  let open: Batch | undefined;

  const collect = async (batch: Batch): Promise<'sent'> => {
    await sleep(EVENT_BATCH.wait_ms);
    if (open === batch) open = undefined;
    await deliver(queue, batch);
    return 'sent';
  };

  const begin = async (event: EdgeEvent, backend: string | undefined): Promise<void> => {
    const batch: Batch = {
      events: [],
      answerers: new Map(),
      begun_ms: Date.now(),
      guards: 0,
      sent: Promise.resolve('sent'),
    };
    open = batch;
    add(batch, event, backend);
    batch.sent = collect(batch);
    await batch.sent;
  };

  const join = async (batch: Batch, event: EdgeEvent, backend: string | undefined): Promise<void> => {
    add(batch, event, backend);
    if (batch.events.length >= EVENT_BATCH.eventsMax) open = undefined;
    if (batch.guards >= GUARDS_MAX) return;
    batch.guards++;
    const outcome = await Promise.race([batch.sent, sleep(EVENT_BATCH.lost_ms)]);
    if (outcome === 'sent') return;
    if (open === batch) open = undefined;
    await deliver(queue, batch);
  };

  return {
    async send(event, backend) {
      if (event.kind === 'request') metrics?.writeDataPoint(dataPoint(event, backend));
      if (open === undefined) return await begin(event, backend);
      if (Date.now() - open.begun_ms < 2 * EVENT_BATCH.lost_ms) return await join(open, event, backend);
      const lost = open;
      await Promise.all([deliver(queue, lost), begin(event, backend)]);
    },
  };
}

function add({ events, answerers }: Batch, event: EdgeEvent, backend: string | undefined): void {
  events.push(event);
  if (event.kind === 'request' && backend !== undefined) answerers.set(event.id, backend);
}

async function deliver(
  queue: Pick<Queue<EdgeMessage>, 'sendBatch'>,
  { events, answerers }: Pick<Batch, 'events' | 'answerers'>,
): Promise<void> {
  let reason = '';
  for (const delay_ms of EVENT_RETRY_DELAYS_ms) {
    if (delay_ms > 0) await sleep(delay_ms);
    try {
      await queue.sendBatch(messagesOf(events, answerers).map((body) => ({ body })));
      return;
    } catch (error) {
      reason = reasonOf(error);
    }
  }
  for (const event of events) log('error', 'event_not_queued', { reason, message: JSON.stringify(event) });
}

const sleep = (delay_ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, delay_ms));
