/**
 * `work --queue`: takes units from a queue, computes them and writes their results to the journal, for the run that
 * uses the queue. A worker refuses a run with another model, version or journal, and says so.
 */
import { once } from 'node:events';
import { hostname } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { DelayedError, type Job, UnrecoverableError, WaitingError, Worker } from 'bullmq';
import type { Redis } from 'ioredis';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { type InstalledModel, openInstalled } from '../../model/store.ts';
import { installedSurrogates, type Surrogates } from '../../model/surrogates.ts';
import { describeWork, sameWork, unitName, workOf } from './unit.ts';
import { openUnitJournal, type UnitJournal } from './unit-journal.ts';
import {
  BEAT_ms,
  claimUnit,
  connectQueue,
  jobSchema,
  type Learns,
  QUEUE_NAME,
  refuse,
  sameRun,
  type UnitJob,
  whoLearns,
} from './unit-queue.ts';
import { openUnitThread, type UnitThread } from './unit-thread.ts';

type WorkOptions = {
  /** `redis://host:6379`. */
  readonly url: string;
  /** The journal's folder, the same as the run's. */
  readonly journal: string;
  readonly home: string;
  /** An installed model; undefined: the run's model, by its name. */
  readonly model: string | undefined;
  readonly threads: number;
  /** A worker without a sign of life for this long loses its unit to another worker. */
  readonly lease_ms: number;
  /** Time to finish the current unit when the worker is told to stop; after that it is returned to the queue. */
  readonly grace_ms: number;
  readonly say: (line: string) => void;
  /** Called after every unit that this worker computed. */
  readonly onUnit: (unit: { readonly unit: string; readonly kind: string; readonly took_ms: number }) => void;
  /** Ends the work. */
  readonly signal: AbortSignal;
};

/** A unit that crashes this many workers fails, and the run with it. */
const STALLED_MAX = 3;
/** Time for returning a unit to the queue, and for reporting a refusal. */
const GIVE_BACK_ms = 5000;

/** Works until `signal` aborts. @throws MaskrouteError `conflict` for a run that it refuses, `model_not_found`. */
export async function workUnits(options: WorkOptions): Promise<void> {
  const { url, say, signal } = options;
  const journal = await openUnitJournal(options.journal, say);
  const redis = connectQueue(url, say);
  try {
    say('This worker waits for a run.');
    for (let learns = await nextRun(redis, signal); learns; learns = await nextRun(redis, signal))
      await serveRun(options, redis, journal, learns);
  } finally {
    redis.disconnect();
  }
}

/** Waits for a run that uses the queue; undefined when the worker is told to stop. */
async function nextRun(redis: Redis, signal: AbortSignal): Promise<Learns | undefined> {
  const stopped = once(signal, 'abort').then(() => undefined);
  while (!signal.aborted) {
    const learns = await Promise.race([whoLearns(redis), stopped]);
    if (learns !== undefined) return learns;
    await sleep(BEAT_ms / 2, undefined, { signal }).catch(() => {});
  }
  return undefined;
}

/** Computes units until the worker is told to stop, or another run uses the queue. */
async function serveRun(
  options: WorkOptions,
  redis: Redis,
  journal: UnitJournal,
  learns: Learns,
): Promise<void> {
  const { say, signal, threads } = options;
  const own = await openOwn(options, learns).catch(async (error: unknown) => {
    await reportRefusal(redis, error);
    throw error;
  });
  const reason = whyRefused(own, learns, journal);
  if (reason !== undefined) {
    await reportRefusal(redis, reason);
    throw reason;
  }
  say(`This worker computes for ${describeWork(learns.work)}.`);
  const thread = openUnitThread({ ...own, threads, rounding: learns.work.rounding });
  const run = new RunOfUnits({ options, redis, journal, learns, thread });
  try {
    await run.untilOver(signal);
  } finally {
    await run.close();
    await thread.close();
  }
}

/** Reports a refusal to the run as well, whose user may not see this machine. A queue that is away changes nothing of it. */
async function reportRefusal(redis: Redis, error: unknown): Promise<void> {
  if (!(error instanceof MaskrouteError)) return;
  const reported = refuse(redis, `${hostname()}: ${error.message}`).catch(() => {});
  await Promise.race([reported, sleep(GIVE_BACK_ms, undefined, { ref: false })]);
}

type Own = { readonly model: InstalledModel; readonly surrogates: Surrogates | undefined };

async function openOwn({ home, model: name }: WorkOptions, { work }: Learns): Promise<Own> {
  const model = await openInstalled(home, name ?? work.model.name);
  return { model, surrogates: work.surrogates === null ? undefined : await installedSurrogates(model) };
}

function whyRefused(
  { model, surrogates }: Own,
  { work, journal }: Learns,
  own: UnitJournal,
): MaskrouteError | undefined {
  const mine = workOf(model, surrogates, work.rounding);
  if (!sameWork(mine, work)) {
    const message = `Refused: the run needs ${describeWork(work)}, and this worker has ${describeWork(mine)}.`;
    return new MaskrouteError('conflict', message);
  }
  if (journal === own.id) return undefined;
  const message =
    'Refused: the run keeps its journal in another folder than this worker; give both the same with --journal.';
  return new MaskrouteError('conflict', message);
}

type Parts = {
  readonly options: WorkOptions;
  readonly redis: Redis;
  readonly journal: UnitJournal;
  readonly learns: Learns;
  readonly thread: UnitThread;
};

/** The units of one run. */
class RunOfUnits {
  readonly #parts: Parts;
  readonly #worker: Worker<UnitJob>;
  readonly #broken = Promise.withResolvers<never>();
  /** Shown to people who inspect the queue. */
  readonly #name = `${hostname()} ${process.pid}`;

  constructor(parts: Parts) {
    this.#parts = parts;
    const { options, redis } = parts;
    this.#worker = new Worker<UnitJob>(QUEUE_NAME, (job, token) => this.#work(job, token!), {
      connection: redis,
      name: this.#name,
      lockDuration: options.lease_ms,
      stalledInterval: options.lease_ms,
      maxStalledCount: STALLED_MAX,
      runRetryDelay: BEAT_ms,
    });
    this.#broken.promise.catch(() => {});
    // The connection reports when the server is unreachable; other errors come from a flushed queue that no longer has
    // the current job.
    this.#worker.on('error', () => {});
  }

  /** Resolves when another run learns with the queue, or when `signal` aborts. Rejects when the thread has ended. */
  async untilOver(signal: AbortSignal): Promise<void> {
    const stopped = once(signal, 'abort').catch(() => {});
    const beats = new AbortController();
    const { redis, learns: own } = this.#parts;
    const other = async () => {
      for (;;) {
        await sleep(BEAT_ms, undefined, { signal: beats.signal });
        if (redis.status !== 'ready') continue;
        const learns = await whoLearns(redis);
        if (learns !== undefined && !sameRun(learns, own)) return;
      }
    };
    try {
      if (!signal.aborted) await Promise.race([stopped, other(), this.#broken.promise]);
    } finally {
      beats.abort();
    }
  }

  /** Finishes the current unit, or returns it to the queue if that takes too long. */
  async close(): Promise<void> {
    const closed = this.#worker.close().then(() => true);
    const within = (limit_ms: number) => Promise.race([closed, sleep(limit_ms, false, { ref: false })]);
    if (await within(this.#parts.options.grace_ms)) return;
    await this.#parts.thread.close();
    // Without the server nothing can be returned; the lease ends by itself.
    await within(GIVE_BACK_ms);
  }

  async #work(job: Job<UnitJob>, token: string): Promise<void> {
    const { options, redis, journal, learns, thread } = this.#parts;
    const { work, unit } = jobSchema.parse(job.data);
    if (!sameWork(work, learns.work)) {
      // The unit is of a run that is over or not yet registered: leave it to a worker that has its model.
      await job.moveToDelayed(Date.now() + BEAT_ms, token);
      throw new DelayedError();
    }
    const name = unitName(work, unit);
    if (name !== job.id) throw new UnrecoverableError(`the unit ${job.id} has another content, ${name}`);
    const isKnown = async () => (await journal.read(name)) !== undefined;
    if (await isKnown()) return;
    using claim = await claimUnit(redis, name, this.#name, isKnown);
    if (claim === undefined) return;
    const start_ms = performance.now();
    try {
      await journal.write(name, await thread.run(unit));
    } catch (error) {
      if (this.#worker.closing !== undefined) {
        await job.moveToWait(token);
        throw new WaitingError();
      }
      // Without its thread this worker would only use up the attempts of all units.
      if (error instanceof MaskrouteError) this.#broken.reject(error);
      throw error;
    }
    options.onUnit({ unit: name, kind: unit.kind, took_ms: Math.round(performance.now() - start_ms) });
  }
}
