/** Jobs on disk, a folder each: what was asked, how far it is, its log and what it made. A reader sees whole files. */
import { mkdir, readdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { JOB_ID_PATTERN, type Job, jobSchema } from '../../shared/jobs.ts';
import { writeWhole } from '../write-whole.ts';

export type JobStore = {
  /** In order of creation; a folder that holds no job is passed over. */
  load(): Promise<Job[]>;
  save(job: Job): Promise<void>;
  remove(id: string): Promise<void>;
  readonly folderOf: (id: string) => string;
  /** What `learn` writes to, and goes on from. */
  readonly outOf: (id: string) => string;
  readonly logOf: (id: string) => string;
  readonly secretOf: (id: string) => string;
};

export function createJobStore(folder: string): JobStore {
  const folderOf = (id: string) => join(folder, id);
  const fileOf = (id: string) => join(folderOf(id), 'job.json');
  return {
    async load() {
      const names = await readdir(folder).catch(() => []);
      const jobs = await Promise.all(
        names.filter((name) => JOB_ID_PATTERN.test(name)).map((id) => readJob(fileOf(id))),
      );
      return jobs
        .filter((job) => job !== undefined)
        .sort((a, b) => (a.created_at < b.created_at ? -1 : a.created_at > b.created_at ? 1 : 0));
    },
    async save(job) {
      await mkdir(folderOf(job.id), { recursive: true, mode: 0o700 });
      await writeWhole(fileOf(job.id), `${JSON.stringify(job, null, 2)}\n`);
    },
    remove: (id) => rm(folderOf(id), { recursive: true, force: true }),
    folderOf,
    outOf: (id) => join(folderOf(id), 'out'),
    logOf: (id) => join(folderOf(id), 'log.txt'),
    secretOf: (id) => join(folderOf(id), 'secret'),
  };
}

async function readJob(path: string): Promise<Job | undefined> {
  try {
    return jobSchema.parse(JSON.parse(await readFile(path, 'utf8')));
  } catch {
    return undefined;
  }
}
