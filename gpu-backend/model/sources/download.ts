/**
 * Downloads a file over HTTP into `<target>.part`, resumes an earlier download, checks size and hash, then renames it. So a
 * file with its final name is complete.
 */
import { open, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { makeFolder, sizeOf, withLock } from '../../files.ts';
import type { ImportHooks } from '../model-source.ts';
import { sha256OfFiles } from '../store.ts';

/** Runs `work` under a lock of `folder`, so that only one process downloads into it. */
export async function aloneIn<T>(
  folder: string,
  { log, signal }: Pick<ImportHooks, 'log' | 'signal'>,
  work: () => Promise<T>,
): Promise<T> {
  await makeFolder(folder);
  const onWait = () => log('Another process downloads the same files; waiting for it to end.');
  return withLock(join(folder, '.lock'), { onWait, signal }, work);
}

type Download = {
  readonly url: string;
  readonly headers?: Readonly<Record<string, string>>;
  readonly bytes: number;
  /** Undefined when the server publishes none. */
  readonly sha256: string | undefined;
  readonly target: string;
  readonly onBytes: (done: number) => void;
  /** What an answer with this status suggests, behind the reason. */
  readonly hints?: Readonly<Record<number, string>>;
  readonly signal?: AbortSignal | undefined;
};

/** Attempts in a row that bring nothing new. */
const ATTEMPTS = 5;
const BACKOFF_ms = 500;
/** A connection without data for so long counts as failed, and is retried. */
const IDLE_TIMEOUT_ms = 30_000;

/**
 * A connection may break as often as it likes, as long as each attempt or the next few bring more of the file.
 * @throws MaskrouteError `download_failed`; the part is kept for the next try unless its hash is wrong.
 */
export async function download(file: Download): Promise<void> {
  const part = `${file.target}.part`;
  let most_bytes = (await sizeOf(part)) ?? 0;
  for (let attempt = 1; ; attempt++) {
    try {
      await continuePart(file, part);
      break;
    } catch (error) {
      file.signal?.throwIfAborted();
      const bytes = (await sizeOf(part)) ?? 0;
      if (bytes > most_bytes) [most_bytes, attempt] = [bytes, 0];
      if (attempt === ATTEMPTS || isFinal(error)) throw failed(file, error);
      const wait_ms = BACKOFF_ms * 2 ** Math.max(0, attempt - 1);
      await sleep(wait_ms, undefined, file.signal ? { signal: file.signal } : {});
    }
  }
  const found = file.sha256 === undefined ? undefined : await sha256OfFiles([part], file.signal);
  if (found !== file.sha256) {
    await rm(part, { force: true });
    throw new MaskrouteError(
      'download_failed',
      `${file.url} has the wrong content (SHA-256 ${found}, expected ${file.sha256})`,
    );
  }
  await rename(part, file.target);
}

/** An error that a retry does not change. */
class FinalStatus extends Error {}

/** An error of a file has the system call that failed; errors of `fetch` have theirs in `cause`. */
const isFinal = (error: unknown): boolean => error instanceof FinalStatus || 'syscall' in (error as Error);

async function continuePart(file: Download, part: string): Promise<void> {
  let start = (await sizeOf(part)) ?? 0;
  if (start > file.bytes) {
    await rm(part, { force: true });
    start = 0;
  }
  if (start === file.bytes && start > 0) return;
  const idle = new AbortController();
  const giveUp = () => idle.abort(new Error(`no data for ${IDLE_TIMEOUT_ms / 1000} s`));
  const signal = file.signal ? AbortSignal.any([idle.signal, file.signal]) : idle.signal;
  let timer = setTimeout(giveUp, IDLE_TIMEOUT_ms);
  try {
    const range: Record<string, string> = start > 0 ? { range: `bytes=${start}-` } : {};
    const response = await fetch(file.url, { headers: { ...file.headers, ...range }, signal });
    // A server that ignores the range sends the whole file, so the part starts again.
    const from = response.status === 206 ? start : 0;
    if (!response.ok || response.body === null) {
      await response.body?.cancel();
      const message = `it answered ${response.status}${file.hints?.[response.status] ?? ''}`;
      throw response.status < 500 && response.status !== 429 ? new FinalStatus(message) : new Error(message);
    }
    const restart = () => {
      clearTimeout(timer);
      timer = setTimeout(giveUp, IDLE_TIMEOUT_ms);
    };
    const done = await appendTo(part, from, response.body, file, restart);
    if (done < file.bytes) throw new Error(`it ended after ${done} of ${file.bytes} bytes`);
  } finally {
    clearTimeout(timer);
  }
}

/** Writes each piece before it reads the next, so that a failure keeps the data before it. */
async function appendTo(
  part: string,
  from: number,
  body: AsyncIterable<Uint8Array>,
  file: Download,
  onData: () => void,
): Promise<number> {
  const handle = await open(part, from > 0 ? 'r+' : 'w');
  try {
    let done = from;
    for await (const piece of body) {
      onData();
      if (done + piece.length > file.bytes) {
        throw new FinalStatus(`it sends more than the expected ${file.bytes} bytes`);
      }
      for (let written = 0; written < piece.length; ) {
        const { bytesWritten } = await handle.write(piece, written, piece.length - written, done + written);
        written += bytesWritten;
      }
      done += piece.length;
      file.onBytes(done);
    }
    await handle.sync();
    return done;
  } finally {
    await handle.close();
  }
}

function failed(file: Download, error: unknown): MaskrouteError {
  const reason = (error as NodeJS.ErrnoException).code === 'ENOSPC' ? 'the disk is full' : messageOf(error);
  return new MaskrouteError('download_failed', `${file.url} could not be fetched: ${reason}`, {
    cause: error,
  });
}

/** An error's message and its cause's: `fetch` says only "fetch failed", and has the reason in `cause`. */
export function messageOf(error: unknown): string {
  const { message, cause } = error as Error;
  const inner = cause instanceof Error && cause.message !== '' ? ` (${cause.message})` : '';
  return `${message}${inner}`;
}
