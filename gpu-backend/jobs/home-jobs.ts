/**
 * The jobs and schedules of a home. One backend has them at a time; the others of the same home try again until it has
 * ended, however it ended.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type Jobs, type JobsOptions, openJobs } from './job-queue.ts';
import { openSchedules, type Schedules } from './schedules.ts';

type HomeJobsOptions = JobsOptions & {
  /** For the log: why this backend runs no jobs. Called again when the reason changes. */
  readonly warn: (reason: string) => void;
  /** Time between two attempts; 10 s by default. */
  readonly retry_ms?: number | undefined;
};

type HeldJobs = { readonly jobs: Jobs; readonly schedules: Schedules };

export type HomeJobs = {
  /** Undefined while another backend has them, or their folder cannot be used. */
  readonly held: HeldJobs | undefined;
  /** Stops the running job and begins no other; the backend that has the jobs next resumes it. */
  stop(): Promise<void>;
  /** Stops, and frees the jobs for another backend of the home: requests must be over. */
  close(): Promise<void>;
};

const RETRY_ms = 10_000;
const ELSEWHERE = 'another backend with this MASKROUTE_HOME runs its jobs';

/** Rejects with the disk's error when the jobs are free and cannot be read. */
export async function openHomeJobs(options: HomeJobsOptions): Promise<HomeJobs> {
  const { home, note, warn, retry_ms = RETRY_ms } = options;
  const closing = new AbortController();
  let held: HeldJobs | undefined;
  let told = '';
  const tell = (reason: string) => {
    if (reason !== told) warn(reason);
    told = reason;
  };
  const attempt = async () => {
    try {
      held = await tryToHold(options);
      if (held === undefined) tell(ELSEWHERE);
    } catch (error) {
      // A backend without jobs still answers requests.
      if (!(error instanceof MaskrouteError)) throw error;
      tell(error.message);
    }
  };
  const untilHeld = async () => {
    while (held === undefined) {
      await sleep(retry_ms, undefined, { signal: closing.signal, ref: false }).catch(() => {});
      if (closing.signal.aborted) return;
      await attempt().catch((error: Error) => tell(error.message));
    }
    note('this backend runs the jobs of its home from now on', { home });
  };
  await attempt();
  const waiting = held === undefined ? untilHeld() : undefined;
  const stop = async () => {
    closing.abort();
    await waiting;
    await held?.jobs.stop();
  };
  return {
    get held() {
      return held;
    },
    stop,
    async close() {
      await stop();
      await held?.schedules.close();
      await held?.jobs.close();
    },
  };
}

async function tryToHold(options: JobsOptions): Promise<HeldJobs | undefined> {
  const jobs = await openJobs(options);
  if (jobs === undefined) return undefined;
  try {
    return { jobs, schedules: await openSchedules(options, jobs) };
  } catch (error) {
    await jobs.close();
    throw error;
  }
}
