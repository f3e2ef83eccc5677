/**
 * Shared by all queries: opening D1, time limits, pagination, storage limits. Atomic writes use `batch()`, since D1 has
 * no BEGIN.
 */

import { type AnyColumn, count, eq, or, type SQL, sql } from 'drizzle-orm';
import { type DrizzleD1Database, drizzle } from 'drizzle-orm/d1';
import type { SQLiteColumn } from 'drizzle-orm/sqlite-core';
import type { Cursor } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parseOrNull } from '../../shared/wire/parse-body.ts';
import { notNow, withDeadline } from '../base/waiting.ts';
import { D1_TIMEOUT_ms } from '../limits.ts';
import { apiKeys, evaluations, experiments, maskSets } from './schema.ts';

export type Database = DrizzleD1Database;

export const openDatabase = (d1: D1Database): Database => drizzle(d1);

/** SQLite stores text in a column of numbers, too; it is shown as it is, since a throw at one row would hide all of them. */
export function isoTime(time_ms: number): string {
  const time = new Date(time_ms);
  return Number.isNaN(time.getTime()) ? String(time_ms) : time.toISOString();
}
export const isoTimeOrNull = (time_ms: number | null): string | null =>
  time_ms === null ? null : isoTime(time_ms);

export const minuteOf = (time_ms: number): number => Math.floor(time_ms / 60_000);

/**
 * The value of a column with JSON. Text that is not JSON stays text, which no schema of a list or an object accepts: a
 * query that throws at one row would hide all of them.
 */
export const storedJson = (text: string | null): unknown =>
  text === null ? null : (parseOrNull(text) ?? text);

/** A condition on a column; `value` undefined: any value. */
export const isIfGiven = (column: SQLiteColumn, value: string | undefined): SQL | undefined =>
  value === undefined ? undefined : eq(column, value);

/** The first row, as `read` shows it; null without one. */
export async function firstOf<Row, T>(rows: PromiseLike<Row[]>, read: (row: Row) => T): Promise<T | null> {
  const [row] = await rows;
  return row === undefined ? null : read(row);
}

/** @throws MaskrouteError `conflict` with this message when a row with the same key is there already. */
export async function orConflict<T>(insert: Promise<T>, message: string): Promise<T> {
  try {
    return await insert;
  } catch (error) {
    if (!isDuplicate(error)) throw error;
    throw new MaskrouteError('conflict', message, { param: 'id' });
  }
}

/** Whether an error, or one of its causes, is a unique violation. */
function isDuplicate(error: unknown): boolean {
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    if (/UNIQUE constraint failed|PRIMARY KEY constraint failed/i.test(cause.message)) return true;
  }
  return false;
}

/* Queries that a request must wait for: with a time limit, and an error that says so when D1 is down. */

/**
 * A write that timed out may still happen. Every write here can be repeated safely, a rollback only if it names the
 * version to roll back.
 * @throws MaskrouteError `configuration_unavailable` when D1 fails or stalls; our own errors pass unchanged.
 */
export async function d1<T>(work: Promise<T>): Promise<T> {
  try {
    return await withDeadline(work, D1_TIMEOUT_ms, 'D1');
  } catch (error) {
    if (error instanceof MaskrouteError) throw error;
    throw notNow('configuration_unavailable', 'The database cannot be reached right now.', error);
  }
}

/**
 * What a query finds; `query` is null when what is asked for cannot be there.
 * @throws MaskrouteError `not_found` with this message for null; what `d1` throws.
 */
export async function existing<T>(
  query: Promise<T | null> | null,
  message: string,
  param?: string,
): Promise<T> {
  const found = query === null ? null : await d1(query);
  if (found !== null) return found;
  throw new MaskrouteError('not_found', message, param === undefined ? {} : { param });
}

/* How much a tenant stores in the shared database. */

export type Stored = {
  /** Including revoked and replaced keys. */
  readonly keys: number;
  /** Including drafts and ended experiments. */
  readonly experiments: number;
  /** Including their evaluations. */
  readonly maskSets_bytes: number;
};

export async function findStored(db: Database, tenant: string): Promise<Stored> {
  const [[keys], [drafts], [sets], [evaluated]] = await db.batch([
    db.select({ count: count() }).from(apiKeys).where(eq(apiKeys.tenantId, tenant)),
    db.select({ count: count() }).from(experiments).where(eq(experiments.owner, tenant)),
    db
      .select({ bytes: sql<number>`coalesce(sum(${maskSets.content_bytes}), 0)` })
      .from(maskSets)
      .where(eq(maskSets.owner, tenant)),
    db
      .select({ bytes: sql<number>`coalesce(sum(${evaluations.content_bytes}), 0)` })
      .from(evaluations)
      .where(eq(evaluations.owner, tenant)),
  ]);
  const maskSets_bytes = sets!.bytes + evaluated!.bytes;
  return { keys: keys!.count, experiments: drafts!.count, maskSets_bytes };
}

/* Keyset pagination: each page continues after the last item of the previous one, whatever was added or deleted meanwhile. */

export type Page<T> = {
  readonly data: T[];
  /** Cursor of the next page; null when this is the last page. */
  readonly next: Cursor | null;
};

/** Rows after a cursor, in descending order of `at`, then ascending order of `id`; all rows without a cursor. */
export const pastCursor = (
  at: SQLiteColumn | SQL,
  id: SQLiteColumn | SQL,
  before: Cursor | undefined,
): SQL | undefined =>
  before === undefined
    ? undefined
    : sql`(${at} < ${before.at} or (${at} = ${before.at} and ${id} > ${before.id}))`;

/** Whether one of the columns contains the text, ignoring ASCII case; true for every row without a text. */
export const holds = (text: string | undefined, ...columns: (AnyColumn | SQL)[]): SQL | undefined =>
  text === undefined
    ? undefined
    : or(...columns.map((column) => sql`instr(lower(coalesce(${column}, '')), lower(${text})) > 0`));

/** Makes a page from `limit` + 1 rows; the extra row shows whether there is a next page. */
export function toPage<Row, T>(
  rows: readonly Row[],
  limit: number,
  cursorOf: (row: Row) => Cursor,
  toItem: (row: Row) => T,
): Page<T> {
  const kept = rows.slice(0, limit);
  const last = kept.at(-1);
  const next = rows.length > limit && last !== undefined ? cursorOf(last) : null;
  return { data: kept.map(toItem), next };
}
