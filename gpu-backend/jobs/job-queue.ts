/**
 * The jobs of a backend: one runs (`run-job.ts`), a few wait. A job is on disk before its request is answered. A job that
 * a restart interrupted is started again and resumes from what `learn` left in its folder.
 */
import { randomBytes } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import {
  type CreateJob,
  isFinished,
  JOBS_WAITING_MAX,
  type Job,
  type JobProgress,
  type JobRequest,
} from '../../shared/admin/job-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { makeFolder, tryLock } from '../files.ts';
import { oneAtATime } from '../one-at-a-time.ts';
import { JobData, needsUpload } from './job-data.ts';
import { createJobStore, type JobStore, makeWithSecret } from './job-store.ts';
import { type JobEnd, type RunOptions, requireEdgeAllows, runJob } from './run-job.ts';

export type JobsOptions = RunOptions & {
  /** The served model: the default for requests that name no model. */
  readonly model: string;
  /** The folder whose files requests may name; undefined: requests may name no files. */
  readonly dataFolder: string | undefined;
  /** How long an answer to a cancel waits for the job's end. */
  readonly cancelWait_ms?: number | undefined;
};

/** Shorter than the edge waits for an answer: a step of learning may take longer on a busy machine. */
const CANCEL_WAIT_ms = 8_000;
/** Jobs that succeeded, and as many that did not, that are kept. */
const FINISHED_MAX = 50;
/** The error of a job that is cancelled while it publishes. */
const PUBLISHED_PERHAPS = 'It was publishing, and may have done so: look at the edge.';
/** Followers get progress at once; the disk gets it at most this often. */
const SAVE_EVERY_ms = 2000;

/**
 * The jobs of a home, which one backend has at a time: a second would run a job that runs, and clear away what is just
 * being written. Undefined where another backend has them; they are free again once that one is closed, or gone.
 * @throws MaskrouteError `storage_failed` where their folder cannot be made, `start_failed` where it cannot be locked.
 */
export async function openJobs(options: JobsOptions): Promise<Jobs | undefined> {
  const folder = join(options.home, 'jobs');
  await makeFolder(folder, 0o700);
  const unlock = tryLock(join(folder, '.lock'));
  if (unlock === undefined) return undefined;
  try {
    const store = createJobStore(folder, options.note);
    const data = new JobData(join(folder, 'data'), options.dataFolder);
    await data.removeParts().catch((error: Error) => {
      options.note('unfinished uploads were not deleted', { reason: error.message });
    });
    return new Jobs(options, store, data, await store.load(), unlock);
  } catch (error) {
    unlock();
    throw error;
  }
}

/** A job that runs. */
type Current = { readonly id: string; readonly stop: AbortController; readonly ended: Promise<void> };

export class Jobs {
  readonly data: JobData;
  readonly #options: JobsOptions;
  readonly #store: JobStore;
  /** In order of creation. */
  readonly #jobs: Map<string, Job>;
  /** Callbacks that wake the followers of a job, by job id. */
  readonly #followers = new Map<string, Set<() => void>>();
  readonly #closing = new AbortController();
  readonly #unlock: () => void;
  #current: Current | undefined;
  /** Waiting jobs that are being cancelled. */
  readonly #leaving = new Set<string>();
  readonly #inTurn = oneAtATime();

  /** `unlock`: called once they are closed. */
  constructor(
    options: JobsOptions,
    store: JobStore,
    data: JobData,
    jobs: readonly Job[],
    unlock: () => void = () => {},
  ) {
    this.#options = options;
    this.#store = store;
    this.data = data;
    this.#unlock = unlock;
    this.#jobs = new Map(jobs.map((job) => [job.id, job]));
    this.#startNext();
  }

  /** The newest first. */
  list(): Job[] {
    return [...this.#jobs.values()].reverse();
  }

  /** @throws MaskrouteError `not_found`. */
  get(id: string): Job {
    const job = this.#jobs.get(id);
    if (job === undefined) throw new MaskrouteError('not_found', `There is no job ${id}.`);
    return job;
  }

  /**
   * Concurrent requests are handled one after the other, so that the queue's limit holds for all of them. Edges are asked
   * before: an edge that does not answer holds up nobody else. The edge of a schedule was asked when that was created.
   * @param schedule id of the schedule that creates the job, if any.
   * @throws MaskrouteError `queue_full`, what {@link requireEdgeAllows} and {@link JobData.files} throw, `not_found` or
   * `conflict` when the mask set to begin with is missing.
   */
  async create(request: CreateJob, schedule: string | null = null): Promise<Job> {
    this.#requireRoom();
    if (schedule === null && request.publish !== undefined) await requireEdgeAllows(request.publish);
    return await this.#inTurn(() => this.#create(request, schedule));
  }

  /** Records a job that failed before it could begin, so that it is listed with its error. */
  createFailed(request: JobRequest, schedule: string, error: string): Promise<Job> {
    return this.#inTurn(async () => {
      const job = this.#newJob(request, schedule);
      const finished_at = job.created_at;
      const failed: Job = { ...job, status: 'failed', error, finished_at };
      await this.#store.save(failed);
      this.#tell(failed);
      this.#options.note('a job failed', { job: job.id, reason: error });
      await this.#forgetOldest();
      return failed;
    });
  }

  /**
   * Cancels the job unless it has finished. If it does not stop within `cancelWait_ms`, the returned job is still
   * `running`. @throws MaskrouteError `not_found`.
   */
  async cancel(id: string): Promise<Job> {
    const job = this.get(id);
    if (isFinished(job)) return job;
    if (this.#current?.id !== id) return await this.#leave(id);
    const { stop, ended } = this.#current;
    stop.abort();
    await Promise.race([
      ended,
      setTimeout(this.#options.cancelWait_ms ?? CANCEL_WAIT_ms, null, { ref: false }),
    ]);
    return this.get(id);
  }

  /** The running job may end before the disk has the cancellation; this job must not start then. */
  async #leave(id: string): Promise<Job> {
    this.#leaving.add(id);
    try {
      return await this.#finish(id, { status: 'cancelled' });
    } finally {
      this.#leaving.delete(id);
      this.#startNext();
    }
  }

  /** The job now and after each change, until it has finished. */
  async *follow(id: string, signal: AbortSignal): AsyncGenerator<Job, void> {
    let changed = Promise.withResolvers<void>();
    const wake = () => changed.resolve();
    const watching = this.#followers.get(id) ?? new Set();
    this.#followers.set(id, watching.add(wake));
    signal.addEventListener('abort', wake, { once: true });
    try {
      for (let job = this.get(id); !signal.aborted; job = this.get(id)) {
        changed = Promise.withResolvers<void>();
        yield job;
        if (isFinished(job)) return;
        // Changes that happened while the previous one was sent are reported as one.
        if (this.get(id) === job) await changed.promise;
      }
    } finally {
      signal.removeEventListener('abort', wake);
      watching.delete(wake);
      if (watching.size === 0) this.#followers.delete(id);
    }
  }

  /** A file that a job made. @throws MaskrouteError `not_found`, `conflict` when it is not there yet. */
  async read(id: string, file: 'mask-set.json' | 'report.json'): Promise<string> {
    const { status } = this.get(id);
    try {
      return await readFile(join(this.#store.outOf(id), file), 'utf8');
    } catch (cause) {
      throw new MaskrouteError('conflict', `The job is ${status}; it has made no ${file}.`, { cause });
    }
  }

  /**
   * Waits for the job that is being created: it may have found the data already.
   * @throws MaskrouteError `not_found`, `conflict` while a job needs it.
   */
  removeData(id: string): Promise<void> {
    return this.#inTurn(async () => {
      const needs = (job: Job) => !isFinished(job) && needsUpload(job.request.data, id);
      const job = [...this.#jobs.values()].find(needs);
      if (job !== undefined) throw new MaskrouteError('conflict', `The job ${job.id} needs this data.`);
      await this.data.remove(id);
    });
  }

  /** Stops the running job and begins no other; the next start of the backend resumes it. */
  async stop(): Promise<void> {
    this.#closing.abort();
    await this.#current?.ended;
  }

  /** Stops, and lets another backend have the jobs of the home: requests and schedules must be over. */
  async close(): Promise<void> {
    await this.stop();
    this.#unlock();
  }

  /* How a job comes into being. */

  async #create(request: CreateJob, schedule: string | null): Promise<Job> {
    this.#requireRoom();
    await this.data.files(request);
    if (request.from !== undefined && request.from !== 'last') {
      await this.read(request.from, 'mask-set.json');
      if (request.context !== undefined)
        throw new MaskrouteError(
          'invalid_request',
          'context does nothing beside from: blocks count as they did for the earlier set.',
          { param: 'context' },
        );
    }
    const job = this.#newJob(withDefaults(request, this.#options.model), schedule);
    const folder = this.#store.folderOf(job.id);
    await makeWithSecret(folder, request.publish?.admin_key, this.#options.backendKeys[0], () =>
      this.#store.save(job),
    );
    this.#tell(job);
    await this.#forgetOldest();
    this.#startNext();
    return job;
  }

  /** Call it in turn: the next job's number follows from this one's, once that is told. */
  #newJob(request: JobRequest, schedule: string | null): Job {
    const [newest] = this.list();
    return {
      id: `job_${randomBytes(12).toString('hex')}`,
      object: 'maskroute.job',
      number: (newest?.number ?? 0) + 1,
      status: 'waiting',
      request,
      schedule,
      created_at: new Date().toISOString(),
      started_at: null,
      finished_at: null,
      starts: 0,
      progress: null,
      error: null,
      result: null,
    };
  }

  #requireRoom(): void {
    const waiting = [...this.#jobs.values()].filter(({ status }) => status === 'waiting').length;
    if (waiting < JOBS_WAITING_MAX) return;
    const message = `${JOBS_WAITING_MAX} jobs are waiting already.`;
    throw new MaskrouteError('queue_full', message, { retryAfter_s: 60 });
  }

  /**
   * A schedule that always fails must not push out the mask sets that other jobs begin with. A job whose files cannot be
   * deleted is listed again after the next start.
   */
  async #forgetOldest(): Promise<void> {
    const all = [...this.#jobs.values()];
    const needed = new Set(all.filter((job) => !isFinished(job)).map(({ request }) => request.from));
    const finished = all.filter(isFinished);
    const succeeded = finished.filter(({ status }) => status === 'succeeded');
    const others = finished.filter(({ status }) => status !== 'succeeded');
    for (const { id } of [...succeeded.slice(0, -FINISHED_MAX), ...others.slice(0, -FINISHED_MAX)]) {
      if (needed.has(id)) continue;
      this.#jobs.delete(id);
      await this.#store.remove(id).catch(({ message: reason }: Error) => {
        this.#options.note('an old job was not deleted', { job: id, reason });
      });
    }
  }

  /* How a job runs. */

  #startNext(): void {
    if (this.#current !== undefined || this.#closing.signal.aborted) return;
    const all = [...this.#jobs.values()].filter(({ id }) => !this.#leaving.has(id));
    // A job that was running when this process began was cut off.
    const next =
      all.find(({ status }) => status === 'running') ?? all.find(({ status }) => status === 'waiting');
    if (next === undefined) return;
    const { id } = next;
    const stop = new AbortController();
    const ended = this.#work(id, AbortSignal.any([stop.signal, this.#closing.signal]))
      .catch((error: unknown) => this.#fail(id, error))
      .finally(() => {
        this.#current = undefined;
        this.#startNext();
      });
    this.#current = { id, stop, ended };
  }

  async #work(id: string, signal: AbortSignal): Promise<void> {
    const { started_at, starts } = this.get(id);
    const job = await this.#change(id, {
      status: 'running',
      started_at: started_at ?? new Date().toISOString(),
      starts: starts + 1,
    });
    this.#options.note(starts === 0 ? 'a job begins' : 'a job goes on', { job: id });
    const end = await runJob(job, {
      options: this.#options,
      store: this.#store,
      data: this.data,
      list: () => this.list(),
      onProgress: this.#progressOf(id),
      signal,
    });
    if (end.kind === 'succeeded') await this.#finish(id, { status: 'succeeded', result: end.result });
    else await this.#end(id, end);
  }

  #progressOf(id: string): (progress: JobProgress) => void {
    let savedAt_ms = Number.NEGATIVE_INFINITY;
    return (progress) => {
      const job = { ...this.get(id), progress };
      this.#tell(job);
      if (performance.now() - savedAt_ms < SAVE_EVERY_ms) return;
      savedAt_ms = performance.now();
      void this.#store.save(job).catch((error: Error) => {
        this.#options.note('progress was not written', { job: id, reason: error.message });
      });
    };
  }

  /** Ends a job that failed or was stopped. */
  async #end(id: string, end: Exclude<JobEnd, { kind: 'succeeded' }>): Promise<void> {
    // Stopped with the server, and not cancelled: it stays `running` on disk, and the next start goes on with it.
    if (this.#closing.signal.aborted && !this.#current?.stop.signal.aborted) return;
    const { result } = end;
    if (end.kind === 'stopped')
      await this.#finish(id, { status: 'cancelled', result, error: result && PUBLISHED_PERHAPS });
    else await this.#finish(id, { status: 'failed', error: end.reason, result });
  }

  async #fail(id: string, cause: unknown): Promise<void> {
    this.#options.note('a job failed', { job: id, reason: String(cause) });
    const error = cause instanceof MaskrouteError ? cause.message : 'The server met an unexpected condition.';
    await this.#finish(id, { status: 'failed', error }).catch(() => {
      // The disk refuses the write: the job has failed in memory only, and the next start tries it again.
      this.#tell({ ...this.get(id), status: 'failed', error });
    });
  }

  /* A job's state: first on disk, then in memory, then sent to its followers. */

  async #finish(id: string, fields: Pick<Job, 'status'> & Partial<Job>): Promise<Job> {
    const job: Job = { ...this.get(id), finished_at: new Date().toISOString(), progress: null, ...fields };
    await this.#store.save(job);
    // Not before: if the disk refuses the job's end, the next start publishes again.
    await this.#store.removeSecret(id);
    this.#tell(job);
    return job;
  }

  async #change(id: string, fields: Partial<Job>): Promise<Job> {
    const job = { ...this.get(id), ...fields };
    await this.#store.save(job);
    this.#tell(job);
    return job;
  }

  #tell(job: Job): void {
    this.#jobs.set(job.id, job);
    for (const wake of this.#followers.get(job.id) ?? []) wake();
  }
}

/** A request without its secrets. `model`: the default where the request names none. */
export function withDefaults({ publish, ...request }: CreateJob, model: string): JobRequest {
  const shown = { ...request, model: request.model ?? model };
  if (publish === undefined) return shown;
  const { admin_key: _key, ...where } = publish;
  return { ...shown, publish: where };
}
