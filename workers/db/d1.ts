/** What all queries share: opening D1, waiting for it, pages, room. Atomic writes go through `batch()`: D1 refuses BEGIN. */

import { type AnyColumn, count, eq, or, type SQL, sql } from 'drizzle-orm';
import { type DrizzleD1Database, drizzle } from 'drizzle-orm/d1';
import type { SQLiteColumn } from 'drizzle-orm/sqlite-core';
import type { Cursor } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { withDeadline } from '../base/waiting.ts';
import { D1_TIMEOUT_ms, RETRY_AFTER_s } from '../limits.ts';
import { apiKeys, evaluations, experiments, maskSets } from './schema.ts';

export type Database = DrizzleD1Database;

export const openDatabase = (d1: D1Database): Database => drizzle(d1);

export const isoTime = (time_ms: number): string => new Date(time_ms).toISOString();
export const isoTimeOrNull = (time_ms: number | null): string | null =>
  time_ms === null ? null : isoTime(time_ms);

export const minuteOf = (time_ms: number): number => Math.floor(time_ms / 60_000);

/** Undefined: any value will do. */
export const isIfGiven = (column: SQLiteColumn, value: string | undefined): SQL | undefined =>
  value === undefined ? undefined : eq(column, value);

/** @throws MaskrouteError `conflict` with this message when a row with the same key is there already. */
export async function orConflict<T>(insert: Promise<T>, message: string): Promise<T> {
  try {
    return await insert;
  } catch (error) {
    if (!isDuplicate(error)) throw error;
    throw new MaskrouteError('conflict', message, { param: 'id' });
  }
}

/** However deep the driver wrapped it. */
function isDuplicate(error: unknown): boolean {
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    if (/UNIQUE constraint failed|PRIMARY KEY constraint failed/i.test(cause.message)) return true;
  }
  return false;
}

/* Questions to D1 that a request has to wait for: bounded, and answered with a reason when D1 is down. */

/**
 * A write that missed the deadline may still happen. Every write here is safe to send again, a rollback if it says which
 * version it takes back.
 * @throws MaskrouteError `configuration_unavailable` when D1 fails or stalls, and errors of ours as they are.
 */
export async function d1<T>(work: Promise<T>): Promise<T> {
  try {
    return await withDeadline(work, D1_TIMEOUT_ms, 'D1');
  } catch (error) {
    if (error instanceof MaskrouteError) throw error;
    throw new MaskrouteError('configuration_unavailable', 'The database cannot be reached right now.', {
      retryAfter_s: RETRY_AFTER_s,
      cause: error,
    });
  }
}

/* How much a tenant has in the database that all share. */

export type Stored = {
  /** Revoked and replaced ones, too. */
  readonly keys: number;
  /** Drafts and those that are over, too. */
  readonly experiments: number;
  /** With their evaluations. */
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

/* Lists read in pages: each goes on where the one before ended, whatever was added or deleted meanwhile. */

export type Page<T> = {
  readonly data: T[];
  /** Where the next page begins; null when this is the last. */
  readonly next: Cursor | null;
};

/** What comes after a cursor in an order of `at`, falling, then `id`, rising; everything without one. */
export const pastCursor = (
  at: SQLiteColumn | SQL,
  id: SQLiteColumn | SQL,
  before: Cursor | undefined,
): SQL | undefined =>
  before === undefined
    ? undefined
    : sql`(${at} < ${before.at} or (${at} = ${before.at} and ${id} > ${before.id}))`;

/** Whether one of the columns holds the text, in any case of ASCII; every row does without a text. */
export const holds = (text: string | undefined, ...columns: (AnyColumn | SQL)[]): SQL | undefined =>
  text === undefined
    ? undefined
    : or(...columns.map((column) => sql`instr(lower(coalesce(${column}, '')), lower(${text})) > 0`));

/** A page of rows. One more is asked for than a page has: it says whether there are more. */
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
