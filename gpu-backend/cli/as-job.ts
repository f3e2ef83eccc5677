/**
 * A command as a backend's job. Two things that a terminal does not need: it ends when its parent is gone, so that no
 * orphan goes on; and it waits for another run on the same folder to end, for one that was orphaned a moment ago may
 * still be at its last step.
 */
import { join } from 'node:path';
import { tryLock } from '../files.ts';

const OTHER_RUN_ENDS_WITHIN_ms = 60_000;

/** `folder` is the job's; it stays locked as long as this process lives. @throws Error when another run does not end. */
export function becomeJob(folder: string): void {
  process.once('disconnect', () => process.kill(process.pid, 'SIGKILL'));
  // The channel alone must not keep the process.
  process.channel?.unref();
  if (tryLock(join(folder, 'lock'), OTHER_RUN_ENDS_WITHIN_ms) === undefined)
    throw new Error('another run of this job does not end');
}
