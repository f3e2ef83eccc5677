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
import { messagesOf } from './event-messages.ts';
import { log, reasonOf } from './log.ts';
import { dataPoint } from './metrics.ts';

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
