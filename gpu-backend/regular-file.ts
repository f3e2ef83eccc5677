/**
 * Files that people name, or that lie in a folder that they name. Only regular files are opened: the reader of a named
 * pipe waits for a writer who may never come, and opening a device can already do something.
 */
import { constants, type Stats } from 'node:fs';
import { type FileHandle, open, realpath, stat } from 'node:fs/promises';
import path from 'node:path';
import { MaskrouteError } from '../shared/errors.ts';

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
