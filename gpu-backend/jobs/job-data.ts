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

export type JobDataLimits = {
  /** At a time. */
  readonly uploadsMax: number;
  readonly uploadBytesMax: number;
  readonly allBytesMax: number;
};
export const JOB_DATA_LIMITS: JobDataLimits = {
  uploadsMax: 8,
  uploadBytesMax: 256 * 1024 * 1024,
  allBytesMax: 2 * 1024 * 1024 * 1024,
};

export type JobData = {
  list(): Promise<UploadedData[]>;
  /** `created` is false when the same content was there under the same name. @throws MaskrouteError `queue_full`, `body_too_large`, `cancelled`. */
  add(name: string, body: ReadableStream<Uint8Array>): Promise<{ created: boolean; data: UploadedData }>;
  /** @throws MaskrouteError `not_found`. */
  remove(id: string): Promise<void>;
  /** The files of a request, in its order. @throws MaskrouteError `not_found`, `forbidden`, `invalid_data`. */
  files(request: Pick<JobRequest, 'data'>): Promise<string[]>;
};

export function createJobData(
  folder: string,
  openFolder: string | undefined,
  limits: JobDataLimits = JOB_DATA_LIMITS,
): JobData {
  const find = async (id: string): Promise<UploadedData | undefined> => {
    if (!DATA_ID_PATTERN.test(id)) return undefined;
    const [file] = await readdir(join(folder, id)).catch(() => []);
    if (file === undefined) return undefined;
    const { size, birthtime } = await stat(join(folder, id, file));
    return { id, name: file.replace(/\.jsonl$/, ''), bytes: size, created_at: birthtime.toISOString() };
  };
  const list = async (): Promise<UploadedData[]> => {
    const ids = await readdir(folder).catch(() => []);
    const found = await Promise.all(ids.map(find));
    return found.filter((data) => data !== undefined);
  };

  /** Symbolic links do not lead out of it. */
  const openFile = async (path: string): Promise<string> => {
    if (openFolder === undefined) {
      throw new MaskrouteError('forbidden', 'This backend opens no folder to jobs; upload the data.', {
        param: 'data',
      });
    }
    const root = await realpath(openFolder).catch(() => undefined);
    const file = await realpath(join(openFolder, path)).catch(() => undefined);
    if (root === undefined || file === undefined || !file.startsWith(root + sep)) {
      throw new MaskrouteError('not_found', `There is no ${path} in the folder that is open to jobs.`, {
        param: 'data',
      });
    }
    if ((await stat(file)).isFile()) return file;
    throw new MaskrouteError('invalid_data', `${path} is not a regular file.`, { param: 'data' });
  };

  let uploads = 0;
  /** On the disk and arriving, as long as anything arrives: uploads beside each other share the room. */
  let held: Promise<{ bytes: number }>;

  return {
    list,
    async add(name, body) {
      if (uploads >= limits.uploadsMax) {
        throw new MaskrouteError('queue_full', `${limits.uploadsMax} uploads are under way already.`);
      }
      const measured = async () => ({ bytes: (await list()).reduce((sum, { bytes }) => sum + bytes, 0) });
      if (uploads++ === 0) held = measured();
      const all = await held.catch((error: unknown) => {
        uploads--;
        throw error;
      });
      const part = join(folder, `.part-${randomUUID()}`);
      const hash = createHash('sha256').update(`${name}\n`);
      let bytes = 0;
      let isKept = false;
      try {
        await mkdir(folder, { recursive: true, mode: 0o700 });
        await pipeline(
          Readable.fromWeb(body as never),
          async function* (source: AsyncIterable<Uint8Array>) {
            for await (const chunk of source) {
              const room = Math.min(limits.uploadBytesMax, limits.allBytesMax - all.bytes + bytes);
              bytes += chunk.byteLength;
              all.bytes += chunk.byteLength;
              if (bytes > room)
                throw new MaskrouteError('body_too_large', `There is room for ${room} bytes.`);
              hash.update(chunk);
              yield chunk;
            }
          },
          createWriteStream(part, { mode: 0o600, flush: true }),
        );
        if (bytes === 0) throw new MaskrouteError('invalid_data', 'The data is empty.');
        const id = `data_${hash.digest('hex').slice(0, 24)}`;
        const known = await find(id);
        if (known !== undefined) return { created: false, data: known };
        const holder = join(folder, id);
        await mkdir(holder, { recursive: true });
        await rename(part, join(holder, `${name}.jsonl`));
        isKept = true;
        return { created: true, data: (await find(id))! };
      } catch (error) {
        if (error instanceof MaskrouteError) throw error;
        throw new MaskrouteError('cancelled', 'The upload ended early.', { cause: error });
      } finally {
        if (!isKept) all.bytes -= bytes;
        uploads--;
        await rm(part, { force: true });
      }
    },
    async remove(id) {
      if ((await find(id)) === undefined) throw new MaskrouteError('not_found', 'There is no such data.');
      await rm(join(folder, id), { recursive: true, force: true });
    },
    files: (request) =>
      Promise.all(
        request.data.map(async (source) => {
          if ('path' in source) return await openFile(source.path);
          const found = await find(source.upload);
          if (found !== undefined) return join(folder, found.id, `${found.name}.jsonl`);
          throw new MaskrouteError('not_found', `There is no uploaded data ${source.upload}.`, {
            param: 'data',
          });
        }),
      ),
  };
}
