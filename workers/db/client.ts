/** The one place that opens D1. Atomic writes go through `batch()`: D1 refuses BEGIN. */
import { type DrizzleD1Database, drizzle } from 'drizzle-orm/d1';

export type Database = DrizzleD1Database;

export const openDatabase = (d1: D1Database): Database => drizzle(d1);

export const isoTime = (time_ms: number): string => new Date(time_ms).toISOString();
export const isoTimeOrNull = (time_ms: number | null): string | null =>
  time_ms === null ? null : isoTime(time_ms);

/** Whether a write failed because a row with the same key is already there, however deep the driver wrapped it. */
export function isDuplicate(error: unknown): boolean {
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    if (/UNIQUE constraint failed|PRIMARY KEY constraint failed/i.test(cause.message)) return true;
  }
  return false;
}
