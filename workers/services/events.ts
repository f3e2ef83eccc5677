/** Hands events to the queue, off the request's path. What the queue does not take, the log keeps. */
import type { EdgeEvent } from '../../shared/events.ts';
import { EVENT_RETRY_DELAYS_ms } from '../limits.ts';
import { log, reasonOf } from './log.ts';
import { dataPoint } from './metrics.ts';

export interface Events {
  /** Never throws. */
  send(event: EdgeEvent): Promise<void>;
}

export function createEvents(
  queue: Pick<Queue<EdgeEvent>, 'send'>,
  metrics: Pick<AnalyticsEngineDataset, 'writeDataPoint'> | undefined,
): Events {
  return {
    async send(event) {
      if (event.kind === 'request') metrics?.writeDataPoint(dataPoint(event));
      let reason = '';
      for (const delay_ms of EVENT_RETRY_DELAYS_ms) {
        if (delay_ms > 0) await new Promise((resolve) => setTimeout(resolve, delay_ms));
        try {
          await queue.send(event);
          return;
        } catch (error) {
          reason = reasonOf(error);
        }
      }
      log('error', 'event_not_queued', { reason, message: JSON.stringify(event) });
    },
  };
}
