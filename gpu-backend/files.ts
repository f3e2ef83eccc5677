/**
 * Files on this machine: where the product keeps its own, how they are written whole, how files that somebody else
 * chose are read safely, and locks that end with their process.
 */
import { randomUUID } from 'node:crypto';
import { constants, type Stats } from 'node:fs';
import {
  type FileHandle,
  link,
  open,
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
 * Where everything that outlives a process is kept: models, masks, the local database, development keys. An absolute
 * folder: `MASKROUTE_HOME`, or `~/.cache/maskroute`. It need not exist yet.
 */
export function maskrouteHome(): string {
  const named = process.env.MASKROUTE_HOME;
  return named === undefined || named === ''
    ? path.join(homedir(), '.cache', 'maskroute')
    : path.resolve(named);
}

/** Where Node keeps what it compiled of the sources: what is started again loads in half the time. */
export const COMPILED_FOLDER = path.resolve(import.meta.dirname, '../node_modules/.cache/node-compile');

/* The product's own files. */

/** A reader sees the old file or the new one, whoever else writes it, and so does a machine after a power cut. */
export async function writeWhole(
  file: string,
  content: string | Uint8Array,
  options: { readonly mode?: number } = {},
): Promise<void> {
  const part = partOf(file);
  try {
    await writeFile(part, content, { ...options, flush: true });
    await rename(part, file);
  } finally {
    await rm(part, { force: true });
  }
}

/**
 * As {@link writeWhole}, and never in the place of another file: `false` when there is one of that name. Where the file
 * system has no hard links, a reader may see the file before it is whole.
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
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
    return false;
  } finally {
    await rm(part, { force: true });
  }
}
const HAS_NO_LINKS: ReadonlySet<string | undefined> = new Set(['EPERM', 'ENOTSUP', 'EOPNOTSUPP', 'ENOSYS']);

/** For files that hold keys: only their owner reads them. */
export const writePrivateJson = (file: string, value: unknown): Promise<void> =>
  writeWhole(file, `${JSON.stringify(value, null, 2)}\n`, { mode: 0o600 });

/** `undefined` when the file is absent, cut short, or not what `schema` asks for. */
export async function readOwnJson<T>(file: string, schema: z.ZodType<T>): Promise<T | undefined> {
  try {
    return schema.safeParse(JSON.parse(await readFile(file, 'utf8'))).data;
  } catch (error) {
    if (error instanceof SyntaxError || (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

/** In bytes; `undefined` when there is nothing of that name. */
export const sizeOf = (file: string): Promise<number | undefined> =>
  stat(file).then(
    ({ size }) => size,
    () => undefined,
  );

/** A hidden name beside `file` that nobody else writes to. */
export const partOf = (file: string): string =>
  path.join(path.dirname(file), `.${path.basename(file)}.${randomUUID().slice(0, 8)}`);

/*
 * Files that people name, or that lie in a folder that they name. Only regular files are opened: the reader of a named
 * pipe waits for a writer who may never come, and opening a device can already do something.
 */

/**
 * `folder`: links in it may not lead out of it. Whoever made the folder chose the links, and the file's content may end
 * up where others read it.
 * @throws MaskrouteError `invalid_argument`, naming the file, for all that is no regular file or leads out of `folder`;
 * the system's error when there is none or it cannot be opened.
 */
export async function openRegular(file: string, folder?: string): Promise<FileHandle> {
  const real = await realpath(file).catch((error: NodeJS.ErrnoException) => {
    throw error.code === 'ELOOP' ? refused(file, 'is a link that leads in a circle') : error;
  });
  if (folder !== undefined && !isInside(real, await ownFolder(folder)))
    throw refused(file, `is a link that leads out of its folder, to ${real}`);
  requireRegular(file, await stat(real));
  // It may be another file by now: then the flag keeps a pipe from holding us up, and the second look finds out.
  const handle = await open(real, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  try {
    requireRegular(file, await handle.stat());
    return handle;
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/** The whole of a small file. @throws as {@link openRegular}, and `invalid_argument` when it is larger. */
export async function readRegular(file: string, bytesMax: number, folder?: string): Promise<Buffer> {
  const handle = await openRegular(file, folder);
  try {
    if ((await handle.stat()).size > bytesMax) throw refused(file, `is larger than ${bytesMax} bytes`);
    return await handle.readFile();
  } finally {
    await handle.close();
  }
}

/** The same as JSON. `refuse` makes the error for other text. @throws as {@link readRegular}. */
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
 * The error for people when `file` cannot be read. A MaskrouteError, such as {@link openRegular}'s, is returned as it is; the
 * system's own error becomes `invalid_argument`, which names the file and the reason.
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

/** What it is, for people. */
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

/** The hub's own cache keeps a model's files beside its snapshots, and links in the snapshots lead there. */
const HUB_SNAPSHOT = /^(.*[\\/]models--[^\\/]+)[\\/]snapshots[\\/][0-9a-f]{40}(?:[\\/]|$)/;

async function ownFolder(folder: string): Promise<string> {
  const real = await realpath(folder);
  return HUB_SNAPSHOT.exec(real)?.[1] ?? real;
}

const isInside = (file: string, folder: string): boolean => file.startsWith(folder + path.sep);

/*
 * A lock is an exclusive SQLite transaction: the operating system lets go of it with the process, so a killed one never
 * locks the next one out, and nobody guesses about process ids.
 */

const SQLITE_BUSY = 5;
const SQLITE_NOTADB = 26;
/** The garbage collector would let go of locks that nothing refers to. */
const held = new Set<DatabaseSync>();

/**
 * Call the result to let go, once or more often; `undefined` when another process, or another part of this one, holds it. This thread stands
 * still for up to `wait_ms`. @throws MaskrouteError `start_failed` when the file cannot be a lock: no room, no right, other content.
 */
export function tryLock(file: string, wait_ms = 0): (() => void) | undefined {
  let database: DatabaseSync | undefined;
  try {
    database = new DatabaseSync(file, { timeout: wait_ms });
    database.exec('BEGIN EXCLUSIVE');
  } catch (cause) {
    database?.close();
    const { errcode, message } = cause as Error & { errcode?: number };
    if (errcode === SQLITE_BUSY) return undefined;
    const advice = errcode === SQLITE_NOTADB ? ' Nothing is kept in it: delete it.' : '';
    throw new MaskrouteError('start_failed', `${file} cannot be locked: ${message}.${advice}`, { cause });
  }
  const locked = database;
  held.add(locked);
  return () => {
    if (held.delete(locked)) locked.close();
  };
}

const POLL_ms = 250;

/**
 * Runs `work` while it holds the lock `file`; waits for another holder as long as it takes, saying so once through `onWait`.
 * @throws MaskrouteError as {@link tryLock}; the reason of `signal`.
 */
export async function withLock<T>(
  file: string,
  { onWait, signal }: { readonly onWait: () => void; readonly signal?: AbortSignal | undefined },
  work: () => Promise<T>,
): Promise<T> {
  let unlock = tryLock(file);
  if (unlock === undefined) onWait();
  for (; unlock === undefined; unlock = tryLock(file)) {
    await sleep(POLL_ms, undefined, signal ? { signal } : {});
  }
  try {
    return await work();
  } finally {
    unlock();
  }
}
