/** Writes a file so that a reader sees the old one or the new one, whoever else writes it. */
import { randomUUID } from 'node:crypto';
import { constants, type Stats } from 'node:fs';
import { type FileHandle, open, readFile, realpath, rename, rm, stat, writeFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import path, { basename, dirname, join } from 'node:path';
import type { z } from 'zod';
import { MaskrouteError } from '../shared/wire/errors.ts';
import { corruptModel } from './model/model-source.ts';

export async function writeWhole(path: string, content: string | Uint8Array): Promise<void> {
  const part = partOf(path);
  try {
    await writeFile(part, content, { flush: true });
    await rename(part, path);
  } finally {
    await rm(part, { force: true });
  }
}

/** A hidden name beside `path` that nobody else writes to. */
export const partOf = (path: string): string =>
  join(dirname(path), `.${basename(path)}.${randomUUID().slice(0, 8)}`);

/* Where everything that outlives a process is kept: models, masks, the local database, development keys. */

/** An absolute folder: `MASKROUTE_HOME`, or `~/.cache/maskroute`. It need not exist yet. */
export function maskrouteHome(env: NodeJS.ProcessEnv = process.env): string {
  const named = env.MASKROUTE_HOME;
  return named === undefined || named === ''
    ? path.join(homedir(), '.cache', 'maskroute')
    : path.resolve(named);
}

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

/* Small files beside the weights: bounded, of their own folder, and JSON objects but for a chat template. */

export type JsonObject = Readonly<Record<string, unknown>>;

/** `undefined` when there is no such file. @throws MaskrouteError `invalid_argument`, as `readRegular`. */
export async function readTextFile(path: string, bytesMax: number): Promise<string | undefined> {
  try {
    return (await readRegular(path, bytesMax, dirname(path))).toString('utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

/** `undefined` when there is no such file. @throws MaskrouteError `corrupt_model`, `invalid_argument`. */
export async function readJsonFile(path: string, bytesMax: number): Promise<JsonObject | undefined> {
  const name = basename(path);
  const text = await readTextFile(path, bytesMax);
  if (text === undefined) return undefined;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw corruptModel(`${name} is not JSON`, error);
  }
  if (json === null || typeof json !== 'object' || Array.isArray(json)) {
    throw corruptModel(`${name} is not a JSON object`);
  }
  return json as JsonObject;
}

/** @throws MaskrouteError `corrupt_model` when it is missing, too. */
export async function requireJsonFile(path: string, bytesMax: number): Promise<JsonObject> {
  const json = await readJsonFile(path, bytesMax);
  if (json === undefined) throw corruptModel(`its folder has no ${basename(path)}`);
  return json;
}

/* Files that hold keys: readable by their owner alone, and never seen half-written. */

/** Replaces the file atomically; mode 0600 from its first byte on. */
export async function writePrivateJson(file: string, value: unknown): Promise<void> {
  const incoming = `${file}.incoming-${process.pid}`;
  await rm(incoming, { force: true });
  await writeFile(incoming, `${JSON.stringify(value, null, 2)}\n`, { mode: 0o600, flag: 'wx' });
  await rename(incoming, file);
}

/** `undefined` when the file is absent, or is not what `schema` asks for. */
export async function readPrivateJson<T>(file: string, schema: z.ZodType<T>): Promise<T | undefined> {
  try {
    return schema.safeParse(JSON.parse(await readFile(file, 'utf8'))).data;
  } catch (error) {
    if (error instanceof SyntaxError || (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}
