/**
 * A bounded stale-while-revalidate cache that lives in the isolate. It is what keeps D1 out of the request
 * path: a known value is answered at once and refreshed behind the request; a source that stalls or fails
 * costs nobody a second wait, and the last good value stays.
 *
 * Loads are shared between requests. Their I/O belongs to the request that began them, so that request holds
 * them with `waitUntil`, every waiter has a deadline of its own, and a load that never settles (its request
 * was torn down) is given up by age.
 */
import { DeadlineError, type Hold, withDeadline } from './waiting.ts';

export type SwrPolicy = {
  /** Younger values are answered without asking the source. */
  readonly fresh_ms: number;
  /** Older values are answered only after the source was asked again (or could not be reached). */
  readonly revalidate_ms: number;
  /** Older values are not answered even when the source can't be reached. */
  readonly stale_ms: number;
  /** How long a source's null is remembered. */
  readonly negative_ms: number;
  /** The longest that a request waits when nothing is held. */
  readonly wait_ms: number;
  /** The longest that a request waits when an old value is held: as long as a source that works may well take. */
  readonly staleWait_ms: number;
  /** The same while the source is known to fail or to stall; absent: no shorter. */
  readonly failingWait_ms?: number;
  /** The longest that a load may take, waited for or not. */
  readonly load_ms: number;
  /** After a failure, nobody asks the source again for this long. */
  readonly retry_ms: number;
  /** After a failure, nobody waits while an old value is held: the source is asked again behind a request. */
  readonly retriesBehind?: boolean;
  readonly entriesMax: number;
  readonly negativeEntriesMax: number;
  readonly loadsMax: number;
};

export interface SwrCache<V> {
  /** What is held and is young enough to be answered as it is; undefined otherwise. What `get` gives, without a wait. */
  fresh(key: string): V | undefined;
  /** Null: the source says that there is none. @throws what the source threw when no usable value is held. */
  get(key: string, hold: Hold): Promise<V | null>;
  /** What is held, however old; undefined when nothing is. */
  peek(key: string): V | undefined;
  /** How long ago what is held was read; undefined when nothing is. */
  age_ms(key: string): number | undefined;
  /** Whether `get` can answer without waiting for the source: a value, or a null that is remembered. */
  holds(key: string): boolean;
  /** Asks the source now and waits for it. @throws what the source threw. */
  refresh(key: string, hold: Hold): Promise<V | null>;
  /** Drops what is held, and what a load under way would bring. */
  forget(key: string): void;
}

/** An isolate may sleep: what it heard of a source longer ago says nothing about it now. */
const FAILING_ms = 60_000;

/**
 * What was heard of a source. Caches that ask the same one share it, so that a request which waited for it in vain does
 * not do so again for the next thing.
 */
export type SourceHealth = {
  /** Until then the last that was heard is a failure, or a wait in vain, and not too long ago. */
  failingUntil_ms: number;
  /** When the first of the failures was that no success has followed; undefined while there is none. */
  failingSince_ms: number | undefined;
};
export const unheard = (): SourceHealth => ({ failingUntil_ms: 0, failingSince_ms: undefined });

type Entry<V> = { readonly value: V; readonly loadedAt_ms: number };
type Load<V> = { readonly startedAt_ms: number; readonly result: Promise<V | null> };

/** With `room` values are bounded by bytes, too. Only a load that succeeded lets go of any: a source that is down costs none. */
export function createSwrCache<V>(
  what: string,
  source: (key: string) => Promise<V | null>,
  policy: SwrPolicy,
  health: SourceHealth = unheard(),
  room?: Room<V>,
  now: () => number = () => Date.now(),
): SwrCache<V> {
  const entries = new Map<string, Entry<V>>();
  const negativeUntil_ms = new Map<string, number>();
  const loads = new Map<string, Load<V>>();
  let failedUntil_ms = 0;
  const failed = (): void => {
    health.failingUntil_ms = now() + FAILING_ms;
    health.failingSince_ms ??= now();
    failedUntil_ms = now() + policy.retry_ms;
  };

  /** Who goes first matters only where some will soon have to. */
  let isTight = false;
  const drop = (key: string): void => {
    const entry = entries.get(key);
    if (entry === undefined) return;
    entries.delete(key);
    room?.remove(entry.value);
  };

  const store = (key: string, value: V | null): void => {
    drop(key);
    negativeUntil_ms.delete(key);
    if (value === null) {
      setBounded(negativeUntil_ms, key, now() + policy.negative_ms, policy.negativeEntriesMax);
      return;
    }
    while (entries.size >= policy.entriesMax) drop(firstKey(entries));
    entries.set(key, { value, loadedAt_ms: now() });
    room?.add(value);
    if (room !== undefined) letGo(entries, room, key);
    isTight = entries.size > policy.entriesMax / 2 || (room?.share() ?? 0) > 1 / 2;
  };

  const startLoad = (key: string, hold: Hold): Promise<V | null> => {
    const running = loads.get(key);
    if (running !== undefined && !isDead(running)) return running.result;
    if (loads.size >= policy.loadsMax) for (const [k, load] of loads) if (isDead(load)) loads.delete(k);
    if (loads.size >= policy.loadsMax && !loads.has(key)) {
      return Promise.reject(new Error(`${what}: too many loads under way`));
    }
    const load: Load<V> = { startedAt_ms: now(), result: run() };
    async function run(): Promise<V | null> {
      // The first await is before `loads.set`, so that `load` is there whenever this goes on.
      await null;
      try {
        const value = await withDeadline(source(key), policy.load_ms, what);
        if (loads.get(key) === load) store(key, value);
        health.failingUntil_ms = 0;
        health.failingSince_ms = undefined;
        failedUntil_ms = 0;
        return value;
      } catch (error) {
        failed();
        throw error;
      } finally {
        if (loads.get(key) === load) loads.delete(key);
      }
    }
    loads.set(key, load);
    hold(load.result.catch(() => {}));
    return load.result;
  };

  const isDead = (load: Load<V>): boolean => now() - load.startedAt_ms > policy.load_ms + 1_000;

  const waitFor = async (key: string, wait_ms: number, hold: Hold): Promise<V | null> => {
    if (now() < failedUntil_ms) throw new Error(`${what}: failed a moment ago`);
    try {
      return await withDeadline(startLoad(key, hold), wait_ms, what);
    } catch (error) {
      if (error instanceof DeadlineError) failed();
      throw error;
    }
  };

  /** A source that has kept this key waiting for long enough already stalls, though nobody found out yet. */
  const oldWait_ms = (key: string): number => {
    const { staleWait_ms, failingWait_ms = staleWait_ms } = policy;
    const load = loads.get(key);
    const isStalling = load !== undefined && !isDead(load) && now() - load.startedAt_ms >= staleWait_ms;
    return isStalling || now() < health.failingUntil_ms ? failingWait_ms : staleWait_ms;
  };

  return {
    fresh(key) {
      const entry = entries.get(key);
      if (entry === undefined || now() - entry.loadedAt_ms >= policy.fresh_ms) return undefined;
      if (isTight) touch(entries, key, entry);
      return entry.value;
    },
    async get(key, hold) {
      const entry = entries.get(key);
      if (entry === undefined) {
        return now() < (negativeUntil_ms.get(key) ?? 0) ? null : await waitFor(key, policy.wait_ms, hold);
      }
      if (isTight) touch(entries, key, entry);
      const age_ms = now() - entry.loadedAt_ms;
      if (age_ms < policy.fresh_ms) return entry.value;
      const isServedAsIs =
        now() < health.failingUntil_ms && policy.retriesBehind === true && age_ms < policy.stale_ms;
      if (age_ms < policy.revalidate_ms || isServedAsIs) {
        if (now() >= failedUntil_ms) startLoad(key, hold).catch(() => {});
        return entry.value;
      }
      try {
        return await waitFor(key, oldWait_ms(key), hold);
      } catch (error) {
        if (age_ms < policy.stale_ms) return entry.value;
        throw error;
      }
    },
    peek: (key) => entries.get(key)?.value,
    age_ms(key) {
      const entry = entries.get(key);
      return entry === undefined ? undefined : now() - entry.loadedAt_ms;
    },
    holds: (key) => entries.has(key) || now() < (negativeUntil_ms.get(key) ?? 0),
    async refresh(key, hold) {
      loads.delete(key);
      return await withDeadline(startLoad(key, hold), policy.load_ms, what);
    },
    forget(key) {
      drop(key);
      negativeUntil_ms.delete(key);
      loads.delete(key);
    },
  };
}

/** Moves an entry to the young end: a Map keeps the order of insertion, so the first key is the oldest used. */
function touch<T>(map: Map<string, T>, key: string, value: T): void {
  map.delete(key);
  map.set(key, value);
}

/**
 * Lets go of what was used longest ago until the rest has room; of `newest` never. Who holds only what a younger one
 * holds, too, stays, since that frees nothing.
 */
function letGo<V>(entries: Map<string, Entry<V>>, room: Room<V>, newest: string): void {
  const oldest: [key: string, value: V][] = [];
  for (const [key, { value }] of entries) {
    if (room.share() <= 1 || key === newest) break;
    room.remove(value);
    oldest.push([key, value]);
  }
  for (const [key, value] of oldest) {
    if (room.holds(value)) room.add(value);
    else entries.delete(key);
  }
}

const firstKey = <T>(map: Map<string, T>): string => map.keys().next().value!;

function setBounded<T>(map: Map<string, T>, key: string, value: T, entriesMax: number): void {
  if (entriesMax === 0) return;
  while (map.size >= entriesMax) map.delete(firstKey(map));
  map.set(key, value);
}

/* A bound on the bytes that a cache's values hold together, where what several of them hold lies in memory once. */

export interface Room<V> {
  add(value: V): void;
  remove(value: V): void;
  /** Whether all that the value holds is held anyway, so that it takes no room and frees none. */
  holds(value: V): boolean;
  /** Of the bound: 1 is full. */
  share(): number;
}

/** `partsOf` says what a value holds. The same part, by identity, counts once. */
export function createRoom<V, P>(
  bytesMax: number,
  partsOf: (value: V) => readonly P[],
  bytesOf: (part: P) => number,
): Room<V> {
  const holders = new Map<P, number>();
  let bytes = 0;
  return {
    add(value) {
      for (const part of partsOf(value)) {
        const count = holders.get(part) ?? 0;
        if (count === 0) bytes += bytesOf(part);
        holders.set(part, count + 1);
      }
    },
    remove(value) {
      for (const part of partsOf(value)) {
        const count = holders.get(part) ?? 0;
        if (count > 1) holders.set(part, count - 1);
        else if (holders.delete(part)) bytes -= bytesOf(part);
      }
    },
    holds: (value) => partsOf(value).every((part) => holders.has(part)),
    share: () => bytes / bytesMax,
  };
}
