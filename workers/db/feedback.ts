/** Feedback in D1: the primary key holds each caller to one opinion a completion. */
import { MaskrouteError } from '../../shared/errors.ts';
import { type Database, isDuplicate } from './client.ts';
import { feedback } from './schema.ts';

export type Feedback = typeof feedback.$inferInsert;

/** @throws MaskrouteError `conflict` when this caller has rated this completion before. */
export async function insertFeedback(db: Database, row: Feedback): Promise<void> {
  try {
    await db.insert(feedback).values(row);
  } catch (error) {
    if (!isDuplicate(error)) throw error;
    throw new MaskrouteError('conflict', 'You have rated this completion already.', { param: 'id' });
  }
}
