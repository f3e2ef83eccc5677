/**
 * Recurring jobs. A schedule, with the time of its next job, is on disk before its request is answered. Times missed
 * while the backend was down are made up for by one job. A job that is due while the schedule's last job still runs
 * waits for its end.
 */
import { randomBytes } from 'node:crypto';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import {
  type CreateJob,
  type CreateSchedule,
  isFinished,
  type JobRequest,
  SCHEDULE_ID_PATTERN,
  SCHEDULES_MAX,
  type Schedule,
  scheduleSchema,
  secondsOf,
} from '../../shared/admin/job-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { writeWhole } from '../files.ts';
import { oneAtATime } from '../one-at-a-time.ts';
import { needsUpload } from './job-data.ts';
import { type Jobs, type JobsOptions, withDefaults } from './job-queue.ts';
import { loadAll, makeWithSecret, readSecret } from './job-store.ts';
import { requireEdgeAllows } from './run-job.ts';

type SchedulesOptions = Pick<JobsOptions, 'home' | 'model' | 'backendKeys' | 'note'>;

/** The longest time between two checks: clocks are changed, and machines sleep. */
const LOOK_EVERY_ms = 30_000;

/**
 * Reads the schedules from disk and begins the jobs that are due. A folder without a schedule, left by a kill, is removed
 * with its secret.
 */
export async function openSchedules(options: SchedulesOptions, jobs: Jobs): Promise<Schedules> {
  const folder = join(options.home, 'jobs', 'schedules');
  const { note } = options;
  const known = await loadAll(folder, 'schedule', { ids: SCHEDULE_ID_PATTERN, schema: scheduleSchema, note });
  return new Schedules(options, folder, jobs, known);
}

export class Schedules {
  readonly #options: SchedulesOptions;
  readonly #folder: string;
  readonly #jobs: Jobs;
  readonly #schedules: Map<string, Schedule>;
  readonly #closing = new AbortController();
  #timer: NodeJS.Timeout | undefined;
  readonly #inTurn = oneAtATime();

  constructor(options: SchedulesOptions, folder: string, jobs: Jobs, known: readonly Schedule[]) {
    this.#options = options;
    this.#folder = folder;
    this.#jobs = jobs;
    this.#schedules = new Map(known.map((schedule) => [schedule.id, schedule]));
    void this.#inTurn(() => this.#look());
  }

  /** The newest first. */
  list(): Schedule[] {
    return [...this.#schedules.values()].sort((a, b) => (a.created_at < b.created_at ? 1 : -1));
  }

  /** @throws MaskrouteError `not_found`. */
  get(id: string): Schedule {
    const schedule = this.#schedules.get(id);
    if (schedule === undefined) throw new MaskrouteError('not_found', `There is no schedule ${id}.`);
    return schedule;
  }

  /** @throws MaskrouteError `queue_full`, and what {@link requireEdgeAllows} and `JobData.files` throw. */
  async create(request: CreateSchedule): Promise<Schedule> {
    this.#requireRoom();
    // Its first job may be days away. Not in turn: an edge that does not answer holds up nobody else.
    if (request.job.publish !== undefined) await requireEdgeAllows(request.job.publish);
    return await this.#change(() => this.#create(request));
  }

  /** Its jobs stay, including a running one. @throws MaskrouteError `not_found`. */
  remove(id: string): Promise<void> {
    return this.#change(async () => {
      this.get(id);
      // First: after a kill a folder without it is no schedule. With it, but without its secret, its jobs would fail.
      await rm(this.#fileOf(id), { force: true });
      await rm(join(this.#folder, id), { recursive: true, force: true });
      this.#schedules.delete(id);
    });
  }

  /**
   * Waits for the schedule that is being created: it may have found the data already.
   * @throws MaskrouteError `conflict` while a schedule needs the data, and as {@link Jobs.removeData}.
   */
  removeData(id: string): Promise<void> {
    return this.#inTurn(async () => {
      const schedule = this.list().find(({ job }) => needsUpload(job.data, id));
      if (schedule !== undefined)
        throw new MaskrouteError('conflict', `The schedule ${schedule.id} needs this data.`);
      await this.#jobs.removeData(id);
    });
  }

  async close(): Promise<void> {
    this.#closing.abort();
    clearTimeout(this.#timer);
    await this.#inTurn(() => {});
  }

  #change<T>(change: () => Promise<T>): Promise<T> {
    const changed = this.#inTurn(change);
    void this.#inTurn(() => this.#look());
    return changed;
  }

  async #create({ every, first_at, job }: CreateSchedule): Promise<Schedule> {
    this.#requireRoom();
    await this.#jobs.data.files(job);
    const id = `schedule_${randomBytes(12).toString('hex')}`;
    const now_ms = Date.now();
    const schedule: Schedule = {
      id,
      object: 'maskroute.schedule',
      every,
      job: withDefaults(job, this.#options.model),
      created_at: new Date(now_ms).toISOString(),
      next_at: first_at ?? new Date(now_ms + 1000 * secondsOf(every)).toISOString(),
      last_job: null,
    };
    await makeWithSecret(join(this.#folder, id), job.publish?.admin_key, this.#options.backendKeys[0], () =>
      this.#save(schedule),
    );
    return schedule;
  }

  #requireRoom(): void {
    if (this.#schedules.size < SCHEDULES_MAX) return;
    throw new MaskrouteError('queue_full', `There are ${SCHEDULES_MAX} schedules already.`);
  }

  /* When jobs begin. */

  /** Begins the jobs that are due, and sets a timer for the next one. Runs in turn with changes of the schedules. */
  async #look(): Promise<void> {
    let hasFailed = false;
    for (const schedule of this.#schedules.values()) {
      if (this.#closing.signal.aborted) return;
      await this.#beginIfDue(schedule).catch((error: Error) => {
        hasFailed = true;
        this.#options.note('a schedule was not kept', { schedule: schedule.id, reason: error.message });
      });
    }
    clearTimeout(this.#timer);
    if (this.#closing.signal.aborted || this.#schedules.size === 0) return;
    const next_ms = Math.min(...this.list().map(({ next_at }) => Date.parse(next_at)));
    // A disk that refuses a schedule refuses it again at once.
    const wait_ms = hasFailed ? LOOK_EVERY_ms : Math.min(LOOK_EVERY_ms, Math.max(1000, next_ms - Date.now()));
    this.#timer = setTimeout(() => {
      void this.#inTurn(() => this.#look());
    }, wait_ms).unref();
  }

  async #beginIfDue(schedule: Schedule): Promise<void> {
    const [now_ms, due_ms] = [Date.now(), Date.parse(schedule.next_at)];
    if (due_ms > now_ms && !wasAhead(schedule, now_ms)) return;
    const own = this.#jobs.list().filter((job) => job.schedule === schedule.id);
    if (own.some((job) => !isFinished(job))) return;
    // After a kill between starting the job and saving the next time, the job must not begin twice. A job from the future is
    // another one: the clock was ahead when it began.
    const isBegun = (at_ms: number) => due_ms <= at_ms && at_ms <= now_ms;
    const begun = own.find((job) => isBegun(Date.parse(job.created_at))) ?? (await this.#begin(schedule));
    const next_at = nextTime(schedule, now_ms);
    await this.#save({ ...schedule, next_at, last_job: begun.id });
  }

  /** A job that cannot begin is listed like the others, with its error. */
  async #begin({ id, job }: Schedule) {
    try {
      return await this.#jobs.create(await this.#requestOf(id, job), id);
    } catch (error) {
      const reason = error instanceof MaskrouteError ? error.message : `It could not begin: ${error}`;
      return await this.#jobs.createFailed(job, id, reason);
    }
  }

  async #requestOf(id: string, { publish, ...job }: JobRequest): Promise<CreateJob> {
    if (publish === undefined) return job;
    const admin_key = await readSecret(join(this.#folder, id), this.#options.backendKeys);
    return { ...job, publish: { ...publish, admin_key } };
  }

  readonly #fileOf = (id: string) => join(this.#folder, id, 'schedule.json');

  async #save(schedule: Schedule): Promise<void> {
    await writeWhole(this.#fileOf(schedule.id), `${JSON.stringify(schedule, null, 2)}\n`);
    this.#schedules.set(schedule.id, schedule);
  }
}

/** Whether the clock was ahead by more than `every` when the last job began: the next one is due at most `every` after it. */
const wasAhead = ({ last_job, next_at, every }: Schedule, now_ms: number): boolean =>
  last_job !== null && Date.parse(next_at) - now_ms > 2000 * secondsOf(every);

/** The schedule's first time in the future, as an ISO time. */
function nextTime({ next_at, every }: Pick<Schedule, 'next_at' | 'every'>, now_ms: number): string {
  const [due_ms, every_ms] = [Date.parse(next_at), 1000 * secondsOf(every)];
  const missed = Math.floor((now_ms - due_ms) / every_ms);
  return new Date(due_ms + (missed + 1) * every_ms).toISOString();
}
