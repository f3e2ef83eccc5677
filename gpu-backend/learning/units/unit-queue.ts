/**
 * What a run and its workers share in Redis (or Valkey): the queue of units, which run uses it, and which units are
 * being computed. All of it may be lost at any time and is then written again.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { Redis, ReplyError } from 'ioredis';
import { z } from 'zod';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { describeWork, sameWork, unitSchema, workSchema } from './unit.ts';

/** Fixed, so that an autoscaler can read the length of `bull:maskroute-units:wait`. */
export const QUEUE_NAME = 'maskroute-units';

/** Redis keys: the run that uses the queue, and the reason of a worker that refuses a run. */
const LEARNS_KEY = 'maskroute:learns';
const REFUSAL_KEY = 'maskroute:refusal';
const claimKey = (name: string) => `maskroute:claim:${name}`;

/** Interval of heartbeats of runs and workers, and how long they are valid. */
export const BEAT_ms = 1000;
const RUN_LASTS_ms = 15_000;
const CLAIM_LASTS_ms = 5000;
const REFUSAL_LASTS_ms = 10_000;

/** A server that answers nothing for so long counts as gone; above the 10 s for which BullMQ's commands block. */
const SILENT_ms = 15_000;

export const jobSchema = z.strictObject({ work: workSchema, unit: unitSchema });
export type UnitJob = z.infer<typeof jobSchema>;

/** Who uses the queue: runs of the same work with the same journal. */
const learnsSchema = z.strictObject({ work: workSchema, journal: z.string() });
export type Learns = z.infer<typeof learnsSchema>;

export const sameRun = (a: Learns, b: Learns): boolean => sameWork(a.work, b.work) && a.journal === b.journal;

/**
 * Connects, and reconnects without limit. `say` receives a line when the server is unreachable or silent, and when it is
 * back.
 */
export function connectQueue(url: string, say: (line: string) => void, silent_ms = SILENT_ms): Redis {
  const { protocol, host } = new URL(url);
  const redis = new Redis(url, {
    maxRetriesPerRequest: null,
    enableReadyCheck: true,
    socketTimeout: silent_ms,
    retryStrategy: (tries) => Math.min(100 * tries, 1000),
  });
  let isAway = false;
  redis.on('error', (error: NodeJS.ErrnoException) => {
    if (isAway) return;
    isAway = true;
    const reason = /^Socket timeout/.test(error.message)
      ? `no answer for ${silent_ms / 1000} s`
      : (error.code ?? error.message);
    say(`The queue ${protocol}//${host} is unreachable (${reason}); waiting for it.`);
  });
  redis.on('close', () => {
    // An error event, if there is one, comes at once and says more.
    if (isAway || redis.status === 'end') return;
    isAway = true;
    say(`The queue ${protocol}//${host} is unreachable; waiting for it.`);
  });
  redis.on('ready', () => {
    if (isAway) say(`The queue ${protocol}//${host} is back.`);
    isAway = false;
  });
  return redis;
}

/** The codes of errors that pass: no memory or no disk, a replica that takes over, data being loaded, a long script. */
const PASSING = /\b(OOM|MISCONF|READONLY|NOREPLICAS|MASTERDOWN|LOADING|BUSY)\b/;

/** Whether the server is there and refuses a command for now, so that it is worth asking again. */
export const refusesForNow = (error: unknown): error is Error =>
  error instanceof ReplyError && PASSING.test((error as Error).message);

/** Registers a run, or renews its registration. Returns the registered run: another one if that was first. */
export async function announce(redis: Redis, learns: Learns): Promise<Learns> {
  const text = JSON.stringify(learns);
  await redis.set(LEARNS_KEY, text, 'PX', RUN_LASTS_ms, 'NX');
  const found = await whoLearns(redis);
  if (found === undefined || !sameRun(found, learns)) return found ?? learns;
  await redis.pexpire(LEARNS_KEY, RUN_LASTS_ms);
  return found;
}

/**
 * Removes a run's registration, so that the next need not wait. Other runs of the same work renew it with their next
 * heartbeat.
 */
export async function withdraw(redis: Redis, learns: Learns): Promise<void> {
  const found = await whoLearns(redis);
  if (found !== undefined && sameRun(found, learns)) await redis.del(LEARNS_KEY);
}

/** The registered run, if there is one. @throws MaskrouteError `conflict` when its registration has another version's format. */
export async function whoLearns(redis: Redis): Promise<Learns | undefined> {
  const text = await redis.get(LEARNS_KEY);
  if (text === null) return undefined;
  try {
    return learnsSchema.parse(JSON.parse(text));
  } catch (cause) {
    const message = `Refused: a run of another version uses the queue: ${text.slice(0, 300)}`;
    throw new MaskrouteError('conflict', message, { cause });
  }
}

export async function refuse(redis: Redis, reason: string): Promise<void> {
  await redis.set(REFUSAL_KEY, reason, 'PX', REFUSAL_LASTS_ms);
}

export const refusal = (redis: Redis): Promise<string | null> => redis.get(REFUSAL_KEY);

export const describeLearns = ({ work }: Learns): string => describeWork(work);

/*
 * A claim says that a unit is being computed. BullMQ's own locks are lost when Redis is flushed; a claim is renewed
 * with the next heartbeat.
 */

/**
 * Claims a unit until the claim is disposed of. Waits while another worker computes it, and returns no claim when that
 * one is done. Waits, too, while the server refuses claims for now.
 */
export async function claimUnit(
  redis: Redis,
  name: string,
  worker: string,
  isDone: () => Promise<boolean>,
): Promise<Disposable | undefined> {
  const key = claimKey(name);
  const isClaimed = async () =>
    (await redis.set(key, worker, 'PX', CLAIM_LASTS_ms, 'NX').catch((error: unknown) => {
      if (refusesForNow(error)) return null;
      throw error;
    })) !== null;
  while (!(await isClaimed())) {
    if (await isDone()) return undefined;
    await sleep(BEAT_ms / 2);
  }
  const beat = setInterval(() => {
    // While the server is unreachable, nobody else can take the unit.
    if (redis.status === 'ready') redis.set(key, worker, 'PX', CLAIM_LASTS_ms).catch(() => {});
  }, BEAT_ms);
  return {
    [Symbol.dispose]() {
      clearInterval(beat);
      if (redis.status === 'ready') redis.del(key).catch(() => {});
    },
  };
}

/** Whether each unit is in the queue or being computed. `keyOf`: the Redis key of a unit's job. */
export async function knownToQueue(
  redis: Redis,
  names: readonly string[],
  keyOf: (name: string) => string,
): Promise<boolean[]> {
  const pipeline = redis.pipeline();
  for (const name of names) pipeline.exists(keyOf(name), claimKey(name));
  const answers = (await pipeline.exec()) ?? [];
  return answers.map(([error, found]) => {
    if (error !== null) throw error;
    return Number(found) > 0;
  });
}
