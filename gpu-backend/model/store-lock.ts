/**
 * One import at a time. The lock is an exclusive SQLite transaction: the operating system lets go of it with the
 * process, so a killed import never locks the next one out, and no process id is ever guessed about.
 */
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { setTimeout as sleep } from 'node:timers/promises';
import { modelsFolder } from './store.ts';

const SQLITE_BUSY = 5;
const POLL_ms = 250;

/** Runs `work` alone; waits for another import as long as it takes, saying so once through `onWait`. */
export async function withStoreLock<T>(
  home: string,
  options: { readonly onWait: () => void; readonly signal?: AbortSignal | undefined },
  work: () => Promise<T>,
): Promise<T> {
  const models = modelsFolder(home);
  await mkdir(models, { recursive: true });
  const database = new DatabaseSync(join(models, '.lock'), { timeout: 0 });
  try {
    for (let waited = false; !tryLock(database); waited = true) {
      if (!waited) options.onWait();
      await sleep(POLL_ms, undefined, options.signal ? { signal: options.signal } : {});
    }
    return await work();
  } finally {
    database.close();
  }
}

function tryLock(database: DatabaseSync): boolean {
  try {
    database.exec('BEGIN EXCLUSIVE');
    return true;
  } catch (error) {
    if ((error as { errcode?: number }).errcode === SQLITE_BUSY) return false;
    throw error;
  }
}
