/**
 * One running product a home. The lock is an exclusive SQLite transaction: the operating system lets go of it
 * with the process, so a killed run never locks the next one out, and no process id is ever guessed about.
 */
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { MaskrouteError } from '../../shared/errors.ts';

const SQLITE_BUSY = 5;

/** Call the result to let go. @throws MaskrouteError `already_running` when another process holds it. */
export function lockHome(home: string): () => void {
  const database = new DatabaseSync(path.join(home, 'dev.lock'), { timeout: 0 });
  try {
    database.exec('BEGIN EXCLUSIVE');
  } catch (error) {
    database.close();
    if ((error as { errcode?: number }).errcode !== SQLITE_BUSY) throw error;
    throw new MaskrouteError(
      'already_running',
      `Maskroute is already running on ${home}. Stop it first, or set MASKROUTE_HOME to another folder.`,
      { cause: error },
    );
  }
  return () => database.close();
}
