/**
 * Hands events to the queue, off the request's path and a few requests' together: a message of its own would cost
 * more than all else that the edge does for a request. What the queue does not take, the log keeps.
 *
 * A batch is sent by the request that began it. Should that be torn down, the first few of the others notice and send
 * all of it (an event that is sent twice counts once); the rest need not stay for that. Were they all torn down, the
 * next request finds a batch that is too old, and sends it.
 */
import type { EdgeEvent, EdgeMessage } from '../../shared/events.ts';
import { EVENT_BATCH, EVENT_RETRY_DELAYS_ms } from '../limits.ts';
import { log, reasonOf } from './log.ts';
import { dataPoint } from './metrics.ts';

export interface Events {
  /** Settles when this request has nothing more to do for the event; never throws. For `waitUntil`. */
  send(event: EdgeEvent): Promise<void>;
}

type Batch = {
  readonly events: EdgeEvent[];
  readonly begun_ms: number;
  guards: number;
  sent: Promise<'sent'>;
};

/**
 * Requests' events in one message. The consumer gets a hundred messages at most, and what a delivery costs it is much
 * the same however much is in it. A message holds 128 kB, and these take 0.7 kB each, 2.5 at the very most.
 */
const MESSAGE_EVENTS_MAX = 40;

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
    await deliver(queue, batch.events);
    return 'sent';
  };

  const begin = async (event: EdgeEvent): Promise<void> => {
    const batch: Batch = {
      events: [event],
      begun_ms: Date.now(),
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
      if (Date.now() - open.begun_ms < 2 * EVENT_BATCH.lost_ms) return await join(open, event);
      const lost = open.events;
      await Promise.all([deliver(queue, lost), begin(event)]);
    },
  };
}

async function deliver(
  queue: Pick<Queue<EdgeMessage>, 'sendBatch'>,
  events: readonly EdgeEvent[],
): Promise<void> {
  let reason = '';
  for (const delay_ms of EVENT_RETRY_DELAYS_ms) {
    if (delay_ms > 0) await sleep(delay_ms);
    try {
      await queue.sendBatch(messagesOf(events).map((body) => ({ body })));
      return;
    } catch (error) {
      reason = reasonOf(error);
    }
  }
  for (const event of events) log('error', 'event_not_queued', { reason, message: JSON.stringify(event) });
}

function messagesOf(events: readonly EdgeEvent[]): EdgeMessage[] {
  const requests = events.filter((event) => event.kind === 'request');
  const messages: EdgeMessage[] = events.filter((event) => event.kind !== 'request');
  for (let at = 0; at < requests.length; at += MESSAGE_EVENTS_MAX) {
    messages.push(requests.slice(at, at + MESSAGE_EVENTS_MAX));
  }
  return messages;
}

const sleep = (delay_ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, delay_ms));
