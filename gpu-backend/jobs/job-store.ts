/**
 * What jobs keep on disk. Each job has a folder with its request, sealed secret, progress, log and results; uploaded data
 * is stored beside these folders. Files are replaced atomically.
 */
import { createCipheriv, createDecipheriv, createHash, hkdfSync, randomBytes, randomUUID } from 'node:crypto';
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdir, readdir, readFile, realpath, rename, rm, stat, writeFile } from 'node:fs/promises';
import { basename, join, sep } from 'node:path';
import { Readable } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import { pipeline } from 'node:stream/promises';
import type { z } from 'zod';
import {
  DATA_ID_PATTERN,
  isFinished,
  JOB_ID_PATTERN,
  type Job,
  type JobRequest,
  jobSchema,
  type UploadedData,
} from '../../shared/admin/job-wire.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { isJsonObject, parseOrNull } from '../../shared/wire/parse-body.ts';
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
      return jobs.sort((a, b) => a.number - b.number || Date.parse(a.created_at) - Date.parse(b.created_at));
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

/*
 * Data for jobs: uploads, named by content, or files in a folder that the operator allows. Each upload and all of them
 * together are bounded in size; an upload is on disk whole or not at all.
 */

type JobDataLimits = {
  /** Concurrent uploads. */
  readonly uploadsMax: number;
  readonly uploadBytesMax: number;
  readonly allBytesMax: number;
  /** An upload that sends nothing for this long is aborted. */
  readonly idle_ms: number;
};
const JOB_DATA_LIMITS: JobDataLimits = {
  uploadsMax: 8,
  uploadBytesMax: 256 * 1024 * 1024,
  allBytesMax: 2 * 1024 * 1024 * 1024,
  idle_ms: 30_000,
};

/** Prefix of the file name of an unfinished upload. */
const PART = '.part-';

type Added = { readonly created: boolean; readonly data: UploadedData };

export class JobData {
  readonly #folder: string;
  readonly #openFolder: string | undefined;
  readonly #limits: JobDataLimits;
  #uploads = 0;
  /** Bytes on disk plus bytes of running uploads: concurrent uploads share the limit. */
  #held: Promise<{ bytes: number }> = Promise.resolve({ bytes: 0 });

  /** `openFolder`: the folder whose files requests may name. */
  constructor(folder: string, openFolder: string | undefined, limits: JobDataLimits = JOB_DATA_LIMITS) {
    this.#folder = folder;
    this.#openFolder = openFolder;
    this.#limits = limits;
  }

  async list(): Promise<UploadedData[]> {
    const ids = await readdir(this.#folder).catch(() => []);
    const found = await Promise.all(ids.map((id) => this.#find(id)));
    return found.filter((data) => data !== undefined);
  }

  /**
   * `created` is false when the same content was already stored under the same name. `stopping` ends the upload.
   * @throws MaskrouteError `queue_full`, `body_too_large`, `invalid_data`, `request_timeout`, `cancelled`; the reason of
   * `stopping`; the disk's own error.
   */
  async add(name: string, body: ReadableStream<Uint8Array>, stopping?: AbortSignal): Promise<Added> {
    if (this.#uploads >= this.#limits.uploadsMax) {
      throw new MaskrouteError('queue_full', `${this.#limits.uploadsMax} uploads are under way already.`);
    }
    if (this.#uploads++ === 0) this.#held = this.list().then((all) => ({ bytes: sumOf(all) }));
    const part = join(this.#folder, PART + randomUUID());
    const arrived = { bytes: 0 };
    let all = { bytes: 0 };
    let isKept = false;
    try {
      all = await this.#held;
      await mkdir(this.#folder, { recursive: true, mode: 0o700 });
      const source = fromClient(body, this.#limits.idle_ms, stopping);
      const id = await this.#receive(name, source, part, arrived, all);
      const added = await this.#keep(name, part, id);
      isKept = added.created;
      return added;
    } finally {
      if (!isKept) all.bytes -= arrived.bytes;
      this.#uploads--;
      await rm(part, { force: true });
    }
  }

  /** Removes unfinished uploads that a kill left behind. Call before the first upload. */
  async removeParts(): Promise<void> {
    const names = await readdir(this.#folder).catch(() => []);
    const parts = names.filter((name) => name.startsWith(PART));
    await Promise.all(parts.map((name) => rm(join(this.#folder, name), { force: true })));
  }

  /** @throws MaskrouteError `not_found`. */
  async remove(id: string): Promise<void> {
    if ((await this.#find(id)) === undefined) throw new MaskrouteError('not_found', 'There is no such data.');
    await rm(join(this.#folder, id), { recursive: true, force: true });
  }

  /** The files of a request, in its order. @throws MaskrouteError `not_found`, `forbidden`, `invalid_data`. */
  files({ data }: Pick<JobRequest, 'data'>): Promise<string[]> {
    return Promise.all(
      data.map((source) => ('path' in source ? this.#openFile(source.path) : this.#uploaded(source.upload))),
    );
  }

  /** Writes the upload to `part` and counts its bytes. Returns the data's id. */
  async #receive(
    name: string,
    source: AsyncIterable<Uint8Array>,
    part: string,
    arrived: { bytes: number },
    all: { bytes: number },
  ): Promise<string> {
    const { uploadBytesMax, allBytesMax } = this.#limits;
    const hash = createHash('sha256').update(`${name}\n`);
    async function* measured(chunks: AsyncIterable<Uint8Array>) {
      for await (const chunk of chunks) {
        const room = Math.min(uploadBytesMax, allBytesMax - all.bytes + arrived.bytes);
        arrived.bytes += chunk.byteLength;
        all.bytes += chunk.byteLength;
        if (arrived.bytes > room)
          throw new MaskrouteError('body_too_large', `There is room for ${room} bytes.`);
        hash.update(chunk);
        yield chunk;
      }
    }
    const file = createWriteStream(part, { mode: 0o600, flush: true });
    await pipeline(source, measured, file);
    await expectRows(part);
    return `data_${hash.digest('hex').slice(0, 24)}`;
  }

  async #keep(name: string, part: string, id: string): Promise<Added> {
    const known = await this.#find(id);
    if (known !== undefined) return { created: false, data: known };
    const holder = join(this.#folder, id);
    await mkdir(holder, { recursive: true });
    await rename(part, join(holder, `${name}.jsonl`));
    return { created: true, data: (await this.#find(id))! };
  }

  async #find(id: string): Promise<UploadedData | undefined> {
    if (!DATA_ID_PATTERN.test(id)) return undefined;
    const [file] = await readdir(join(this.#folder, id)).catch(() => []);
    if (file === undefined) return undefined;
    // It may be removed at this moment.
    const found = await stat(join(this.#folder, id, file)).catch(() => undefined);
    if (found === undefined) return undefined;
    const { size, birthtime } = found;
    return { id, name: file.replace(/\.jsonl$/, ''), bytes: size, created_at: birthtime.toISOString() };
  }

  async #uploaded(id: string): Promise<string> {
    const found = await this.#find(id);
    if (found !== undefined) return join(this.#folder, found.id, `${found.name}.jsonl`);
    throw new MaskrouteError('not_found', `There is no uploaded data ${id}.`, { param: 'data' });
  }

  /** Symbolic links may not lead out of the allowed folder. */
  async #openFile(path: string): Promise<string> {
    if (this.#openFolder === undefined) {
      const message = 'This backend opens no folder to jobs; upload the data.';
      throw new MaskrouteError('forbidden', message, { param: 'data' });
    }
    const root = await realpath(this.#openFolder).catch(() => undefined);
    const file = await realpath(join(this.#openFolder, path)).catch(() => undefined);
    if (root === undefined || file === undefined || !file.startsWith(root + sep)) {
      const message = `There is no ${path} in the folder that is open to jobs.`;
      throw new MaskrouteError('not_found', message, { param: 'data' });
    }
    if ((await stat(file)).isFile()) return file;
    throw new MaskrouteError('invalid_data', `${path} is not a regular file.`, { param: 'data' });
  }
}

/** Whether a job on this data needs this upload. */
export const needsUpload = (data: JobRequest['data'], upload: string): boolean =>
  data.some((source) => 'upload' in source && source.upload === upload);

/** Longer than any row of ordinary data; a longer first row is left to the job that reads it. */
const FIRST_ROW_BYTES_MAX = 1024 * 1024;

/** @throws MaskrouteError `invalid_data` when the data is no JSONL: its first line that is not empty is no JSON object. */
async function expectRows(path: string): Promise<void> {
  const { size } = await stat(path);
  const bytes = await buffer(createReadStream(path, { end: FIRST_ROW_BYTES_MAX - 1 }));
  const lines = new TextDecoder().decode(bytes).split('\n');
  const at = lines.findIndex((line) => line.trim() !== '');
  const isCut = size > FIRST_ROW_BYTES_MAX && (at < 0 || at === lines.length - 1);
  if (isCut) return;
  if (at < 0) throw new MaskrouteError('invalid_data', 'The data is empty.');
  if (isJsonObject(parseOrNull(lines[at]!))) return;
  throw new MaskrouteError('invalid_data', `The data is not JSONL: line ${at + 1} is no JSON object.`);
}

/**
 * @throws MaskrouteError `request_timeout` when nothing comes for `idle_ms`, `cancelled` when the client is gone; the
 * reason of `stopping`.
 */
async function* fromClient(
  body: ReadableStream<Uint8Array>,
  idle_ms: number,
  stopping: AbortSignal | undefined,
): AsyncGenerator<Uint8Array, void> {
  const stream = Readable.fromWeb(body as never, stopping && { signal: stopping });
  const giveUp = () => {
    const message = `Nothing of the upload came for ${idle_ms / 1000} s.`;
    stream.destroy(new MaskrouteError('request_timeout', message));
  };
  let idle = setTimeout(giveUp, idle_ms);
  try {
    for await (const chunk of stream) {
      clearTimeout(idle);
      yield chunk;
      idle = setTimeout(giveUp, idle_ms);
    }
  } catch (cause) {
    if (cause instanceof MaskrouteError) throw cause;
    stopping?.throwIfAborted();
    throw new MaskrouteError('cancelled', 'The upload ended early.', { cause });
  } finally {
    clearTimeout(idle);
  }
}

const sumOf = (all: readonly UploadedData[]): number => all.reduce((sum, { bytes }) => sum + bytes, 0);
