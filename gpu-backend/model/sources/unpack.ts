/** One entry of a zip archive as a file: streamed, of the size and hash that were expected, whole or not at all. */
import { createHash } from 'node:crypto';
import { createWriteStream } from 'node:fs';
import { rename, rm } from 'node:fs/promises';
import { Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import type { Entry, ZipFile } from 'yauzl';
import { open } from 'yauzl';
import { MaskrouteError } from '../../../shared/errors.ts';
import type { ImportHooks } from '../progress.ts';

export type PinnedFile = { readonly name: string; readonly bytes: number; readonly sha256: string };

/** No wheel that we read has more; an archive with millions of entries is not searched to its end. */
const ENTRY_COUNT_MAX = 10_000;

/** @throws MaskrouteError `download_failed` when the archive is damaged or holds something else. */
export async function unpackFile(
  archive: string,
  file: PinnedFile,
  target: string,
  hooks: ImportHooks,
): Promise<void> {
  const part = `${target}.part`;
  try {
    const zip = await openZip(archive);
    try {
      const entry = await findEntry(zip, file);
      await writeEntry(zip, entry, file, part, hooks);
    } finally {
      zip.close();
    }
    await rename(part, target);
  } catch (error) {
    await rm(part, { force: true });
    if (hooks.signal?.aborted || error instanceof MaskrouteError) throw error;
    const code = (error as NodeJS.ErrnoException).code;
    if (code === 'ENOSPC') throw damaged('the disk is full', error);
    throw damaged(`the archive cannot be unpacked (${(error as Error).message})`, error);
  }
}

const openZip = (archive: string): Promise<ZipFile> =>
  new Promise((resolve, reject) => {
    open(archive, { lazyEntries: true, autoClose: false, validateEntrySizes: true }, (error, zip) =>
      error ? reject(error) : resolve(zip),
    );
  });

function findEntry(zip: ZipFile, file: PinnedFile): Promise<Entry> {
  return new Promise((resolve, reject) => {
    if (zip.entryCount > ENTRY_COUNT_MAX) reject(damaged(`it has ${zip.entryCount} entries`));
    zip.on('error', reject);
    zip.on('end', () => reject(damaged(`it holds no ${file.name}`)));
    zip.on('entry', (entry: Entry) => {
      if (entry.fileName !== file.name && !entry.fileName.endsWith(`/${file.name}`)) return zip.readEntry();
      // The size is checked before a byte is written: an archive may claim to unpack to a disk full.
      if (entry.uncompressedSize === file.bytes) resolve(entry);
      else reject(damaged(`${file.name} has ${entry.uncompressedSize} bytes instead of ${file.bytes}`));
    });
    zip.readEntry();
  });
}

async function writeEntry(
  zip: ZipFile,
  entry: Entry,
  file: PinnedFile,
  part: string,
  { onProgress, signal }: ImportHooks,
): Promise<void> {
  const stream = await new Promise<NodeJS.ReadableStream>((resolve, reject) => {
    zip.openReadStream(entry, (error, readable) => (error ? reject(error) : resolve(readable)));
  });
  const hash = createHash('sha256');
  let done = 0;
  const count = new Transform({
    transform(chunk: Buffer, _encoding, next) {
      hash.update(chunk);
      done += chunk.length;
      onProgress({ phase: 'unpack', done, total: file.bytes, unit: 'bytes' });
      next(null, chunk);
    },
  });
  const out = createWriteStream(part, { flush: true });
  await pipeline(stream, count, out, signal ? { signal } : {});
  const found = hash.digest('hex');
  if (found !== file.sha256) throw damaged(`${file.name} has the SHA-256 ${found} instead of ${file.sha256}`);
}

const damaged = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('download_failed', `the downloaded archive is not the expected one: ${reason}`, {
    cause,
  });
