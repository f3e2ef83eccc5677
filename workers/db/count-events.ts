/**
 * Counts events idempotently. A batch of events is inserted under a new batch name, ignoring rows that exist already;
 * then the rows with that name are summed into the tables of outcomes. This is one transaction, so a delivery counts
 * entirely or not at all.
 */
import { getTableColumns, getTableName, lt, type SQL, sql } from 'drizzle-orm';
import type { SQLiteColumn, SQLiteTable } from 'drizzle-orm/sqlite-core';
import type { ComparisonEvent, RatingEvent, RequestEvent } from '../../shared/admin/requests-wire.ts';
import { bucketOf } from '../../shared/admin/statistics.ts';
import type { ErrorCode } from '../../shared/wire/errors.ts';
import { steadyNow_ms, withDeadline } from '../base/waiting.ts';
import { D1_TIMEOUT_ms } from '../limits.ts';
import { type Database, minuteOf } from './d1.ts';
import { countLatencies } from './latencies.ts';
import {
  auditLog,
  backendLatencies,
  events,
  feedback,
  latencies,
  NO_EXPERIMENT,
  outcomes,
  PLAYGROUND,
  texts,
  usage,
  variantOutcomes,
} from './schema.ts';

/** An event about a request that has its own event. */
export type NoteEvent = RatingEvent | ComparisonEvent;

export type Counted = {
  /** Notes whose request is not known yet, so that their group is unknown. */
  readonly notesLeft: readonly NoteEvent[];
};

type CountRequest = {
  /** A name that was never used before, not even for the same events. */
  readonly batch: string;
  readonly requests: readonly RequestEvent[];
  readonly notes: readonly NoteEvent[];
};

export async function countEvents(db: Database, { batch, requests, notes }: CountRequest): Promise<Counted> {
  const isNote = sql`${events.id} in (select value from json_each(${JSON.stringify(notes.map(noteId))}))`;
  const [, , , , , known] = await db.batch([
    insertRequests(db, batch, requests),
    insertNotes(db, batch, notes),
    add(db, outcomes, OUTCOME_KEYS, OUTCOME_SUMS, batch),
    add(db, variantOutcomes, same(VARIANT_KEYS), SUMS, batch, `and experiment <> '${NO_EXPERIMENT}'`),
    add(db, usage, USAGE_KEYS, USAGE_SUMS, batch, 'and requests > 0'),
    db.select({ id: events.id }).from(events).where(isNote),
    ...countLatencies(db, batch),
  ]);
  const found = new Set(known.map(({ id }) => id));
  return { notesLeft: notes.filter((note) => !found.has(noteId(note))) };
}

/* Expired rows. They are deleted by themselves, so that no deletion holds up counting. */

/** Rows from before these times have expired; kept texts have their own expiry times. */
export type Kept = {
  readonly now_ms: number;
  readonly eventsSince_ms: number;
  readonly feedbackSince_ms: number;
  readonly auditSince_ms: number;
  readonly minutesSince_ms: number;
};

/** Most rows of one statement: reads of requests wait for it. Deleting a thousand events takes some 50 ms. */
const PORTION_ROWS = 1_000;
/** A kept text has up to 0.4 MB, and an event 0.4 kB. */
const PORTION_TEXTS = 50;

/** D1 takes a thousand statements of an invocation. */
const PORTIONS_MAX = 700;

/**
 * Deletes expired rows in portions, of every kind in turn. After `portionsMax` portions, or `limit_ms`, the next call goes
 * on. A kind that fails or stalls waits for it, too, and does not keep the others from being deleted.
 * @throws Error afterwards, the first of these failures.
 */
export async function forget(
  db: Database,
  kept: Kept,
  limit_ms: number,
  portionsMax = PORTIONS_MAX,
): Promise<void> {
  const until_ms = steadyNow_ms() + limit_ms;
  const minutesSince = minuteOf(kept.minutesSince_ms);
  const kinds: [table: SQLiteTable, isExpired: SQL, rowsMax: number][] = [
    [events, lt(events.createdAt_ms, kept.eventsSince_ms), PORTION_ROWS],
    [outcomes, lt(outcomes.minute, minutesSince), PORTION_ROWS],
    [latencies, lt(latencies.minute, minutesSince), PORTION_ROWS],
    [backendLatencies, lt(backendLatencies.minute, minutesSince), PORTION_ROWS],
    [feedback, lt(feedback.createdAt_ms, kept.feedbackSince_ms), PORTION_ROWS],
    [texts, lt(texts.expiresAt_ms, kept.now_ms), PORTION_TEXTS],
    [auditLog, lt(auditLog.createdAt_ms, kept.auditSince_ms), PORTION_ROWS],
  ];
  const errors: unknown[] = [];
  for (let portion = 0; portion < portionsMax && steadyNow_ms() < until_ms; portion++) {
    const kind = kinds.shift();
    if (kind === undefined) break;
    const [table, isExpired, rowsMax] = kind;
    const rows = sql`rowid in (select rowid from ${table} where ${isExpired} limit ${rowsMax})`;
    const deleted = db.delete(table).where(rows);
    try {
      const { meta } = await withDeadline(deleted, D1_TIMEOUT_ms, `deleting from ${getTableName(table)}`);
      if (meta.changes === rowsMax) kinds.push(kind);
    } catch (error) {
      errors.push(error);
    }
  }
  if (errors.length > 0) throw errors[0];
}

/** The columns of `events` in the table's order, without its key. */
const EVENT_COLUMNS = Object.values(getTableColumns(events))
  .map(({ name }) => name)
  .filter((name) => name !== 'id' && name !== 'batch');

/**
 * A row is passed as an array of values, which takes SQLite an eighth of the time of objects. `limit -1` prevents
 * SQLite from flattening the subquery, which would serialize each row's JSON again for every column.
 */
function insertRequests(db: Database, batch: string, requests: readonly RequestEvent[]) {
  const rows = requests.map(requestRow);
  const names = Object.keys(rows[0] ?? {});
  const column = (name: string) => `value ->> ${names.indexOf(name)}`;
  const [id, columns] = [sql.raw(column('id')), sql.raw(EVENT_COLUMNS.map(column).join(', '))];
  return db
    .insert(events)
    .select(
      sql`select ${id}, ${batch}, ${columns}
      from (select value from json_each(${JSON.stringify(rows.map(Object.values))}) limit -1) where true`,
    )
    .onConflictDoNothing();
}

/** The keys come from the request's row; a note about another tenant's request finds none. */
function insertNotes(db: Database, batch: string, notes: readonly NoteEvent[]) {
  const rows = JSON.stringify(notes.map((note) => ({ ...note, id: noteId(note) })));
  const own: Record<string, string> = {
    created_at_ms: "note.value ->> 'created_at_ms'",
    rating: "note.value ->> 'rating'",
    agreement: "note.value ->> 'agreement'",
    saved: "note.value ->> 'saved'",
    ...all(['request_id', 'endpoint', 'error_code'], "''"),
    ...all(
      ['status', 'requests', 'errors', 'outages', 'failures', 'prompt_tokens', 'completion_tokens'],
      '0',
    ),
    ...all(['total_ms', 'similarity', 'ttft_ms', 'tpot_ms', 'ttft_bucket', 'tpot_bucket'], 'null'),
  };
  const columns = sql.raw(EVENT_COLUMNS.map((name) => own[name] ?? `request.${name}`).join(', '));
  return db
    .insert(events)
    .select(
      sql`select note.value ->> 'id', ${batch}, ${columns}
      from json_each(${rows}) as note join ${events} as request
      on request.id = note.value ->> 'request' and request.tenant = note.value ->> 'tenant'
      where true`,
    )
    .onConflictDoNothing();
}

const all = (names: readonly string[], value: string): Record<string, string> =>
  Object.fromEntries(names.map((name) => [name, value]));

const noteId = (note: NoteEvent): string =>
  note.kind === 'rating' ? `${note.request}:rating:${note.key_id}` : `${note.request}:agreement`;

/** A request's row by column name. Keys cannot be null: '' and -1 stand for it. */
const requestRow = (event: RequestEvent): Record<string, unknown> => ({
  id: event.id,
  created_at_ms: event.created_at_ms,
  day: event.day,
  key_id: event.key_id,
  tenant: event.tenant,
  model: event.model,
  version: event.version ?? '',
  cluster: event.cluster ?? -1,
  mask: event.mask,
  sparsity: event.sparsity ?? -1,
  fallback: event.fallback ?? '',
  experiment: event.experiment,
  variant: event.variant,
  region: event.region,
  requests: 1,
  errors: isFault(event) ? 1 : 0,
  failures: event.error_code === null ? 0 : 1,
  ttft_ms: event.ttft_ms,
  tpot_ms: event.tpot_ms,
  ttft_bucket: event.ttft_ms === null ? null : bucketOf(event.ttft_ms),
  tpot_bucket: event.tpot_ms === null ? null : bucketOf(event.tpot_ms),
  prompt_tokens: event.prompt_tokens,
  completion_tokens: event.completion_tokens,
  rating: null,
  agreement: null,
  backend: event.backend ?? '',
  outages: isOutage(event) ? 1 : 0,
  experiment_owner: event.experiment_owner,
  request_id: event.request_id,
  endpoint: event.endpoint,
  status: event.status,
  error_code: event.error_code ?? '',
  total_ms: event.total_ms,
  similarity: event.similarity,
  source: event.source,
  saved: null,
});

/** Whether a request failed and the client did not cause it: not a 4xx, but also an error in the middle of a stream. */
const isFault = ({ status, error_code }: RequestEvent): boolean =>
  status >= 500 || (status < 400 && error_code !== null && error_code !== TOO_SLOW_CODE);

/** In the middle of a stream: the client's schema takes too long. */
const TOO_SLOW_CODE: ErrorCode = 'invalid_schema';

/** Errors that have nothing to do with the mask, so they must not count against a version. */
const OUTAGE_CODES: readonly ErrorCode[] = [
  ...(['backend_unreachable', 'not_ready', 'queue_timeout', 'deadline_exceeded'] as const),
  ...(['budget_unavailable', 'configuration_unavailable'] as const),
];

const isOutage = (event: RequestEvent): boolean =>
  isFault(event) && OUTAGE_CODES.some((code) => code === event.error_code);

/** Keys that are called like their columns of events. */
const same = (names: readonly string[]): Record<string, string> =>
  Object.fromEntries(names.map((name) => [name, name]));

const OUTCOME_KEYS = {
  minute: 'created_at_ms / 60000',
  ...same(['tenant', 'model', 'version', 'cluster', 'mask', 'sparsity', 'fallback', 'experiment']),
  variant: `case when source = '${PLAYGROUND}' then source else variant end`,
  region: 'region',
};
const VARIANT_KEYS = ['experiment_owner', 'experiment', 'variant', 'region'];

/** Columns of sums and their SQL expressions over events, in the tables' order. */
const SUMS: readonly (readonly [name: string, sum: string])[] = [
  ['requests', 'sum(requests)'],
  ['errors', 'sum(errors)'],
  ...['ttft', 'tpot'].flatMap((name) => moments(name, `${name}_ms`)),
  ['prompt_tokens', 'sum(prompt_tokens)'],
  ['completion_tokens', 'sum(completion_tokens)'],
  ['completion_tokens_sq', 'total(completion_tokens * completion_tokens)'],
  ['ratings', 'count(rating)'],
  ['ratings_up', 'count(case when rating > 0 then 1 end)'],
  ...moments('agreement', 'agreement'),
];
const OUTCOME_SUMS: typeof SUMS = [...SUMS, ['outages', 'sum(outages)'], ...moments('saved', 'saved')];

function moments(name: string, value: string): [string, string][] {
  return [
    [`${name}_count`, `count(${value})`],
    [`${name}_sum`, `total(${value})`],
    [`${name}_sq`, `total(${value} * ${value})`],
  ];
}

/**
 * Approximate limit of distinct custom masks for each day, tenant and model: usage is kept forever, and a client can
 * make up a mask for every request.
 */
const OWN_MASKS_MAX = 200;

/** Custom masks beyond the limit are counted as one. */
const USAGE_MASK = `case when mask in ('dense', 'custom') or mask in (select id from masks) then mask
  when (select count(*) from usage as known where known.tenant_id = events.tenant and known.day = events.day
    and known.model = events.model) < ${OWN_MASKS_MAX} then mask else 'custom' end`;

/** Keys of usage, which is billed: includes failed requests, since they may have used tokens. */
const USAGE_KEYS = { tenant_id: 'tenant', day: 'day', model: 'model', mask: USAGE_MASK };
const USAGE_SUMS: typeof SUMS = [
  ['requests', 'sum(requests)'],
  ['errors', 'sum(failures)'],
  ['prompt_tokens', 'sum(prompt_tokens)'],
  ['completion_tokens', 'sum(completion_tokens)'],
];

/**
 * Adds a batch's sums to a table, one row for each group. `keys`: the SQL expression of each key column; keys and sums
 * together are the table's columns, in order. All expressions are constants of this file.
 */
function add<T extends typeof outcomes | typeof variantOutcomes | typeof usage>(
  db: Database,
  table: T,
  keys: Record<string, string>,
  sums: typeof SUMS,
  batch: string,
  condition = '',
) {
  const columns = Object.entries(getTableColumns(table));
  const named = (name: string) => columns.find(([, column]) => column.name === name)!;
  const values = [...Object.values(keys), ...sums.map(([, sum]) => sum)].join(', ');
  const set = sums.map(([name]) => [named(name)[0], sql`${named(name)[1]} + excluded.${sql.raw(name)}`]);
  return db
    .insert(table)
    .select(
      sql`select ${sql.raw(values)} from ${events} where batch = ${batch} ${sql.raw(condition)}
      group by ${sql.raw(Object.values(keys).join(', '))}`,
    )
    .onConflictDoUpdate({
      target: Object.keys(keys).map((name) => named(name)[1]) as SQLiteColumn[],
      set: Object.fromEntries(set),
    });
}
