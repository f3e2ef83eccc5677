/**
 * Hands events to the queue, off the request's path and a few requests' together: a message of its own would cost
 * more than all else that the edge does for a request. What the queue does not take, the log keeps.
 *
 * A batch is sent by the request that began it. Should that be torn down, every other request of the batch notices
 * and sends its own event; one that is sent twice counts once.
 */
import type { EdgeEvent } from '../../shared/events.ts';
import { EVENT_BATCH, EVENT_RETRY_DELAYS_ms } from '../limits.ts';
import { log, reasonOf } from './log.ts';
import { dataPoint } from './metrics.ts';

export interface Events {
  /** Settles when the event is with the queue, or in the log; never throws. For `waitUntil`. */
  send(event: EdgeEvent): Promise<void>;
}

type Batch = { readonly events: EdgeEvent[]; sent: Promise<'sent'> };

export function createEvents(
  queue: Pick<Queue<EdgeEvent>, 'sendBatch'>,
  metrics: Pick<AnalyticsEngineDataset, 'writeDataPoint'> | undefined,
): Events {
  let open: Batch | undefined;

  const collect = async (batch: Batch): Promise<'sent'> => {
    await sleep(EVENT_BATCH.wait_ms);
    if (open === batch) open = undefined;
    await deliver(queue, batch.events);
    return 'sent';
  };

  return {
    async send(event) {
      if (event.kind === 'request') metrics?.writeDataPoint(dataPoint(event));
      if (open === undefined) {
        const batch: Batch = { events: [event], sent: Promise.resolve('sent') };
        open = batch;
        batch.sent = collect(batch);
        await batch.sent;
        return;
      }
      const joined = open;
      joined.events.push(event);
      if (joined.events.length >= EVENT_BATCH.eventsMax) open = undefined;
      const outcome = await Promise.race([joined.sent, sleep(EVENT_BATCH.lost_ms)]);
      if (outcome === 'sent') return;
      if (open === joined) open = undefined;
      await deliver(queue, [event]);
    },
  };
}

async function deliver(
  queue: Pick<Queue<EdgeEvent>, 'sendBatch'>,
  events: readonly EdgeEvent[],
): Promise<void> {
  let reason = '';
  for (const delay_ms of EVENT_RETRY_DELAYS_ms) {
    if (delay_ms > 0) await sleep(delay_ms);
    try {
      await queue.sendBatch(events.map((body) => ({ body })));
      return;
    } catch (error) {
      reason = reasonOf(error);
    }
  }
  for (const event of events) log('error', 'event_not_queued', { reason, message: JSON.stringify(event) });
}

const sleep = (delay_ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, delay_ms));
