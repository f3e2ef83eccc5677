/**
 * A bounded stale-while-revalidate cache that lives in the isolate. It is what keeps D1 out of the request
 * path: a known value is answered at once and refreshed behind the request; a source that stalls or fails
 * costs nobody a second wait, and the last good value stays.
 *
 * Loads are shared between requests. Their I/O belongs to the request that began them, so that request holds
 * them with `waitUntil`, every waiter has a deadline of its own, and a load that never settles (its request
 * was torn down) is given up by age.
 */
import { LRUCache } from 'lru-cache';
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

type Options<V> = {
  readonly health?: SourceHealth | undefined;
  /** Bounds the values by bytes, too. Only a load that succeeded lets go of any: a source that is down costs none. */
  readonly room?: Room<V>;
  readonly now?: () => number;
};

type Entry<V> = { readonly value: V; readonly loadedAt_ms: number };
type Load<V> = { readonly startedAt_ms: number; result: Promise<V | null> };

export class SwrCache<V> {
  readonly #what: string;
  readonly #source: (key: string) => Promise<V | null>;
  readonly #policy: SwrPolicy;
  readonly #health: SourceHealth;
  readonly #room: Room<V> | undefined;
  readonly #now: () => number;

  readonly #entries: LRUCache<string, Entry<V>>;
  /** Until when a null of the source is remembered. */
  readonly #nullUntil_ms: LRUCache<string, number> | undefined;
  readonly #loads = new Map<string, Load<V>>();
  /** Nobody asks the source before. */
  #failedUntil_ms = 0;

  constructor(
    what: string,
    source: (key: string) => Promise<V | null>,
    policy: SwrPolicy,
    { health = unheard(), room, now = () => Date.now() }: Options<V> = {},
  ) {
    this.#what = what;
    this.#source = source;
    this.#policy = policy;
    this.#health = health;
    this.#room = room;
    this.#now = now;
    this.#entries = new LRUCache({ max: policy.entriesMax, dispose: ({ value }) => room?.remove(value) });
    const { negativeEntriesMax: max } = policy;
    this.#nullUntil_ms = max === 0 ? undefined : new LRUCache({ max });
  }

  /** What is held and is young enough to be answered as it is; undefined otherwise. What `get` gives, without a wait. */
  fresh(key: string): V | undefined {
    const entry = this.#entries.get(key);
    return entry === undefined || this.#age_ms(entry) >= this.#policy.fresh_ms ? undefined : entry.value;
  }

  /** Null: the source says that there is none. @throws what the source threw when no usable value is held. */
  async get(key: string, hold: Hold): Promise<V | null> {
    const { wait_ms, fresh_ms, revalidate_ms, stale_ms, retriesBehind } = this.#policy;
    const entry = this.#entries.get(key);
    if (entry === undefined) return this.#isNull(key) ? null : await this.#waitFor(key, wait_ms, hold);
    const age_ms = this.#age_ms(entry);
    if (age_ms < fresh_ms) return entry.value;
    const isServedAsIs = this.#isFailing() && retriesBehind === true && age_ms < stale_ms;
    if (age_ms < revalidate_ms || isServedAsIs) {
      this.#refreshBehind(key, hold);
      return entry.value;
    }
    try {
      return await this.#waitFor(key, this.#oldWait_ms(key), hold);
    } catch (error) {
      if (age_ms < stale_ms) return entry.value;
      throw error;
    }
  }

  /** What is held, however old; undefined when nothing is. */
  peek(key: string): V | undefined {
    return this.#entries.peek(key)?.value;
  }

  /** How long ago what is held was read; undefined when nothing is. */
  age_ms(key: string): number | undefined {
    const entry = this.#entries.peek(key);
    return entry && this.#age_ms(entry);
  }

  /** Whether `get` can answer without waiting for the source: a value, or a null that is remembered. */
  holds(key: string): boolean {
    return this.#entries.has(key) || this.#isNull(key);
  }

  /** Asks the source now and waits for it. @throws what the source threw. */
  async refresh(key: string, hold: Hold): Promise<V | null> {
    this.#loads.delete(key);
    return await withDeadline(this.#startLoad(key, hold), this.#policy.load_ms, this.#what);
  }

  /** Drops what is held, and what a load under way would bring. */
  forget(key: string): void {
    this.#entries.delete(key);
    this.#nullUntil_ms?.delete(key);
    this.#loads.delete(key);
  }

  /* Waiting for the source. */

  async #waitFor(key: string, wait_ms: number, hold: Hold): Promise<V | null> {
    if (this.#now() < this.#failedUntil_ms) throw new Error(`${this.#what}: failed a moment ago`);
    try {
      return await withDeadline(this.#startLoad(key, hold), wait_ms, this.#what);
    } catch (error) {
      if (error instanceof DeadlineError) this.#failed();
      throw error;
    }
  }

  /** A source that has kept this key waiting for long enough already stalls, though nobody found out yet. */
  #oldWait_ms(key: string): number {
    const { staleWait_ms, failingWait_ms = staleWait_ms } = this.#policy;
    const load = this.#running(key);
    const isStalling = load !== undefined && this.#now() - load.startedAt_ms >= staleWait_ms;
    return isStalling || this.#isFailing() ? failingWait_ms : staleWait_ms;
  }

  /**
   * Nothing is attached to a load that another request began: it would settle there when this request is long over, of
   * which workerd warns, once a request.
   */
  #refreshBehind(key: string, hold: Hold): void {
    if (this.#now() < this.#failedUntil_ms || this.#running(key) !== undefined) return;
    this.#startLoad(key, hold).catch(() => {});
  }

  #running(key: string): Load<V> | undefined {
    const load = this.#loads.get(key);
    return load === undefined || this.#isDead(load) ? undefined : load;
  }

  #startLoad(key: string, hold: Hold): Promise<V | null> {
    const { loadsMax } = this.#policy;
    const loads = this.#loads;
    const running = this.#running(key);
    if (running !== undefined) return running.result;
    if (loads.size >= loadsMax) for (const [k, load] of loads) if (this.#isDead(load)) loads.delete(k);
    if (loads.size >= loadsMax && !loads.has(key)) {
      return Promise.reject(new Error(`${this.#what}: too many loads under way`));
    }
    const load: Load<V> = { startedAt_ms: this.#now(), result: Promise.resolve(null) };
    loads.set(key, load);
    load.result = this.#run(key, load);
    hold(load.result.catch(() => {}));
    return load.result;
  }

  async #run(key: string, load: Load<V>): Promise<V | null> {
    try {
      const value = await withDeadline(this.#source(key), this.#policy.load_ms, this.#what);
      if (this.#loads.get(key) === load) this.#store(key, value);
      this.#health.failingUntil_ms = 0;
      this.#health.failingSince_ms = undefined;
      this.#failedUntil_ms = 0;
      return value;
    } catch (error) {
      this.#failed();
      throw error;
    } finally {
      if (this.#loads.get(key) === load) this.#loads.delete(key);
    }
  }

  #failed(): void {
    const now_ms = this.#now();
    this.#health.failingUntil_ms = now_ms + FAILING_ms;
    this.#health.failingSince_ms ??= now_ms;
    this.#failedUntil_ms = now_ms + this.#policy.retry_ms;
  }

  #isFailing(): boolean {
    return this.#now() < this.#health.failingUntil_ms;
  }

  #isDead(load: Load<V>): boolean {
    return this.#now() - load.startedAt_ms > this.#policy.load_ms + 1_000;
  }

  /* What is held. */

  #age_ms(entry: Entry<V>): number {
    return this.#now() - entry.loadedAt_ms;
  }

  #isNull(key: string): boolean {
    return this.#now() < (this.#nullUntil_ms?.get(key) ?? 0);
  }

  #store(key: string, value: V | null): void {
    const now_ms = this.#now();
    if (value === null) {
      this.#entries.delete(key);
      this.#nullUntil_ms?.set(key, now_ms + this.#policy.negative_ms);
      return;
    }
    this.#nullUntil_ms?.delete(key);
    this.#entries.set(key, { value, loadedAt_ms: now_ms });
    if (this.#room === undefined) return;
    this.#room.add(value);
    this.#letGo(this.#room, key);
  }

  /**
   * Lets go of what was used longest ago until the rest has room; of `newest` never. Who holds only what a younger one
   * holds, too, stays, since that frees nothing.
   */
  #letGo(room: Room<V>, newest: string): void {
    const oldest: [key: string, value: V][] = [];
    for (const [key, { value }] of this.#entries.rentries() as Generator<[string, Entry<V>]>) {
      if (room.share() <= 1 || key === newest) break;
      room.remove(value);
      oldest.push([key, value]);
    }
    for (const [key, value] of oldest) {
      const isFreeing = !room.holds(value);
      room.add(value);
      if (isFreeing) this.#entries.delete(key);
    }
  }
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
