/**
 * A bounded stale-while-revalidate cache in the isolate. It keeps D1 out of the request path: a cached value is
 * returned at once and refreshed in the background. While a source stalls or fails, no request waits twice, and the
 * last good value stays.
 *
 * Requests share loads. A load's I/O belongs to the request that started it, so that request keeps it alive with
 * `waitUntil`, every waiter has its own deadline, and a load that never settles (its request was torn down) is
 * abandoned by age.
 */
import { LRUCache } from 'lru-cache';
import { DeadlineError, type Hold, steadyNow_ms, withDeadline } from './waiting.ts';

export type SwrPolicy = {
  /** Younger values are returned without asking the source. */
  readonly fresh_ms: number;
  /** Older values are returned only after asking the source again (or failing to). */
  readonly revalidate_ms: number;
  /** Older values are never returned, even when the source can't be reached. */
  readonly stale_ms: number;
  /** How long a source's null is remembered. */
  readonly negative_ms: number;
  /** Longest wait of a request without a cached value. */
  readonly wait_ms: number;
  /** Longest wait of a request with an old cached value: as long as a working source may take. */
  readonly staleWait_ms: number;
  /** The same while the source is known to fail or stall; absent: the same limit. */
  readonly failingWait_ms?: number;
  /** Longest duration of a load, whether a request waits or not. */
  readonly load_ms: number;
  /** After a failure the source is not asked for this long. */
  readonly retry_ms: number;
  /** After a failure, no request with an old cached value waits: the source is asked in the background. */
  readonly retriesBehind?: boolean;
  readonly entriesMax: number;
};

/** Most remembered nulls: clients can ask for any key. */
const NULLS_MAX = 1_000;
/** Most loads at the same time: while a source stalls, each new key would start another one. */
export const LOADS_MAX = 64;

/** A failure counts for this long: an isolate may have slept, and older results say nothing about the source now. */
const FAILING_ms = 60_000;

/**
 * The health of a source. Caches with the same source share it, so that a request that has waited in vain does not wait
 * again in the next cache.
 */
export type SourceHealth = {
  /** Until this time the source counts as failing: its last result is a recent failure or timeout. */
  failingUntil_ms: number;
  /** Time of the first failure since the last success; undefined if there is none. */
  failingSince_ms: number | undefined;
};
export const unheard = (): SourceHealth => ({ failingUntil_ms: 0, failingSince_ms: undefined });

type Options<V> = {
  readonly health?: SourceHealth | undefined;
  /** Also bounds the values by bytes. Only a successful load evicts values, so a failing source evicts none. */
  readonly room?: Room<V>;
  /** A clock that never goes back, the same for all caches with this health. */
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
  /** Until when a null from the source is cached. */
  readonly #nullUntil_ms = new LRUCache<string, number>({ max: NULLS_MAX });
  readonly #loads = new Map<string, Load<V>>();
  /** The source is not asked before this time. */
  #failedUntil_ms = 0;

  constructor(
    what: string,
    source: (key: string) => Promise<V | null>,
    policy: SwrPolicy,
    { health = unheard(), room, now = steadyNow_ms }: Options<V> = {},
  ) {
    this.#what = what;
    this.#source = source;
    this.#policy = policy;
    this.#health = health;
    this.#room = room;
    this.#now = now;
    this.#entries = new LRUCache({ max: policy.entriesMax, dispose: ({ value }) => room?.remove(value) });
  }

  /** The value; null: the source has none. @throws what the source threw when there is no usable cached value. */
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

  /** The cached value, however old; undefined if there is none. */
  peek(key: string): V | undefined {
    return this.#entries.peek(key)?.value;
  }

  /** Age of the cached value; undefined if there is none. */
  age_ms(key: string): number | undefined {
    const entry = this.#entries.peek(key);
    return entry && this.#age_ms(entry);
  }

  /** Whether `get` can answer without waiting for the source: with a value or a cached null. */
  holds(key: string): boolean {
    return this.#entries.has(key) || this.#isNull(key);
  }

  /** Asks the source now and waits for it. @throws what the source threw. */
  async refresh(key: string, hold: Hold): Promise<V | null> {
    this.#loads.delete(key);
    return await withDeadline(this.#startLoad(key, hold), this.#policy.load_ms, this.#what);
  }

  /** Drops the cached value, and the result of a running load. */
  forget(key: string): void {
    this.#entries.delete(key);
    this.#nullUntil_ms.delete(key);
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

  /** The wait with an old value: shorter if a running load of this key shows that the source stalls. */
  #oldWait_ms(key: string): number {
    const { staleWait_ms, failingWait_ms = staleWait_ms } = this.#policy;
    const load = this.#running(key);
    const isStalling = load !== undefined && this.#now() - load.startedAt_ms >= staleWait_ms;
    return isStalling || this.#isFailing() ? failingWait_ms : staleWait_ms;
  }

  /**
   * Never awaits a load that another request started: it could settle after this request is over, for which workerd
   * logs a warning.
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
    const loads = this.#loads;
    const running = this.#running(key);
    if (running !== undefined) return running.result;
    if (loads.size >= LOADS_MAX) for (const [k, load] of loads) if (this.#isDead(load)) loads.delete(k);
    if (loads.size >= LOADS_MAX && !loads.has(key)) {
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

  /* Cached values. */

  #age_ms(entry: Entry<V>): number {
    return this.#now() - entry.loadedAt_ms;
  }

  #isNull(key: string): boolean {
    return this.#now() < (this.#nullUntil_ms.get(key) ?? 0);
  }

  #store(key: string, value: V | null): void {
    const now_ms = this.#now();
    if (value === null) {
      this.#entries.delete(key);
      this.#nullUntil_ms.set(key, now_ms + this.#policy.negative_ms);
      return;
    }
    this.#nullUntil_ms.delete(key);
    this.#entries.set(key, { value, loadedAt_ms: now_ms });
    if (this.#room === undefined) return;
    this.#room.add(value);
    this.#letGo(this.#room, key);
  }

  /**
   * Evicts the least recently used values until the others fit, but never `newest`. A value whose parts are all shared
   * with newer ones stays, since evicting it frees nothing.
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

/* A limit on the bytes of a cache's values together; a part that several values share counts once. */

export interface Room<V> {
  add(value: V): void;
  remove(value: V): void;
  /** Whether all parts of the value are also held by others, so that it frees no room. */
  holds(value: V): boolean;
  /** Used share of the limit; 1: full. */
  share(): number;
}

/** `partsOf`: the parts of a value. Equal parts (by identity) count once. */
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
