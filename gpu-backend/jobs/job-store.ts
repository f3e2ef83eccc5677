/**
 * What jobs keep on disk: each has a folder with its request, sealed secret, progress, log and results. Uploaded data is
 * beside these folders (`job-data.ts`). Files are replaced atomically.
 */
import { createCipheriv, createDecipheriv, hkdfSync, randomBytes } from 'node:crypto';
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { z } from 'zod';
import { isFinished, JOB_ID_PATTERN, type Job, jobSchema } from '../../shared/admin/job-wire.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readOwnJson, sizeOf, writeWhole } from '../files.ts';
import { oneAtATime } from '../one-at-a-time.ts';
import { readMaskSet } from '../publication/publish.ts';

/** Writes to the backend's log. */
export type Note = (message: string, detail: Record<string, unknown>) => void;

export type JobStore = {
  /**
   * Jobs in order of creation. Damaged jobs are skipped. What a kill left is removed: a folder without a job, whose
   * request was never answered, and the secret of a finished job; the log says what cannot be removed. Rejects with the
   * disk's error when a job cannot be read.
   */
  load(): Promise<Job[]>;
  /** Saves run one after the other, so that an older state never overwrites a newer one. */
  save(job: Job): Promise<void>;
  remove(id: string): Promise<void>;
  /** Removes the secret of an ended job, if it has one. Where the disk refuses, the log says so; the next start tries again. */
  removeSecret(id: string): Promise<void>;
  readonly folderOf: (id: string) => string;
  /** The folder that `learn` writes to and resumes from. */
  readonly outOf: (id: string) => string;
  /** The mask set, the last file that `learn` writes. */
  readonly setOf: (id: string) => string;
  /** Whether the job has learned. */
  hasSet(id: string): Promise<boolean>;
  /** Rejects when the job has not learned, or its file is damaged. */
  readSet(id: string): Promise<MaskSet>;
  readonly logOf: (id: string) => string;
  /** What publishing remembers of its first try; see `publish --once`. */
  readonly firstTryOf: (id: string) => string;
};

export function createJobStore(folder: string, note: Note): JobStore {
  const folderOf = (id: string) => join(folder, id);
  const outOf = (id: string) => join(folderOf(id), 'out');
  const setOf = (id: string) => join(outOf(id), 'mask-set.json');
  const write = async (job: Job) => {
    await mkdir(folderOf(job.id), { recursive: true, mode: 0o700 });
    await writeWhole(join(folderOf(job.id), 'job.json'), `${JSON.stringify(job, null, 2)}\n`);
  };
  const remove = (id: string) => rm(folderOf(id), { recursive: true, force: true });
  const removeSecret = (id: string) =>
    rm(secretIn(folderOf(id)), { force: true }).catch(({ message: reason }: Error) =>
      note('the secret of an ended job was not deleted', { job: id, reason }),
    );
  const inTurn = oneAtATime();
  return {
    async load() {
      const jobs = await loadAll(folder, 'job', { ids: JOB_ID_PATTERN, schema: jobSchema, note });
      for (const job of jobs) if (isFinished(job)) await removeSecret(job.id);
      return inOrder(jobs);
    },
    save: (job) => inTurn(() => write(job)),
    remove,
    removeSecret,
    folderOf,
    outOf,
    setOf,
    hasSet: async (id) => (await sizeOf(setOf(id))) !== undefined,
    readSet: (id) => readMaskSet(setOf(id)),
    logOf: (id) => join(folderOf(id), 'log.txt'),
    firstTryOf: (id) => join(folderOf(id), 'first-try.json'),
  };
}

/**
 * By number. An older backend, which may run between two newer ones, numbers no jobs, and drops the numbers of those that it
 * runs. Such a job gets the highest number of the jobs with earlier dates, and follows them.
 */
function inOrder(jobs: readonly Job[]): Job[] {
  let newest = 0;
  return jobs
    .toSorted((a, b) => Date.parse(a.created_at) - Date.parse(b.created_at))
    .map((job) => {
      newest = Math.max(newest, job.number);
      return { ...job, number: job.number || newest };
    })
    .sort((a, b) => a.number - b.number);
}

/**
 * The jobs or schedules of a folder: each has a folder of its own there, named by its id, with a file named by its kind.
 * Damaged ones are skipped. A folder without the file was left by a kill and is removed; the log says where that fails.
 * Rejects with the disk's error when a file cannot be read.
 */
export async function loadAll<T>(
  folder: string,
  kind: 'job' | 'schedule',
  { ids, schema, note }: { readonly ids: RegExp; readonly schema: z.ZodType<T>; readonly note: Note },
): Promise<T[]> {
  const load = async (id: string): Promise<T | undefined> => {
    const file = join(folder, id, `${kind}.json`);
    // Read before removing anything: this throws when the disk cannot say whether the file exists.
    const found = await readOwnJson(file, schema);
    if (found === undefined && (await sizeOf(file)) === undefined)
      await rm(join(folder, id), { recursive: true, force: true }).catch(({ message: reason }: Error) =>
        note(`what a kill left of a ${kind} was not deleted`, { [kind]: id, reason }),
      );
    return found;
  };
  const names = await readdir(folder).catch(() => []);
  const found = await Promise.all(names.filter((name) => ids.test(name)).map(load));
  return found.filter((one) => one !== undefined);
}

/*
 * Secrets that must survive a restart are sealed with AES-256-GCM under a key derived from the backend key. A copy of
 * the disk alone does not reveal an admin key.
 */

const ALGORITHM = 'aes-256-gcm';
const IV_BYTES = 12;
const TAG_BYTES = 16;

const keyOf = (backendKey: string, purpose: string): Buffer =>
  Buffer.from(hkdfSync('sha256', backendKey, '', `maskroute ${purpose}`, 32));

/** `purpose` is part of the key's derivation: a secret sealed for one job does not open for another. */
export function seal(secret: string, backendKey: string, purpose: string): Buffer {
  const iv = randomBytes(IV_BYTES);
  const cipher = createCipheriv(ALGORITHM, keyOf(backendKey, purpose), iv);
  const text = Buffer.concat([cipher.update(secret, 'utf8'), cipher.final()]);
  return Buffer.concat([iv, cipher.getAuthTag(), text]);
}

/**
 * Tries each key in turn.
 * @throws MaskrouteError `conflict` when it was sealed under another key or for another purpose, or is damaged.
 */
export function unseal(sealed: Buffer, backendKeys: readonly string[], purpose: string): string {
  for (const backendKey of backendKeys) {
    try {
      return decrypted(sealed, backendKey, purpose);
    } catch {
      // GCM refuses a wrong key.
    }
  }
  const message =
    'The admin key cannot be decrypted: the backend key has changed since. Create the job or schedule again.';
  throw new MaskrouteError('conflict', message);
}

function decrypted(bytes: Buffer, backendKey: string, purpose: string): string {
  const decipher = createDecipheriv(ALGORITHM, keyOf(backendKey, purpose), bytes.subarray(0, IV_BYTES));
  decipher.setAuthTag(bytes.subarray(IV_BYTES, IV_BYTES + TAG_BYTES));
  const text = bytes.subarray(IV_BYTES + TAG_BYTES);
  return Buffer.concat([decipher.update(text), decipher.final()]).toString('utf8');
}

/** The secret of a job or schedule is in its folder, and sealed for its id, which is the folder's name. */
const secretIn = (folder: string): string => join(folder, 'secret');

/** @throws MaskrouteError as {@link unseal}; the disk's error when there is none. */
export const readSecret = async (folder: string, backendKeys: readonly string[]): Promise<string> =>
  unseal(await readFile(secretIn(folder)), backendKeys, basename(folder));

/** Makes the folder of a job or schedule with its secret and what `write` adds; if a write fails, removes it again. */
export async function makeWithSecret(
  folder: string,
  secret: string | undefined,
  backendKey: string,
  write: () => Promise<void>,
): Promise<void> {
  try {
    await mkdir(folder, { recursive: true, mode: 0o700 });
    if (secret !== undefined)
      await writeFile(secretIn(folder), seal(secret, backendKey, basename(folder)), { mode: 0o600 });
    await write();
  } catch (error) {
    await rm(folder, { recursive: true, force: true });
    throw error;
  }
}
