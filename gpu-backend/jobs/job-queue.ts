/**
 * The jobs of a backend: one runs, a few wait. What is asked is on disk before it is answered; a job that a restart
 * cut off is begun again and goes on where `learn` left its folder.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type CreateJob, isFinished, JOBS_WAITING_MAX, type Job } from '../../shared/admin/job-wire.ts';
import { maskSetSchema, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { createJobData, type JobData } from './job-data.ts';
import { createJobStore, seal, unseal } from './job-store.ts';
import { type CommandEnd, learnArguments, publishArguments, runCommand } from './run-command.ts';

export type JobsOptions = {
  readonly home: string;
  /** The served model, for requests that name none. */
  readonly model: string;
  readonly backendKey: string;
  /** See {@link runCommand}. */
  readonly entry: string;
  /** Whose files requests may name; none without. */
  readonly dataFolder: string | undefined;
  /** For the log: a job began, went on, failed. */
  readonly note: (message: string, detail: Record<string, unknown>) => void;
};

export type Jobs = {
  readonly data: JobData;
  list(): Job[];
  /** @throws MaskrouteError `not_found`. */
  get(id: string): Job;
  /** @throws MaskrouteError `queue_full`, and what {@link JobData.files} throws. */
  create(request: CreateJob): Promise<Job>;
  /** Ends it if it has not ended. @throws MaskrouteError `not_found`. */
  cancel(id: string): Promise<Job>;
  /** The job now and after each change, until it has finished. */
  follow(id: string, signal: AbortSignal): AsyncGenerator<Job, void>;
  /** A file that a job made. @throws MaskrouteError `not_found`, `conflict` when it is not there yet. */
  read(id: string, file: 'mask-set.json' | 'report.json'): Promise<string>;
  /** @throws MaskrouteError `not_found`, `conflict` while a job needs it. */
  removeData(id: string): Promise<void>;
  /** The running job stops and stays to be gone on with. */
  close(): Promise<void>;
};

/** Finished jobs that are kept. */
const FINISHED_MAX = 50;
/** Progress is told to followers at once, and written at most this often. */
const SAVE_EVERY_ms = 2000;

export async function openJobs(options: JobsOptions): Promise<Jobs> {
  const root = join(options.home, 'jobs');
  const store = createJobStore(root);
  const data = createJobData(join(root, 'data'), options.dataFolder);
  const jobs = new Map((await store.load()).map((job) => [job.id, job]));
  const followers = new Map<string, Set<() => void>>();
  const closing = new AbortController();
  let current:
    | { readonly id: string; readonly stop: AbortController; readonly ended: Promise<void> }
    | undefined;
  let creating = Promise.resolve();

  const tell = (job: Job): void => {
    jobs.set(job.id, job);
    for (const wake of followers.get(job.id) ?? []) wake();
  };
  const change = async (id: string, fields: Partial<Job>): Promise<Job> => {
    const job = { ...known(id), ...fields };
    await store.save(job);
    tell(job);
    return job;
  };
  const known = (id: string): Job => {
    const job = jobs.get(id);
    if (job === undefined) throw new MaskrouteError('not_found', `There is no job ${id}.`);
    return job;
  };
  const finish = async (id: string, fields: Pick<Job, 'status'> & Partial<Job>): Promise<Job> => {
    await rm(store.secretOf(id), { force: true });
    return await change(id, { finished_at: new Date().toISOString(), progress: null, ...fields });
  };

  const startNext = (): void => {
    if (current !== undefined || closing.signal.aborted) return;
    const all = [...jobs.values()];
    // One that was running when this process began was cut off.
    const next =
      all.find(({ status }) => status === 'running') ?? all.find(({ status }) => status === 'waiting');
    if (next === undefined) return;
    const stop = new AbortController();
    const ended = work(next.id, AbortSignal.any([stop.signal, closing.signal]))
      .catch(async (error: unknown) => {
        options.note('a job failed', { job: next.id, reason: String(error) });
        const reason =
          error instanceof MaskrouteError ? error.message : 'The server met an unexpected condition.';
        await finish(next.id, { status: 'failed', error: reason }).catch(() => {
          // The disk does not take it: in memory it has failed, and the next start tries it again.
          tell({ ...known(next.id), status: 'failed', error: reason });
        });
      })
      .finally(() => {
        current = undefined;
        startNext();
      });
    current = { id: next.id, stop, ended };
  };

  async function work(id: string, signal: AbortSignal): Promise<void> {
    const { request, starts } = await change(id, {
      status: 'running',
      started_at: known(id).started_at ?? new Date().toISOString(),
      starts: known(id).starts + 1,
    });
    const out = store.outOf(id);
    await mkdir(out, { recursive: true, mode: 0o700 });
    const files = await data.files(request);
    options.note(starts === 1 ? 'a job begins' : 'a job goes on', { job: id });
    const learned = await run(id, learnArguments(request, files, out), {}, signal);
    if (!(await goesOn(id, learned, signal))) return;
    const version = maskSetVersion(
      maskSetSchema.parse(JSON.parse(await readFile(join(out, 'mask-set.json'), 'utf8'))),
    );
    if (request.publish === undefined) {
      await finish(id, { status: 'succeeded', result: { version, published: null } });
      return;
    }
    const adminKey = unseal(await readFile(store.secretOf(id)), options.backendKey, id);
    const args = publishArguments(request.publish, join(out, 'mask-set.json'));
    const published = await run(id, args, { MASKROUTE_ADMIN_KEY: adminKey }, signal);
    if (!(await goesOn(id, published, signal, { version, published: null }))) return;
    const said = published.kind === 'done' ? published.lastLine : '';
    await finish(id, { status: 'succeeded', result: { version, published: said } });
  }

  const run = (
    id: string,
    args: string[],
    env: Record<string, string>,
    signal: AbortSignal,
  ): Promise<CommandEnd> => {
    let savedAt_ms = 0;
    return runCommand({
      entry: options.entry,
      args,
      env: { ...env, MASKROUTE_HOME: options.home, MASKROUTE_JOB_FOLDER: store.folderOf(id) },
      logFile: store.logOf(id),
      signal,
      onProgress(progress) {
        const job = { ...known(id), progress };
        tell(job);
        if (Date.now() - savedAt_ms < SAVE_EVERY_ms) return;
        savedAt_ms = Date.now();
        void store.save(job).catch((error: Error) => {
          options.note('progress was not written', { job: id, reason: error.message });
        });
      },
    });
  };

  /** Whether the next step may begin; else how the job ended is written. */
  async function goesOn(
    id: string,
    end: CommandEnd,
    signal: AbortSignal,
    result: Job['result'] = null,
  ): Promise<boolean> {
    // Stopped with the server: it stays `running` on disk, and the next start goes on with it.
    if (closing.signal.aborted) return false;
    if (signal.aborted || end.kind === 'stopped') {
      await finish(id, { status: 'cancelled', result });
      return false;
    }
    if (end.kind === 'done') return true;
    await finish(id, { status: 'failed', error: end.reason, result });
    return false;
  }

  async function create(request: CreateJob): Promise<Job> {
    const waiting = [...jobs.values()].filter(({ status }) => status === 'waiting').length;
    if (waiting >= JOBS_WAITING_MAX) {
      throw new MaskrouteError('queue_full', `${JOBS_WAITING_MAX} jobs are waiting already.`, {
        retryAfter_s: 60,
      });
    }
    await data.files(request);
    const { publish, ...rest } = request;
    const id = `job_${randomBytes(12).toString('hex')}`;
    const job: Job = {
      id,
      object: 'maskroute.job',
      status: 'waiting',
      request: {
        ...rest,
        model: rest.model ?? options.model,
        ...(publish && { publish: withoutKey(publish) }),
      },
      created_at: new Date().toISOString(),
      ...{ started_at: null, finished_at: null, starts: 0, progress: null, error: null, result: null },
    };
    await mkdir(store.folderOf(id), { recursive: true, mode: 0o700 });
    if (publish !== undefined) {
      await writeFile(store.secretOf(id), seal(publish.admin_key, options.backendKey, id), { mode: 0o600 });
    }
    await store.save(job);
    tell(job);
    await forgetOldest();
    startNext();
    return job;
  }

  async function forgetOldest(): Promise<void> {
    const finished = [...jobs.values()].filter(isFinished);
    for (const { id } of finished.slice(0, Math.max(0, finished.length - FINISHED_MAX))) {
      jobs.delete(id);
      await store.remove(id);
    }
  }

  startNext();
  return {
    data,
    list: () => [...jobs.values()].reverse(),
    get: known,
    create(request) {
      // One after the other, so that the line's bound holds for requests that come together.
      const created = creating.then(() => create(request));
      creating = created.then(
        () => {},
        () => {},
      );
      return created;
    },
    async cancel(id) {
      const job = known(id);
      if (isFinished(job)) return job;
      if (current?.id !== id) return await finish(id, { status: 'cancelled' });
      const { stop, ended } = current;
      stop.abort();
      await ended;
      return known(id);
    },
    async *follow(id, signal) {
      let changed = Promise.withResolvers<void>();
      const wake = () => changed.resolve();
      const watching = followers.get(id) ?? new Set();
      followers.set(id, watching.add(wake));
      signal.addEventListener('abort', wake, { once: true });
      try {
        for (let job = known(id); !signal.aborted; job = known(id)) {
          changed = Promise.withResolvers<void>();
          yield job;
          if (isFinished(job)) return;
          // Changes while the last one was being sent come as one.
          if (known(id) === job) await changed.promise;
        }
      } finally {
        signal.removeEventListener('abort', wake);
        watching.delete(wake);
        if (watching.size === 0) followers.delete(id);
      }
    },
    async read(id, file) {
      const { status } = known(id);
      try {
        return await readFile(join(store.outOf(id), file), 'utf8');
      } catch (cause) {
        throw new MaskrouteError('conflict', `The job is ${status}; it has made no ${file}.`, { cause });
      }
    },
    async removeData(id) {
      const needs = (job: Job) =>
        !isFinished(job) && job.request.data.some((source) => 'upload' in source && source.upload === id);
      const job = [...jobs.values()].find(needs);
      if (job !== undefined) throw new MaskrouteError('conflict', `The job ${job.id} needs this data.`);
      await data.remove(id);
    },
    async close() {
      closing.abort();
      await current?.ended;
    },
  };
}

const withoutKey = ({ admin_key: _key, ...publish }: NonNullable<CreateJob['publish']>) => publish;
