/**
 * `learn --queue`: puts a run's units into a queue for workers (`unit-worker.ts`) and reads their results from the
 * journal. The queue may lose everything at any time: units that neither the queue nor a worker knows are submitted
 * again.
 */
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { Queue, QueueEvents } from 'bullmq';
import type { Redis } from 'ioredis';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { type Unit, unitName, workOf } from './unit.ts';
import { openUnitJournal, type UnitJournal } from './unit-journal.ts';
import {
  announce,
  BEAT_ms,
  connectQueue,
  describeLearns,
  knownToQueue,
  type Learns,
  QUEUE_NAME,
  refusal,
  refusesForNow,
  sameRun,
  type UnitJob,
  withdraw,
} from './unit-queue.ts';
import type { OpenUnits, Units } from './units.ts';

type QueuedOptions = {
  /** `redis://host:6379`. */
  readonly url: string;
  /** The journal's folder. */
  readonly journal: string;
  readonly say: (line: string) => void;
  /** A server that answers nothing for so long counts as gone. Shorter in tests. */
  readonly silent_ms?: number;
};

/** Most units in the queue at a time: enough for as many workers, and few to submit again. */
const AT_ONCE = 256;
/**
 * Heartbeats after which an unknown unit counts as lost; a worker renews its claim with every heartbeat, even after the
 * queue was flushed.
 */
const BEATS_UNTIL_LOST = 4;
/** Attempts for each unit: a machine may have no memory or disk left, then another worker tries. */
const ATTEMPTS = 3;
const RETRY_AFTER_ms = 1000;
/** Time at the end for removing unneeded units from the queue. */
const GOODBYE_ms = 2000;

export const openQueuedUnits =
  ({ url, journal: folder, say, silent_ms }: QueuedOptions): OpenUnits =>
  async ({ model, surrogates, rounding, signal }) => {
    const journal = await openUnitJournal(folder, say);
    const redis = connectQueue(url, say, silent_ms);
    const learns = { work: workOf(model, surrogates, rounding), journal: journal.id };
    try {
      await waitForTurn(redis, learns, say, signal);
      return new QueuedUnits({ redis, journal, learns, say, signal });
    } catch (error) {
      redis.disconnect();
      throw error;
    }
  };

/** Waits until no run for other work uses the queue, so that workers need not change their model with every unit. */
async function waitForTurn(
  redis: Redis,
  learns: Learns,
  say: (line: string) => void,
  signal: AbortSignal | undefined,
): Promise<void> {
  const stopped = new Promise<never>((_, reject) => {
    signal?.addEventListener('abort', () => reject(signal.reason), { once: true });
  });
  stopped.catch(() => {});
  /** Why the run has to wait; undefined when it need not. */
  const hindrance = async (): Promise<string | undefined> => {
    try {
      const first = await announce(redis, learns);
      if (sameRun(first, learns)) return undefined;
      return `The queue is in use by a run for ${describeLearns(first)}. This run waits until it ends.`;
    } catch (error) {
      if (!refusesForNow(error)) throw error;
      return waitsFor(error);
    }
  };
  for (let told = ''; ; ) {
    signal?.throwIfAborted();
    const reason = await Promise.race([hindrance(), stopped]);
    if (reason === undefined) return;
    if (reason !== told) say(reason);
    told = reason;
    await sleep(BEAT_ms, undefined, { signal }).catch(() => {});
  }
}

const waitsFor = ({ message }: Error): string =>
  `The queue takes no units for now (${message.replace(/\.?( script: .*)?$/, '')}); waiting for it.`;

type Waiting = {
  readonly unit: Unit;
  readonly done: PromiseWithResolvers<readonly number[]>;
  /** Heartbeats in a row at which neither the queue nor a worker knew the unit. */
  lostBeats: number;
};

type Parts = {
  readonly redis: Redis;
  readonly journal: UnitJournal;
  readonly learns: Learns;
  readonly say: (line: string) => void;
  readonly signal: AbortSignal | undefined;
};

class QueuedUnits implements Units {
  readonly atOnce = AT_ONCE;
  readonly #parts: Parts;
  readonly #queue: Queue<UnitJob>;
  /** A connection of its own, since waiting for events blocks it. */
  readonly #eventsRedis: Redis;
  readonly #events: QueueEvents;
  readonly #waiting = new Map<string, Waiting>();
  /** Names of units that may still be in the queue. */
  readonly #handedIn = new Set<string>();
  readonly #closing = new AbortController();
  readonly #watching: Promise<void>;
  readonly #stop = () => this.#rejectAll(this.#parts.signal!.reason);
  #refusal = '';
  /** Whether the queue refuses units for now. */
  #isRefused = false;

  constructor(parts: Parts) {
    this.#parts = parts;
    const { redis, signal } = parts;
    this.#queue = new Queue(QUEUE_NAME, { connection: redis });
    this.#eventsRedis = redis.duplicate();
    this.#events = new QueueEvents(QUEUE_NAME, { connection: this.#eventsRedis });
    // The other connection reports when the server is unreachable.
    this.#eventsRedis.on('error', () => {});
    this.#queue.on('error', () => {});
    this.#events.on('error', () => {});
    // If the journal cannot be read, the next heartbeat notices and ends the run.
    this.#events.on('completed', ({ jobId }) => void this.#look(jobId).catch(() => {}));
    this.#events.on('failed', ({ jobId, failedReason }) => this.#fail(jobId, failedReason));
    signal?.addEventListener('abort', this.#stop, { once: true });
    this.#watching = this.#watch();
  }

  async run(unit: Unit): Promise<readonly number[]> {
    this.#parts.signal?.throwIfAborted();
    const name = unitName(this.#parts.learns.work, unit);
    const asked = this.#waiting.get(name);
    if (asked !== undefined) return asked.done.promise;
    const waiting: Waiting = { unit, done: Promise.withResolvers(), lostBeats: 0 };
    this.#waiting.set(name, waiting);
    try {
      // Other calls for this unit wait for the same promise, so it must settle in any case. A unit that the queue refuses
      // for now counts as lost, and a later heartbeat submits it again.
      this.#readOrHandIn(name, waiting).catch((error: unknown) => {
        if (!this.#isRefusedForNow(error)) waiting.done.reject(error);
      });
      const values = await waiting.done.promise;
      this.#handedIn.delete(name);
      return values;
    } finally {
      this.#waiting.delete(name);
    }
  }

  async #readOrHandIn(name: string, { unit, done }: Waiting): Promise<void> {
    const known = await this.#parts.journal.read(name);
    if (known === undefined) await this.#handIn(name, unit);
    else done.resolve(known);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const { redis, learns, signal } = this.#parts;
    signal?.removeEventListener('abort', this.#stop);
    this.#closing.abort();
    this.#rejectAll(new Error('the run is over'));
    const goodbye = async () => {
      // Units in progress stay; the next run finds their results in the journal.
      await Promise.allSettled([...this.#handedIn].map((name) => this.#queue.remove(name)));
      await this.#events.close();
      await withdraw(redis, learns);
      await this.#queue.close();
    };
    if (redis.status === 'ready')
      await Promise.race([goodbye().catch(() => {}), sleep(GOODBYE_ms, undefined, { ref: false })]);
    this.#eventsRedis.disconnect();
    redis.disconnect();
    await this.#watching;
  }

  async #handIn(name: string, unit: Unit): Promise<void> {
    this.#handedIn.add(name);
    await this.#queue.add(
      unit.kind,
      { work: this.#parts.learns.work, unit },
      {
        jobId: name,
        attempts: ATTEMPTS,
        backoff: { type: 'fixed', delay: RETRY_AFTER_ms },
        removeOnComplete: true,
        removeOnFail: true,
      },
    );
  }

  /** Settles a unit whose result is in the journal. */
  async #look(name: string): Promise<boolean> {
    const waiting = this.#waiting.get(name);
    if (waiting === undefined) return true;
    const values = await this.#parts.journal.read(name);
    if (values !== undefined) waiting.done.resolve(values);
    return values !== undefined;
  }

  /** Says so when the queue begins to refuse units. */
  #isRefusedForNow(error: unknown): boolean {
    if (!refusesForNow(error)) return false;
    if (!this.#isRefused) this.#parts.say(waitsFor(error));
    this.#isRefused = true;
    return true;
  }

  #fail(name: string, reason: string): void {
    const message = `A worker could not compute a unit of the run: ${reason}`;
    this.#waiting.get(name)?.done.reject(new MaskrouteError('engine_failed', message));
  }

  #rejectAll(reason: unknown): void {
    for (const { done } of this.#waiting.values()) done.reject(reason);
  }

  /** Sends heartbeats until the run is over. */
  async #watch(): Promise<void> {
    const { signal } = this.#closing;
    const over = once(signal, 'abort');
    while (!signal.aborted) {
      await sleep(BEAT_ms, undefined, { signal, ref: false }).catch(() => {});
      if (signal.aborted) return;
      const beaten = this.#beat().catch((error: Error) => {
        if (signal.aborted || this.#isRefusedForNow(error)) return;
        // If the connection was lost, it is back with the next heartbeat.
        if (this.#parts.redis.status === 'ready') this.#rejectAll(error);
      });
      // ioredis never settles a command that was under way when the connection broke and that it cannot send again.
      await Promise.race([beaten, over]);
    }
  }

  async #beat(): Promise<void> {
    const { redis, learns, say } = this.#parts;
    for (const name of [...this.#waiting.keys()]) await this.#look(name);
    if (redis.status !== 'ready') return;
    const first = await announce(redis, learns);
    if (!sameRun(first, learns)) {
      // The other run came while this run was disconnected. Its workers refuse this run's units, which wait.
      say(`Another run uses the queue now: ${describeLearns(first)}.`);
      return;
    }
    const reason = (await refusal(redis)) ?? '';
    if (reason !== '' && reason !== this.#refusal) say(`A worker does not take part. ${reason}`);
    this.#refusal = reason;
    await this.#handInLost();
    if (this.#isRefused) say('The queue takes units again.');
    this.#isRefused = false;
  }

  async #handInLost(): Promise<void> {
    const { redis } = this.#parts;
    const names = [...this.#waiting.keys()];
    const known = await knownToQueue(redis, names, (name) => this.#queue.toKey(name));
    for (const [index, name] of names.entries()) {
      const waiting = this.#waiting.get(name);
      if (waiting === undefined) continue;
      waiting.lostBeats = known[index] ? 0 : waiting.lostBeats + 1;
      if (waiting.lostBeats < BEATS_UNTIL_LOST || (await this.#look(name))) continue;
      await this.#handIn(name, waiting.unit);
      waiting.lostBeats = 0;
    }
  }
}
