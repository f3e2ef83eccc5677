/**
 * File access: the product's own folder, atomic writes, safe reads of files that users name, and locks that end with their
 * process.
 */
import { randomUUID } from 'node:crypto';
import { constants, rmSync, type Stats } from 'node:fs';
import {
  type FileHandle,
  link,
  lstat,
  mkdir,
  open,
  readdir,
  readFile,
  realpath,
  rename,
  rm,
  stat,
  writeFile,
} from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { setTimeout as sleep } from 'node:timers/promises';
import type { z } from 'zod';
import { MaskrouteError } from '../shared/wire/errors.ts';

/**
 * The folder of all persistent data: models, masks, the local database, development keys. An absolute path:
 * `MASKROUTE_HOME`, or `~/.cache/maskroute`. It need not exist yet.
 */
export function maskrouteHome(): string {
  const named = process.env.MASKROUTE_HOME;
  return named === undefined || named === ''
    ? path.join(homedir(), '.cache', 'maskroute')
    : path.resolve(named);
}

/* The product's own files. */

/**
 * Makes a folder and those above it, unless they exist. Node's recursive mkdir never ends in /proc: the system says that
 * there is no such folder, and Node makes the one above again.
 * @throws MaskrouteError `storage_failed`.
 */
export async function makeFolder(folder: string, mode?: number): Promise<void> {
  const exists = async () => (await stat(folder).catch(() => undefined))?.isDirectory() === true;
  if (await exists()) return;
  await makeFolder(path.dirname(folder), mode);
  try {
    await mkdir(folder, { mode });
  } catch (cause) {
    // Another process, or another call, may have made it meanwhile.
    if (await exists()) return;
    throw new MaskrouteError('storage_failed', `${folder} cannot be made: ${(cause as Error).message}.`, {
      cause,
    });
  }
}

/**
 * Makes a folder for what long work will write, and tries whether anything can be written there.
 * @throws MaskrouteError `storage_failed`.
 */
export async function makeOutFolder(folder: string): Promise<void> {
  await makeFolder(folder);
  const trial = partOf(path.join(folder, 'trial'));
  try {
    await writeFile(trial, '');
    await rm(trial);
  } catch (cause) {
    const message = `Nothing can be written to ${folder}: ${(cause as Error).message}`;
    throw new MaskrouteError('storage_failed', message, { cause });
  }
}

/** As {@link makeOutFolder}, for a file. @throws MaskrouteError also `invalid_argument` where a folder or a device is. */
export async function makeOutFolderOf(file: string): Promise<void> {
  await makeOutFolder(path.dirname(path.resolve(file)));
  const found = await stat(file).catch(() => undefined);
  if (found !== undefined) requireRegular(file, found);
}

/** Writes a file atomically: readers see the old or the new content, also with concurrent writers and after a power cut. */
export async function writeWhole(
  file: string,
  content: string | Uint8Array,
  options: { readonly mode?: number } = {},
): Promise<void> {
  const part = partOf(file);
  try {
    await writeFile(part, content, { ...options, flush: true });
    await rename(part, file);
  } catch (error) {
    await removePart(part);
    throw namingFile(file, error);
  }
}

/** Never rejects: what counts is why the file was not written, not why its part stays. */
const removePart = (part: string): Promise<void> => rm(part, { force: true }).catch(() => {});

/**
 * As {@link writeWhole}, but does not replace a file. On file systems without hard links a reader may see a part of it.
 * @returns false when the file exists already.
 */
export async function createWhole(file: string, content: string): Promise<boolean> {
  const part = partOf(file);
  try {
    await writeFile(part, content, { flush: true });
    await link(part, file).catch((error: NodeJS.ErrnoException) => {
      if (!HAS_NO_LINKS.has(error.code)) throw error;
      return writeFile(file, content, { flag: 'wx', flush: true });
    });
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw namingFile(file, error);
    return false;
  } finally {
    await removePart(part);
  }
}
const HAS_NO_LINKS: ReadonlySet<string | undefined> = new Set(['EPERM', 'ENOTSUP', 'EOPNOTSUPP', 'ENOSYS']);

/** The system's error of writing `file`: that of a full disk names no file. */
export function namingFile(file: string, error: unknown): unknown {
  if (error instanceof Error && 'syscall' in error && !('path' in error))
    Object.assign(error, { path: file, message: `${error.message} '${file}'` });
  return error;
}

/** Writes JSON that contains keys: only the owner may read the file. */
export const writePrivateJson = (file: string, value: unknown): Promise<void> =>
  writeWhole(file, `${JSON.stringify(value, null, 2)}\n`, { mode: 0o600 });

/** Reads JSON; `undefined` when the file is missing, truncated, or does not match `schema`. */
export async function readOwnJson<T>(file: string, schema: z.ZodType<T>): Promise<T | undefined> {
  try {
    return schema.safeParse(JSON.parse(await readFile(file, 'utf8'))).data;
  } catch (error) {
    if (error instanceof SyntaxError || (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

/** Size in bytes; `undefined` when there is no such file. */
export const sizeOf = (file: string): Promise<number | undefined> =>
  stat(file).then(
    ({ size }) => size,
    () => undefined,
  );

/** A unique hidden name in the folder of `file`, for writing it before a rename. */
export const partOf = (file: string): string =>
  path.join(path.dirname(file), `.${path.basename(file)}.${randomUUID().slice(0, 8)}`);

/** A part is needed for seconds; one of this age was left by a process that was killed. */
const PART_AGE_MAX_ms = 3_600_000;

/** Removes what killed processes left of {@link partOf} `file`. */
export const removeOldParts = (file: string): Promise<void> =>
  removeOld(path.dirname(file), (name) => name.startsWith(`.${path.basename(file)}.`));

/** Removes what killed processes left of {@link partOf} any file in `folder`. */
export const removeAllOldParts = (folder: string): Promise<void> =>
  removeOld(folder, (name) => /^\..+\.[0-9a-f]{8}$/.test(name));

async function removeOld(folder: string, isPart: (name: string) => boolean): Promise<void> {
  for (const name of (await readdir(folder)).filter(isPart)) {
    const part = path.join(folder, name);
    const { mtimeMs } = await stat(part).catch(() => ({ mtimeMs: Number.POSITIVE_INFINITY }));
    if (Date.now() - mtimeMs > PART_AGE_MAX_ms) await rm(part, { force: true });
  }
}

/*
 * Files that users name, or that are in a folder that they name. Only regular files are opened: reading a named pipe can
 * block for ever, and opening a device can have side effects.
 */

/**
 * `folder`: symbolic links must not lead out of it. Its author may be a stranger, and the content of a linked file could be
 * published.
 * @throws MaskrouteError `invalid_argument`, naming the file, when it is not a regular file or leads out of `folder`; the
 * system's error when it does not exist or cannot be opened.
 */
export async function openRegular(file: string, folder?: string): Promise<FileHandle> {
  const real = await realpath(file).catch(async (error: NodeJS.ErrnoException) => {
    if (error.code === 'ELOOP') throw refused(file, 'is a link that leads in a circle');
    if (error.code === 'ENOENT' && (await lstat(file).catch(() => undefined)) !== undefined)
      throw refused(file, 'is a link to a file that is not there');
    throw error;
  });
  if (folder !== undefined && !isInside(real, await ownFolder(folder)))
    throw refused(file, `is a link that leads out of its folder, to ${real}`);
  requireRegular(file, await stat(real));
  // The file may have been replaced since: O_NONBLOCK keeps a pipe from blocking, and the second check refuses it.
  const handle = await open(real, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  try {
    requireRegular(file, await handle.stat());
    return handle;
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/** Reads a file of at most `bytesMax`. @throws as {@link openRegular}, and `invalid_argument` when it is larger. */
export async function readRegular(file: string, bytesMax: number, folder?: string): Promise<Buffer> {
  const handle = await openRegular(file, folder);
  try {
    if ((await handle.stat()).size > bytesMax) throw refused(file, `is larger than ${bytesMax} bytes`);
    return await handle.readFile();
  } finally {
    await handle.close();
  }
}

/** Reads a file as JSON. `refuse` makes the error for invalid JSON. @throws as {@link readRegular}. */
export async function readJson(
  file: string,
  bytesMax: number,
  refuse: (reason: string, cause: unknown) => Error,
  folder?: string,
): Promise<unknown> {
  const bytes = await readRegular(file, bytesMax, folder);
  try {
    return JSON.parse(bytes.toString('utf8'));
  } catch (error) {
    throw refuse('is not JSON', error);
  }
}

/**
 * Turns a system error of opening or reading `file` into MaskrouteError `invalid_argument` with a message for users. A
 * MaskrouteError is returned unchanged.
 */
export function unreadable(file: string, error: unknown): MaskrouteError {
  if (error instanceof MaskrouteError) return error;
  const message = `${file} cannot be read: ${whyUnread(error as NodeJS.ErrnoException)}.`;
  return new MaskrouteError('invalid_argument', message, { cause: error });
}

function whyUnread({ code, message }: NodeJS.ErrnoException): string {
  if (code === 'ENOENT' || code === 'ENOTDIR') return 'there is no such file';
  return code === 'EACCES' || code === 'EPERM' ? 'you may not read it' : message;
}

/** The type of a file, for messages. */
export function kindOf(stats: Stats): string {
  if (stats.isFile()) return 'a regular file';
  if (stats.isDirectory()) return 'a folder';
  if (stats.isFIFO()) return 'a named pipe';
  return stats.isSocket() ? 'a socket' : 'a device';
}

function requireRegular(file: string, stats: Stats): void {
  if (!stats.isFile()) throw refused(file, `is ${kindOf(stats)}, not a regular file`);
}

const refused = (file: string, why: string): MaskrouteError =>
  new MaskrouteError('invalid_argument', `${file} ${why}.`);

/** A snapshot in Hugging Face's cache: its links lead to the model's folder above it. */
const HUB_SNAPSHOT = /^(.*[\\/]models--[^\\/]+)[\\/]snapshots[\\/][0-9a-f]{40}(?:[\\/]|$)/;

async function ownFolder(folder: string): Promise<string> {
  const real = await realpath(folder);
  return HUB_SNAPSHOT.exec(real)?.[1] ?? real;
}

const isInside = (file: string, folder: string): boolean => file.startsWith(folder + path.sep);

/*
 * A lock is an exclusive SQLite transaction. The operating system releases it when the process ends, so there are no stale
 * locks and no process ids to check.
 */

const SQLITE_BUSY = 5;
const SQLITE_NOTADB = 26;
const SQLITE_IOERR_LOCK = 3850;
/** Held locks; without a reference the garbage collector would release them. */
const held = new Set<DatabaseSync>();

/**
 * Takes the lock `file`.
 * @returns a function that releases it and may be called again; `undefined` when it is held elsewhere, in this process too.
 * @throws MaskrouteError `start_failed` when the file cannot be used as a lock: disk full, no permission, other content, a
 * file system without locks.
 */
export function tryLock(file: string): (() => void) | undefined {
  let locked: DatabaseSync;
  try {
    locked = lock(file);
  } catch (cause) {
    const { errcode, message } = cause as SqliteError;
    if (errcode === SQLITE_BUSY && hasLocks(file)) return undefined;
    throw new MaskrouteError('start_failed', `${file} cannot be locked: ${whyUnlocked(errcode, message)}.`, {
      cause,
    });
  }
  held.add(locked);
  return () => {
    if (held.delete(locked)) locked.close();
  };
}

type SqliteError = Error & { readonly errcode?: number };

function whyUnlocked(errcode: number | undefined, message: string): string {
  if (errcode === SQLITE_BUSY || errcode === SQLITE_IOERR_LOCK)
    return 'its file system has no locks; use a folder on a local disk';
  return errcode === SQLITE_NOTADB ? `${message}. It holds no data, so you can delete it` : message;
}

/** @throws the error of SQLite. */
function lock(file: string): DatabaseSync {
  const database = new DatabaseSync(file);
  try {
    database.exec('BEGIN EXCLUSIVE');
    return database;
  } catch (error) {
    database.close();
    throw error;
  }
}

/**
 * Whether the file system of `file` has locks. A network mount without a lock service refuses each, and SQLite takes
 * that for a lock that is held: only a file of its own, which nobody else locks, tells the two apart.
 */
function hasLocks(file: string): boolean {
  const own = partOf(file);
  try {
    lock(own).close();
    return true;
  } catch (error) {
    return (error as SqliteError).errcode !== SQLITE_BUSY;
  } finally {
    rmSync(own, { force: true });
  }
}

const POLL_ms = 250;

type WaitOptions = { readonly onWait: () => void; readonly signal?: AbortSignal | undefined };

/**
 * Takes the lock `file`. Waits for another holder without a time limit; calls `onWait` once if it has to wait.
 * @returns a function that releases it.
 * @throws MaskrouteError as {@link tryLock}; the reason of `signal`.
 */
export async function waitForLock(file: string, { onWait, signal }: WaitOptions): Promise<() => void> {
  let unlock = tryLock(file);
  if (unlock === undefined) onWait();
  for (; unlock === undefined; unlock = tryLock(file)) {
    await sleep(POLL_ms, undefined, signal ? { signal } : {});
  }
  return unlock;
}

/** Runs `work` under the lock `file`. Waits and throws as {@link waitForLock}. */
export async function withLock<T>(file: string, options: WaitOptions, work: () => Promise<T>): Promise<T> {
  const unlock = await waitForLock(file, options);
  try {
    return await work();
  } finally {
    unlock();
  }
}
