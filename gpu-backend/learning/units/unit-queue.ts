/**
 * What a run and its workers share in the queue's server: the queue of units, who learns with it, and which units are being
 * computed. All of it can be lost at any time; then it is written again.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { Redis } from 'ioredis';
import { z } from 'zod';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { describeWork, sameWork, unitSchema, workSchema } from './unit.ts';

/** Fixed, so that a scaler can ask for the length of `bull:maskroute-units:wait`. */
export const QUEUE_NAME = 'maskroute-units';

/** The key that says who learns with the queue, and the one under which a worker says that a run is none of its. */
const LEARNS_KEY = 'maskroute:learns';
const REFUSAL_KEY = 'maskroute:refusal';
const claimKey = (name: string) => `maskroute:claim:${name}`;

/** How often a run and a worker say that they are there, and for how long that counts. */
export const BEAT_ms = 1000;
const RUN_LASTS_ms = 15_000;
const CLAIM_LASTS_ms = 5000;
const REFUSAL_LASTS_ms = 10_000;

export const jobSchema = z.strictObject({ work: workSchema, unit: unitSchema });
export type UnitJob = z.infer<typeof jobSchema>;

/** Who learns with the queue: runs of the same work in the same journal. */
const learnsSchema = z.strictObject({ work: workSchema, journal: z.string() });
export type Learns = z.infer<typeof learnsSchema>;

export const sameRun = (a: Learns, b: Learns): boolean => sameWork(a.work, b.work) && a.journal === b.journal;

/** Waits as long as it takes for a server that is away. `say` hears when it goes and when it is back. */
export function connectQueue(url: string, say: (line: string) => void): Redis {
  const { protocol, host } = new URL(url);
  const redis = new Redis(url, {
    maxRetriesPerRequest: null,
    enableReadyCheck: true,
    retryStrategy: (tries) => Math.min(100 * tries, 1000),
  });
  let isAway = false;
  redis.on('error', (error: NodeJS.ErrnoException) => {
    if (isAway) return;
    isAway = true;
    say(`The queue ${protocol}//${host} is away (${error.code ?? error.message}); this waits for it.`);
  });
  redis.on('close', () => {
    // An error tells more, and comes at once where there is one.
    if (isAway || redis.status === 'end') return;
    isAway = true;
    say(`The queue ${protocol}//${host} is away; this waits for it.`);
  });
  redis.on('ready', () => {
    if (isAway) say(`The queue ${protocol}//${host} is back.`);
    isAway = false;
  });
  return redis;
}

/** Says that a run learns, or goes on learning. Gives who does: another run, where that was first. */
export async function announce(redis: Redis, learns: Learns): Promise<Learns> {
  const text = JSON.stringify(learns);
  await redis.set(LEARNS_KEY, text, 'PX', RUN_LASTS_ms, 'NX');
  const found = await whoLearns(redis);
  if (found === undefined || !sameRun(found, learns)) return found ?? learns;
  await redis.pexpire(LEARNS_KEY, RUN_LASTS_ms);
  return found;
}

/** Says that a run is over, so that the next need not wait. Others of the same kind say with their next beat that they go on. */
export async function withdraw(redis: Redis, learns: Learns): Promise<void> {
  const found = await whoLearns(redis);
  if (found !== undefined && sameRun(found, learns)) await redis.del(LEARNS_KEY);
}

/** @throws MaskrouteError `conflict` when a version learns there that says it otherwise. */
export async function whoLearns(redis: Redis): Promise<Learns | undefined> {
  const text = await redis.get(LEARNS_KEY);
  if (text === null) return undefined;
  try {
    return learnsSchema.parse(JSON.parse(text));
  } catch (cause) {
    const message = `Refused: another version learns with the queue: ${text.slice(0, 300)}`;
    throw new MaskrouteError('conflict', message, { cause });
  }
}

export async function refuse(redis: Redis, reason: string): Promise<void> {
  await redis.set(REFUSAL_KEY, reason, 'PX', REFUSAL_LASTS_ms);
}

export const refusal = (redis: Redis): Promise<string | null> => redis.get(REFUSAL_KEY);

export const describeLearns = ({ work }: Learns): string => describeWork(work);

/*
 * A claim says that a unit is being computed. The queue has locks for that, but forgets them with everything else when it
 * is flushed; a claim is made again with the next beat.
 */

/** Claims a unit until it is disposed of. Waits while somebody else computes it, and gives up when that is done. */
export async function claimUnit(
  redis: Redis,
  name: string,
  worker: string,
  isDone: () => Promise<boolean>,
): Promise<Disposable | undefined> {
  const key = claimKey(name);
  while ((await redis.set(key, worker, 'PX', CLAIM_LASTS_ms, 'NX')) === null) {
    if (await isDone()) return undefined;
    await sleep(BEAT_ms / 2);
  }
  const beat = setInterval(() => {
    // While the server is away nobody else can take the unit.
    if (redis.status === 'ready') redis.set(key, worker, 'PX', CLAIM_LASTS_ms).catch(() => {});
  }, BEAT_ms);
  return {
    [Symbol.dispose]() {
      clearInterval(beat);
      if (redis.status === 'ready') redis.del(key).catch(() => {});
    },
  };
}

/** Of each unit, whether the queue has it or somebody computes it. `keyOf`: of a unit's job. */
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
