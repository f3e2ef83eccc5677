/** Writes a file so that a reader sees the old one or the new one, whoever else writes it. */
import { randomUUID } from 'node:crypto';
import { rename, rm, writeFile } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';

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
