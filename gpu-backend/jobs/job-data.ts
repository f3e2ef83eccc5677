/**
 * Data for jobs: uploaded once and named by content, or read below a folder that the operator opened. Bounded in
 * size each and together; an upload is on disk whole or not at all.
 */
import { createHash, randomUUID } from 'node:crypto';
import { createWriteStream } from 'node:fs';
import { mkdir, readdir, realpath, rename, rm, stat } from 'node:fs/promises';
import { join, sep } from 'node:path';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { DATA_ID_PATTERN, type JobRequest, type UploadedData } from '../../shared/admin/job-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';

type JobDataLimits = {
  /** At a time. */
  readonly uploadsMax: number;
  readonly uploadBytesMax: number;
  readonly allBytesMax: number;
};
const JOB_DATA_LIMITS: JobDataLimits = {
  uploadsMax: 8,
  uploadBytesMax: 256 * 1024 * 1024,
  allBytesMax: 2 * 1024 * 1024 * 1024,
};

type Added = { readonly created: boolean; readonly data: UploadedData };

export class JobData {
  readonly #folder: string;
  readonly #openFolder: string | undefined;
  readonly #limits: JobDataLimits;
  #uploads = 0;
  /** On the disk and arriving, as long as anything arrives: uploads beside each other share the room. */
  #held: Promise<{ bytes: number }> = Promise.resolve({ bytes: 0 });

  /** `openFolder`: whose files requests may name. */
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
   * `created` is false when the same content was there under the same name.
   * @throws MaskrouteError `queue_full`, `body_too_large`, `invalid_data`, `cancelled`.
   */
  async add(name: string, body: ReadableStream<Uint8Array>): Promise<Added> {
    if (this.#uploads >= this.#limits.uploadsMax) {
      throw new MaskrouteError('queue_full', `${this.#limits.uploadsMax} uploads are under way already.`);
    }
    if (this.#uploads++ === 0) this.#held = this.list().then((all) => ({ bytes: sumOf(all) }));
    const part = join(this.#folder, `.part-${randomUUID()}`);
    const arrived = { bytes: 0 };
    let all = { bytes: 0 };
    let isKept = false;
    try {
      all = await this.#held;
      await mkdir(this.#folder, { recursive: true, mode: 0o700 });
      const id = await this.#receive(name, body, part, arrived, all);
      const added = await this.#keep(name, part, id);
      isKept = added.created;
      return added;
    } catch (error) {
      if (error instanceof MaskrouteError) throw error;
      throw new MaskrouteError('cancelled', 'The upload ended early.', { cause: error });
    } finally {
      if (!isKept) all.bytes -= arrived.bytes;
      this.#uploads--;
      await rm(part, { force: true });
    }
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

  /** Writes what arrives to `part`, and counts it. Gives the data's id. */
  async #receive(
    name: string,
    body: ReadableStream<Uint8Array>,
    part: string,
    arrived: { bytes: number },
    all: { bytes: number },
  ): Promise<string> {
    const { uploadBytesMax, allBytesMax } = this.#limits;
    const hash = createHash('sha256').update(`${name}\n`);
    async function* measured(source: AsyncIterable<Uint8Array>) {
      for await (const chunk of source) {
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
    await pipeline(Readable.fromWeb(body as never), measured, file);
    if (arrived.bytes === 0) throw new MaskrouteError('invalid_data', 'The data is empty.');
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
    const { size, birthtime } = await stat(join(this.#folder, id, file));
    return { id, name: file.replace(/\.jsonl$/, ''), bytes: size, created_at: birthtime.toISOString() };
  }

  async #uploaded(id: string): Promise<string> {
    const found = await this.#find(id);
    if (found !== undefined) return join(this.#folder, found.id, `${found.name}.jsonl`);
    throw new MaskrouteError('not_found', `There is no uploaded data ${id}.`, { param: 'data' });
  }

  /** Symbolic links do not lead out of the folder that is open. */
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

const sumOf = (all: readonly UploadedData[]): number => all.reduce((sum, { bytes }) => sum + bytes, 0);
