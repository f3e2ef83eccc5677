/**
 * The ledger of one tenant's budget: the use in each window, and reservations of running requests. It is synchronous on
 * the tenant's own SQLite database, so no two requests see the same remainder.
 *
 * The minute window is a sliding window of 60 seconds, with use kept by the second; the day is a UTC day. A reservation
 * counts at the time when it was made. Settling replaces the reserved tokens by the used ones. An unsettled reservation
 * counts in full until its minute and its day are over: what was spent is not known, and if it were released, clients
 * could exceed the budget by causing that.
 */
import type { BudgetLimits } from '../db/tenant-rows.ts';

export const isUnlimited = (limits: BudgetLimits): boolean =>
  Object.values(limits).every((limit) => limit === null);

export const BUDGET_UNITS = ['requests', 'tokens'] as const;
type Unit = (typeof BUDGET_UNITS)[number];
const WINDOWS = ['minute', 'day'] as const;
type Window = (typeof WINDOWS)[number];

/** One limit and its present use. */
export type BudgetState = {
  readonly unit: Unit;
  readonly window: Window;
  readonly limit: number;
  readonly used: number;
  /** Time until its use is 0 without further requests; in a refusal: until there is room. */
  readonly resetsAfter_ms: number;
};

export type ReserveRequest = {
  /** Id of the reservation; repeating an id returns the same reservation. */
  readonly id: string;
  readonly limits: BudgetLimits;
  /** Tokens of the longest prompt and answer. */
  readonly wanted_tokens: number;
  /** Least useful number of tokens; equal to `wanted_tokens` when the answer may not be shortened. */
  readonly least_tokens: number;
};

export type ReserveAnswer =
  | { readonly granted: true; readonly tokens: number; readonly states: readonly BudgetState[] }
  | {
      readonly granted: false;
      readonly refusedBy: BudgetState;
      /** False: it would not fit into an unused window of `refusedBy` either, so a retry is useless. */
      readonly everFits: boolean;
      readonly states: readonly BudgetState[];
    };

const WINDOW_ms: Record<Window, number> = { minute: 60_000, day: 86_400_000 };
/**
 * Resolution of the minute window: a second that is partly outside still counts in full, so use is released up to a
 * second late.
 */
const SECOND_ms = 1_000;

/** Reservations are deleted after this time; later settlements have no effect. */
const KEEP_ms = 2 * WINDOW_ms.day;
/** Settled ids are kept for longer than any retry takes. */
const KEEP_SETTLED_ms = 30 * 60_000;
/** Seconds that left the minute this long ago are deleted. */
const KEEP_SECONDS_ms = WINDOW_ms.minute;

type Reservation = { second_ms: number; day_ms: number; tokens: number; settled: number };

export class Ledger {
  readonly #sql: SqlStorage;

  constructor(sql: SqlStorage) {
    this.#sql = sql;
    sql.exec(`CREATE TABLE IF NOT EXISTS windows (
      window TEXT NOT NULL, start_ms INTEGER NOT NULL, requests INTEGER NOT NULL, tokens INTEGER NOT NULL,
      PRIMARY KEY (window, start_ms)) WITHOUT ROWID`);
    sql.exec(`CREATE TABLE IF NOT EXISTS reservations (
      id TEXT PRIMARY KEY, second_ms INTEGER NOT NULL, day_ms INTEGER NOT NULL, tokens INTEGER NOT NULL,
      settled INTEGER NOT NULL) WITHOUT ROWID`);
  }

  states(limits: BudgetLimits, now_ms: number): BudgetState[] {
    return statesOf(this.#counters(limits, now_ms), now_ms);
  }

  reserve({ id, limits, wanted_tokens, least_tokens }: ReserveRequest, now_ms: number): ReserveAnswer {
    const known = this.#find(id);
    const counters = this.#counters(limits, now_ms);
    if (known !== undefined) {
      return { granted: true, tokens: known.tokens, states: statesOf(counters, now_ms) };
    }
    // A limit that never has room is named before any that is only used up: waiting for that would be useless.
    const tooSmall = counters.filter((counter) => counter.limit < needOf(counter, least_tokens));
    const everFits = tooSmall.length === 0;
    const refusedBy = this.#tightest(everFits ? counters : tooSmall, least_tokens, now_ms);
    if (refusedBy !== undefined) {
      return { granted: false, refusedBy, everFits, states: statesOf(counters, now_ms) };
    }
    const tokens = Math.min(wanted_tokens, ...counters.filter(isOfTokens).map(remaining));
    const start = startsAt(now_ms);
    if (!this.#hasUseThisMinute(now_ms)) this.#forgetOld(now_ms);
    this.#add('minute', start.second_ms, 1, tokens);
    this.#add('day', start.day_ms, 1, tokens);
    this.#keep(id, { ...start, tokens, settled: 0 });
    const after = counters.map((counter) => withRequest(counter, tokens, now_ms));
    return { granted: true, tokens, states: statesOf(after, now_ms) };
  }

  /**
   * Settles a reservation with the tokens that were used; repeating it changes nothing. For an unknown id it only
   * records that it is settled: a delayed reservation that arrives later does not count.
   */
  settle(id: string, tokens: number, now_ms: number): void {
    const reservation = this.#find(id);
    if (reservation === undefined) {
      this.#keep(id, { ...startsAt(now_ms), tokens: 0, settled: 1 });
    } else if (reservation.settled === 0) {
      this.#add('minute', reservation.second_ms, 0, tokens - reservation.tokens);
      this.#add('day', reservation.day_ms, 0, tokens - reservation.tokens);
      this.#sql.exec('UPDATE reservations SET tokens = ?, settled = 1 WHERE id = ?', tokens, id);
    }
  }

  #find(id: string): Reservation | undefined {
    const sql = 'SELECT second_ms, day_ms, tokens, settled FROM reservations WHERE id = ?';
    return this.#sql.exec<Reservation>(sql, id).toArray()[0];
  }

  #keep(id: string, { second_ms, day_ms, tokens, settled }: Reservation): void {
    const sql = 'INSERT INTO reservations (id, second_ms, day_ms, tokens, settled) VALUES (?, ?, ?, ?, ?)';
    this.#sql.exec(sql, id, second_ms, day_ms, tokens, settled);
  }

  #add(window: Window, start_ms: number, requests: number, tokens: number): void {
    const sql = `INSERT INTO windows VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE
      SET requests = requests + excluded.requests, tokens = tokens + excluded.tokens`;
    this.#sql.exec(sql, window, start_ms, requests, tokens);
  }

  #counters(limits: BudgetLimits, now_ms: number): Counter[] {
    return WINDOWS.flatMap((window) => {
      const named = BUDGET_UNITS.map((unit) => ({ unit, limit: limitOf(limits, unit, window) }));
      if (named.every(({ limit }) => limit === null)) return [];
      const used = this.#used(window, now_ms);
      return named.flatMap(({ unit, limit }) =>
        limit === null
          ? []
          : [{ unit, window, limit, used: used[unit], lastStart_ms: used[`${unit}Last_ms`] }],
      );
    });
  }

  #used(window: Window, now_ms: number): Used {
    const sql = `SELECT total(requests) AS requests, total(tokens) AS tokens,
        max(CASE WHEN requests > 0 THEN start_ms END) AS requestsLast_ms,
        max(CASE WHEN tokens > 0 THEN start_ms END) AS tokensLast_ms
      FROM windows WHERE window = ? AND start_ms BETWEEN ? AND ?`;
    return this.#sql.exec<Used>(sql, window, ...startsThatCount(window, now_ms)).one();
  }

  /** Of the limits without room for another request of `tokens`, the one that has room last. */
  #tightest(counters: readonly Counter[], tokens: number, now_ms: number): BudgetState | undefined {
    return counters
      .filter((counter) => remaining(counter) < needOf(counter, tokens))
      .map((counter) => ({
        ...stateOf(counter, now_ms),
        resetsAfter_ms: this.#roomAfter_ms(counter, needOf(counter, tokens), now_ms),
      }))
      .sort((a, b) => b.resetsAfter_ms - a.resetsAfter_ms)[0];
  }

  /** Time until there is room for `need`, without further requests. */
  #roomAfter_ms({ unit, window, limit, used }: Counter, need: number, now_ms: number): number {
    const sql =
      'SELECT start_ms, requests, tokens FROM windows WHERE window = ? AND start_ms BETWEEN ? AND ? ORDER BY start_ms';
    const buckets = this.#sql.exec<Bucket>(sql, window, ...startsThatCount(window, now_ms)).toArray();
    let missing = need - (limit - used);
    let after_ms = 0;
    for (const bucket of buckets) {
      if (missing <= 0) break;
      missing -= bucket[unit];
      after_ms = leavesAt_ms(window, bucket.start_ms) - now_ms;
    }
    return after_ms;
  }

  #hasUseThisMinute(now_ms: number): boolean {
    const start_ms = now_ms - (now_ms % WINDOW_ms.minute);
    const sql = "SELECT 1 FROM windows WHERE window = 'minute' AND start_ms BETWEEN ? AND ? LIMIT 1";
    return this.#sql.exec(sql, start_ms, now_ms).toArray().length > 0;
  }

  #forgetOld(now_ms: number): void {
    const second_ms = firstStart('minute', now_ms) - KEEP_SECONDS_ms;
    this.#sql.exec("DELETE FROM windows WHERE window = 'minute' AND start_ms < ?", second_ms);
    this.#sql.exec("DELETE FROM windows WHERE window = 'day' AND start_ms < ?", now_ms - KEEP_ms);
    this.#sql.exec('DELETE FROM reservations WHERE second_ms < ?', now_ms - KEEP_ms);
    const settled_ms = now_ms - KEEP_SETTLED_ms;
    this.#sql.exec('DELETE FROM reservations WHERE settled = 1 AND second_ms < ?', settled_ms);
  }
}

/* Pure arithmetic on the ledger: how much remains, and when there is more. */

/** The use in a second or a day. */
type Bucket = Record<Unit, number> & { start_ms: number };

/** A window's use, with the start of the last bucket with use, for each unit. */
type Used = Record<Unit, number> & Record<`${Unit}Last_ms`, number | null>;

/** One limit with its use, and the start of the last bucket with use. */
type Counter = Omit<BudgetState, 'resetsAfter_ms'> & { readonly lastStart_ms: number | null };

const limitOf = (limits: BudgetLimits, unit: Unit, window: Window): number | null =>
  unit === 'requests'
    ? limits[window === 'minute' ? 'requestsPerMinute' : 'requestsPerDay']
    : limits[window === 'minute' ? 'tokensPerMinute' : 'tokensPerDay'];

/** The starts of a moment's second and day. */
const startsAt = (now_ms: number) => ({
  second_ms: now_ms - (now_ms % SECOND_ms),
  day_ms: now_ms - (now_ms % WINDOW_ms.day),
});

/** Start of the oldest bucket that counts: the second one minute ago, or today. */
const firstStart = (window: Window, now_ms: number): number =>
  window === 'minute' ? startsAt(now_ms - WINDOW_ms.minute).second_ms : startsAt(now_ms).day_ms;

/**
 * The first and the last start of the buckets that count. Buckets that start later were written before the clock was set
 * back; they would count until it has caught up. Up to one window ahead they do count, since a clock may be off by a little.
 */
const startsThatCount = (window: Window, now_ms: number): [first_ms: number, last_ms: number] => [
  firstStart(window, now_ms),
  now_ms + WINDOW_ms[window],
];

/** When a bucket stops counting. */
const leavesAt_ms = (window: Window, start_ms: number): number =>
  start_ms + WINDOW_ms[window] + (window === 'minute' ? SECOND_ms : 0);

const remaining = ({ limit, used }: Counter): number => Math.max(0, limit - used);
const isOfTokens = ({ unit }: Counter): boolean => unit === 'tokens';
const needOf = (counter: Counter, tokens: number): number => (isOfTokens(counter) ? tokens : 1);

/** The counter after another request of `tokens`. */
const withRequest = (counter: Counter, tokens: number, now_ms: number): Counter => ({
  ...counter,
  used: counter.used + needOf(counter, tokens),
  lastStart_ms: startsAt(now_ms)[counter.window === 'minute' ? 'second_ms' : 'day_ms'],
});

const stateOf = ({ lastStart_ms, ...counter }: Counter, now_ms: number): BudgetState => ({
  ...counter,
  resetsAfter_ms: lastStart_ms === null ? 0 : leavesAt_ms(counter.window, lastStart_ms) - now_ms,
});

const statesOf = (counters: readonly Counter[], now_ms: number): BudgetState[] =>
  counters.map((counter) => stateOf(counter, now_ms));
