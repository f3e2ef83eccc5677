/**
 * The jobs of a backend: one runs, a few wait. A job is on disk before its request is answered. A job that a restart
 * interrupted is started again and resumes from what `learn` left in its folder.
 */
import { randomBytes } from 'node:crypto';
import { copyFile, mkdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import {
  type CreateJob,
  isFinished,
  JOBS_WAITING_MAX,
  type Job,
  type JobRequest,
} from '../../shared/admin/job-wire.ts';
import { maskSetVersion } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { makeFolder, sizeOf, tryLock } from '../files.ts';
import { oneAtATime } from '../one-at-a-time.ts';
import { createAdminClient } from '../publication/admin-client.ts';
import { requireMayPublish } from '../publication/publish.ts';
import { setToBeginWith, takeOver } from './earlier-jobs.ts';
import {
  createJobStore,
  JobData,
  type JobStore,
  makeWithSecret,
  type Note,
  needsUpload,
  readSecret,
} from './job-store.ts';
import { type CommandEnd, learnArguments, publishArguments, runCommand } from './run-command.ts';

export type JobsOptions = {
  readonly home: string;
  /** The served model: the default for requests that name no model. */
  readonly model: string;
  /** Secrets are sealed under the first, and opened by any: there are two during a rotation. */
  readonly backendKeys: readonly [string, ...string[]];
  /** See {@link runCommand}. */
  readonly entry: string;
  /** The folder whose files requests may name; undefined: requests may name no files. */
  readonly dataFolder: string | undefined;
  /** For the log: a job began, went on, failed. */
  readonly note: Note;
  /** How long an answer to a cancel waits for the job's end. */
  readonly cancelWait_ms?: number | undefined;
};

/** Shorter than the edge waits for an answer: a step of learning may take longer on a busy machine. */
const CANCEL_WAIT_ms = 8_000;
/** How long an edge may take to say whether a job may publish there: shorter than an edge waits that asks for the job. */
const MAY_PUBLISH_TIMEOUT_ms = 8_000;
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
  async createFailed(request: JobRequest, schedule: string, error: string): Promise<Job> {
    const job = this.#newJob(request, schedule);
    const finished_at = job.created_at;
    const failed: Job = { ...job, status: 'failed', error, finished_at };
    await this.#store.save(failed);
    this.#tell(failed);
    this.#options.note('a job failed', { job: job.id, reason: error });
    await this.#forgetOldest();
    return failed;
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

  /** A schedule that always fails must not push out the mask sets that other jobs begin with. */
  async #forgetOldest(): Promise<void> {
    const all = [...this.#jobs.values()];
    const needed = new Set(all.filter((job) => !isFinished(job)).map(({ request }) => request.from));
    const finished = all.filter(isFinished);
    const succeeded = finished.filter(({ status }) => status === 'succeeded');
    const others = finished.filter(({ status }) => status !== 'succeeded');
    for (const { id } of [...succeeded.slice(0, -FINISHED_MAX), ...others.slice(0, -FINISHED_MAX)]) {
      if (needed.has(id)) continue;
      this.#jobs.delete(id);
      await this.#store.remove(id);
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
    const { started_at, starts, schedule } = this.get(id);
    const job = await this.#change(id, {
      status: 'running',
      started_at: started_at ?? new Date().toISOString(),
      starts: starts + 1,
    });
    const { request } = job;
    this.#options.note(starts === 0 ? 'a job begins' : 'a job goes on', { job: id });
    if (request.publish !== undefined && !(await this.#store.hasSet(id)))
      await this.#requireKey({ ...request.publish, admin_key: await this.#adminKeyOf(id) }, signal);
    const learned = await this.#learn(job, signal);
    if (learned.kind !== 'done') return await this.#end(id, learned, null);
    const version = maskSetVersion(await this.#store.readSet(id));
    if (request.publish === undefined) {
      await this.#finish(id, { status: 'succeeded', result: { version, published: null } });
      return;
    }
    // Cancelled, or the backend stops: nothing is published yet.
    if (signal.aborted) return await this.#end(id, { kind: 'stopped' }, null);
    if (schedule !== null) await this.#continueTry(id, schedule, version);
    const firstTry = this.#store.firstTryOf(id);
    const toPublish = publishArguments(request.publish, this.#store.setOf(id), firstTry, schedule !== null);
    const env = { MASKROUTE_ADMIN_KEY: await this.#adminKeyOf(id) };
    const published = await this.#run(id, toPublish, env, signal);
    if (published.kind !== 'done') return await this.#end(id, published, { version, published: null });
    await this.#finish(id, { status: 'succeeded', result: { version, published: published.lastLine } });
  }

  /**
   * Where the schedule's job before learned the same version, this one publishes it only if that one did not: a set that
   * somebody has made live in its place since stays live.
   */
  async #continueTry(id: string, schedule: string, version: string): Promise<void> {
    const before = this.list().find((job) => job.schedule === schedule && job.result !== null);
    if (before?.result?.version !== version) return;
    const { firstTryOf } = this.#store;
    await copyFile(firstTryOf(before.id), firstTryOf(id)).catch((error: NodeJS.ErrnoException) => {
      // It could not even ask the edge what was live.
      if (error.code !== 'ENOENT') throw error;
    });
  }

  /** A key that was revoked meanwhile is not worth learning for. An edge that does not answer may be back by then. */
  async #requireKey(publish: Publish, signal: AbortSignal): Promise<void> {
    await requireEdgeAllows(publish, signal).catch((error: MaskrouteError) => {
      if (error.code !== 'edge_unreachable') throw error;
    });
  }

  /** @throws MaskrouteError `conflict` when it was sealed under another key. */
  #adminKeyOf(id: string): Promise<string> {
    return readSecret(this.#store.folderOf(id), this.#options.backendKeys);
  }

  /** Unless an earlier start of the job has learned, or an equal job. */
  async #learn(job: Job, signal: AbortSignal): Promise<CommandEnd> {
    const done = { kind: 'done', lastLine: '' } as const;
    const { id, request } = job;
    const store = this.#store;
    if (await store.hasSet(id)) return done;
    const files = await this.data.files(request);
    const earlier = { jobs: this.list(), store, home: this.#options.home };
    // A restart chooses the same one: no other job ends while this one runs.
    const from = await setToBeginWith(request, earlier);
    const out = store.outOf(id);
    if ((await sizeOf(out)) === undefined) {
      const taken = await takeOver({ job, files, from }, earlier, signal).catch((error: unknown) => {
        if (!signal.aborted) throw error;
      });
      if (taken) this.#options.note('a job goes on from an equal one', { job: id, earlier: taken });
    }
    if (await store.hasSet(id)) return done;
    // The next start takes nothing over where it finds the folder.
    if (signal.aborted) return { kind: 'stopped' };
    await mkdir(out, { recursive: true, mode: 0o700 });
    return await this.#run(id, learnArguments(request, files, out, from), {}, signal);
  }

  async #run(
    id: string,
    args: string[],
    env: Record<string, string>,
    signal: AbortSignal,
  ): Promise<CommandEnd> {
    const command = runCommand({
      entry: this.#options.entry,
      args,
      env: { ...env, MASKROUTE_HOME: this.#options.home, MASKROUTE_JOB_FOLDER: this.#store.folderOf(id) },
      logFile: this.#store.logOf(id),
      signal,
    });
    let savedAt_ms = Number.NEGATIVE_INFINITY;
    for (;;) {
      const step = await command.next();
      if (step.done) return step.value;
      const job = { ...this.get(id), progress: step.value };
      this.#tell(job);
      if (performance.now() - savedAt_ms < SAVE_EVERY_ms) continue;
      savedAt_ms = performance.now();
      void this.#store.save(job).catch((error: Error) => {
        this.#options.note('progress was not written', { job: id, reason: error.message });
      });
    }
  }

  /** Handles a command of a job that failed or was stopped. `result`: null unless the job had begun to publish. */
  async #end(id: string, end: Exclude<CommandEnd, { kind: 'done' }>, result: Job['result']): Promise<void> {
    // Stopped with the server, and not cancelled: it stays `running` on disk, and the next start goes on with it.
    if (this.#closing.signal.aborted && !this.#current?.stop.signal.aborted) return;
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

type Publish = NonNullable<CreateJob['publish']>;

/**
 * Checks what a job would find out only at its end. `signal`: ends the question.
 * @throws MaskrouteError `invalid_request` where the edge refuses to publish, `edge_unreachable` where it cannot say.
 */
export async function requireEdgeAllows(
  { edge, tenant, admin_key }: Publish,
  signal?: AbortSignal,
): Promise<void> {
  const client = createAdminClient(edge, admin_key, MAY_PUBLISH_TIMEOUT_ms);
  await requireMayPublish(client, tenant, signal).catch((cause: MaskrouteError) => {
    // The edge's own status, such as 401 or 429, would seem to be about the caller.
    const isPassing = cause.status >= 500 || cause.status === 429;
    const refused = `publish: the edge at ${client.edge} ${isPassing ? 'does not say whether it allows it' : 'refuses it'}`;
    throw new MaskrouteError(
      isPassing ? 'edge_unreachable' : 'invalid_request',
      `${refused}: ${cause.message}`,
      {
        param: 'publish',
        cause,
      },
    );
  });
}

/** A request without its secrets. `model`: the default where the request names none. */
export function withDefaults({ publish, ...request }: CreateJob, model: string): JobRequest {
  const shown = { ...request, model: request.model ?? model };
  if (publish === undefined) return shown;
  const { admin_key: _key, ...where } = publish;
  return { ...shown, publish: where };
}
