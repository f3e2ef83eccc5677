/**
 * The consumer of the events queue. The queue delivers at least once, and counting is idempotent by event id, so a
 * delivery that failed, or may have failed, is retried.
 */
import type { EdgeEvent, RequestEvent } from '../../shared/admin/requests-wire.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { type Hold, withDeadline } from '../base/waiting.ts';
import { type Counted, countEvents, forget, type Kept, type NoteEvent } from '../db/count-events.ts';
import type { Database } from '../db/d1.ts';
import type { Config } from '../env.ts';
import { EVENTS, FEEDBACK_KEPT_ms } from '../limits.ts';
import { takeBackBad } from '../releases/auto-rollback.ts';
import type { RoutingTable } from '../routing/live-sets.ts';
import { readMessage } from './events.ts';

type ConsumeDependencies = {
  readonly db: Database;
  readonly table: RoutingTable;
};

type ForgetDependencies = {
  readonly db: Database;
  readonly config: Pick<Config, 'AUDIT_KEPT_DAYS'>;
};

/** Deletes expired rows; called by the cron trigger. A failure is logged: the next minute tries again. */
export async function forgetOld({ db, config }: ForgetDependencies): Promise<void> {
  const now_ms = Date.now();
  const kept: Kept = {
    now_ms,
    eventsSince_ms: now_ms - EVENTS.kept_ms,
    feedbackSince_ms: now_ms - FEEDBACK_KEPT_ms,
    auditSince_ms: now_ms - config.AUDIT_KEPT_DAYS * 86_400_000,
    minutesSince_ms: now_ms - EVENTS.minutesKept_ms,
  };
  await forget(db, kept, EVENTS.forget_ms).catch((error) => {
    log('error', 'expired_rows_not_deleted', { reason: reasonOf(error) });
  });
}

export async function consumeEvents(
  dependencies: ConsumeDependencies,
  batch: Pick<MessageBatch<unknown>, 'messages' | 'retryAll'>,
  hold: Hold,
): Promise<void> {
  const now_ms = Date.now();
  const received = batch.messages.flatMap((message) => {
    const events = readMessage(message.body).filter((event) => isRecent(event, now_ms));
    if (events.length === 0) message.ack();
    return events.map((event) => ({ message, event }));
  });
  if (received.length === 0) return;
  const events = received.map(({ event }) => event);
  const requests = events.filter((event) => event.kind === 'request');
  const notes = events.filter((event) => event.kind !== 'request');
  let left: ReadonlySet<EdgeEvent>;
  try {
    left = await countAll(dependencies.db, requests, notes);
  } catch (error) {
    log('error', 'events_not_counted', { events: events.length, reason: reasonOf(error) });
    batch.retryAll({ delaySeconds: EVENTS.retryDelay_s });
    return;
  }
  for (const { message, event } of received) {
    // The event of its request may not have arrived yet.
    if (left.has(event)) message.retry({ delaySeconds: EVENTS.retryDelay_s });
    else message.ack();
  }
  const versions = new Set(requests.flatMap(({ version }) => version ?? []));
  const judging = takeBackBad(dependencies, [...versions], hold);
  await withDeadline(judging, EVENTS.judge_ms, 'judging versions').catch((error) => {
    log('error', 'auto_rollback_failed', { reason: reasonOf(error) });
  });
}

/**
 * Most events of one transaction: D1 runs transactions one at a time, and reads of requests wait for them some ms. A
 * row takes 0.4 kB, at most 2.5 kB, of a parameter that may have 2 MB.
 */
const COUNTED_AT_ONCE_MAX = 500;

/**
 * Counts events and returns the notes that could not be counted yet. When it throws, some may have been counted;
 * counting them again changes nothing.
 */
async function countAll(
  db: Database,
  requests: readonly RequestEvent[],
  notes: readonly NoteEvent[],
): Promise<ReadonlySet<EdgeEvent>> {
  let at = 0;
  for (; requests.length - at > COUNTED_AT_ONCE_MAX; at += COUNTED_AT_ONCE_MAX) {
    await count(db, requests.slice(at, at + COUNTED_AT_ONCE_MAX), []);
  }
  const { notesLeft } = await count(db, requests.slice(at), notes);
  return new Set(notesLeft);
}

const count = (
  db: Database,
  requests: readonly RequestEvent[],
  notes: readonly NoteEvent[],
): Promise<Counted> =>
  withDeadline(
    countEvents(db, { batch: crypto.randomUUID(), requests, notes }),
    EVENTS.count_ms,
    'counting events',
  );

/**
 * Whether an event is recent enough. The id of an older event may have been deleted, so it could be counted twice; it
 * is logged instead.
 */
function isRecent({ created_at_ms }: EdgeEvent, now_ms: number): boolean {
  if (created_at_ms >= now_ms - EVENTS.counted_ms) return true;
  log('error', 'event_too_old', { created_at_ms });
  return false;
}
