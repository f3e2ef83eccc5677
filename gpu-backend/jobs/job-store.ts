/** Jobs on disk, a folder each: what was asked, how far it is, its log and what it made. A reader sees whole files. */

import { createCipheriv, createDecipheriv, hkdfSync, randomBytes } from 'node:crypto';
import { mkdir, readdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { JOB_ID_PATTERN, type Job, jobSchema } from '../../shared/admin/job-wire.ts';
import { readOwnJson, writeWhole } from '../files.ts';

export type JobStore = {
  /** In order of creation; a folder that holds no job is passed over. */
  load(): Promise<Job[]>;
  save(job: Job): Promise<void>;
  remove(id: string): Promise<void>;
  readonly folderOf: (id: string) => string;
  /** What `learn` writes to, and goes on from. */
  readonly outOf: (id: string) => string;
  readonly logOf: (id: string) => string;
  readonly secretOf: (id: string) => string;
};

export function createJobStore(folder: string): JobStore {
  const folderOf = (id: string) => join(folder, id);
  const fileOf = (id: string) => join(folderOf(id), 'job.json');
  return {
    async load() {
      const names = await readdir(folder).catch(() => []);
      const jobs = await Promise.all(
        names.filter((name) => JOB_ID_PATTERN.test(name)).map((id) => readOwnJson(fileOf(id), jobSchema)),
      );
      return jobs
        .filter((job) => job !== undefined)
        .sort((a, b) => (a.created_at < b.created_at ? -1 : a.created_at > b.created_at ? 1 : 0));
    },
    async save(job) {
      await mkdir(folderOf(job.id), { recursive: true, mode: 0o700 });
      await writeWhole(fileOf(job.id), `${JSON.stringify(job, null, 2)}\n`);
    },
    remove: (id) => rm(folderOf(id), { recursive: true, force: true }),
    folderOf,
    outOf: (id) => join(folderOf(id), 'out'),
    logOf: (id) => join(folderOf(id), 'log.txt'),
    secretOf: (id) => join(folderOf(id), 'secret'),
  };
}

/*
 * A secret that has to survive a restart: sealed with AES-256-GCM under a key that follows from the backend key, so
 * that a copy of the disk does not open what the edge's administrators may do.
 */

const ALGORITHM = 'aes-256-gcm';
const IV_BYTES = 12;
const TAG_BYTES = 16;

const keyOf = (backendKey: string, purpose: string): Buffer =>
  Buffer.from(hkdfSync('sha256', backendKey, '', `maskroute ${purpose}`, 32));

/** `purpose` binds it to its place: a secret of one job does not open as another's. */
export function seal(secret: string, backendKey: string, purpose: string): Buffer {
  const iv = randomBytes(IV_BYTES);
  const cipher = createCipheriv(ALGORITHM, keyOf(backendKey, purpose), iv);
  const text = Buffer.concat([cipher.update(secret, 'utf8'), cipher.final()]);
  return Buffer.concat([iv, cipher.getAuthTag(), text]);
}

/** As `unseal`, of what one of the keys sealed. @throws Error as `unseal` with the last of them. */
export function unsealWithAny(sealed: Uint8Array, backendKeys: readonly string[], purpose: string): string {
  const [first, ...others] = backendKeys;
  if (others.length === 0) return unseal(sealed, first!, purpose);
  try {
    return unseal(sealed, first!, purpose);
  } catch {
    return unsealWithAny(sealed, others, purpose);
  }
}

/** @throws Error when it was sealed under another key or for another purpose, or is damaged. */
export function unseal(sealed: Uint8Array, backendKey: string, purpose: string): string {
  const bytes = Buffer.from(sealed);
  const decipher = createDecipheriv(ALGORITHM, keyOf(backendKey, purpose), bytes.subarray(0, IV_BYTES));
  decipher.setAuthTag(bytes.subarray(IV_BYTES, IV_BYTES + TAG_BYTES));
  const text = bytes.subarray(IV_BYTES + TAG_BYTES);
  return Buffer.concat([decipher.update(text), decipher.final()]).toString('utf8');
}
