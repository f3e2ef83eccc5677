/** Lists read in pages: each goes on where the one before ended, whatever was added or deleted meanwhile. */
import { lt, or, type SQL, sql } from 'drizzle-orm';
import type { SQLiteColumn } from 'drizzle-orm/sqlite-core';
import type { Cursor } from '../../shared/admin-pages.ts';

export type Page<T> = {
  readonly data: T[];
  /** Where the next page begins; null when this is the last. */
  readonly next: Cursor | null;
};

/** What comes after a cursor in an order of `at`, falling, then `id`, rising; everything without one. */
export const pastCursor = (
  at: SQLiteColumn,
  id: SQLiteColumn | SQL,
  before: Cursor | undefined,
): SQL | undefined =>
  before === undefined
    ? undefined
    : or(lt(at, before.at), sql`(${at} = ${before.at} and ${id} > ${before.id})`);

/** Of rows of which one more was asked for than a page has: it says whether there are more. */
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
