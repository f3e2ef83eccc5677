/**
 * A command as a backend's job. Two things that a terminal does not need: it ends when its parent is gone, so that no
 * orphan goes on; and it waits for another run on the same folder to end, for one that was orphaned a moment ago may
 * still be at its last step.
 */
import { join } from 'node:path';
import { DatabaseSync } from 'node:sqlite';

const OTHER_RUN_ENDS_WITHIN_ms = 60_000;

/** Kept from the garbage collector, which would let go of the lock. */
const held: DatabaseSync[] = [];

/**
 * `folder` is the job's. The lock is an exclusive SQLite transaction, which the operating system lets go of with the
 * process. @throws Error when another run does not end.
 */
export function becomeJob(folder: string): void {
  process.once('disconnect', () => process.kill(process.pid, 'SIGKILL'));
  // The channel alone must not keep the process.
  process.channel?.unref();
  const lock = new DatabaseSync(join(folder, 'lock'), { timeout: OTHER_RUN_ENDS_WITHIN_ms });
  lock.exec('BEGIN EXCLUSIVE');
  held.push(lock);
}
