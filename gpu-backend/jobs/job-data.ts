/**
 * Data for jobs: uploads, named by content, or files in a folder that the operator allows. Each upload and all of them
 * together are bounded in size; an upload is on disk whole or not at all.
 */
import { createHash, randomUUID } from 'node:crypto';
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdir, readdir, realpath, rename, rm, stat } from 'node:fs/promises';
import { join, sep } from 'node:path';
import { Readable } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import { pipeline } from 'node:stream/promises';
import { DATA_ID_PATTERN, type JobRequest, type UploadedData } from '../../shared/admin/job-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { isJsonObject, parseOrNull } from '../../shared/wire/parse-body.ts';

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
