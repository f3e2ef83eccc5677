/**
 * The books of one tenant: what was used of each window, and what is reserved for requests under way. All of
 * it is synchronous on the object's own SQLite, so that no two requests ever see the same remainder.
 *
 * What is used is kept by the second (`minute`) and by the day; a minute's use is the sum of its seconds. A reservation
 * counts where it was made. Settling it replaces what was reserved by what was used. One that nobody settles counts in
 * full until its windows are over (a minute; the day): whoever worked on the request is gone, nobody knows what was
 * spent, and a budget that gave it back could be passed by whoever makes that happen.
 */
import {
  BUCKET_ms,
  BUDGET_UNITS,
  BUDGET_WINDOWS,
  type BudgetLimits,
  type BudgetState,
  type BudgetUnit,
  type BudgetWindow,
  limitOf,
  type ReserveAnswer,
  type ReserveRequest,
  WINDOW_ms,
} from './budgets.ts';

/* What a ledger's figures mean for a request: how much is left, and when there is more. Pure arithmetic. */

/** A second or a day, with what was used in it. */
type Bucket = Record<BudgetUnit, number> & { start_ms: number };

/** One limit, with what is used of it and when the last bucket begins that something of it was used in. */
type Counter = Omit<BudgetState, 'resetsAfter_ms'> & { readonly lastStart_ms: number | null };

const secondOf = (now_ms: number): number => now_ms - (now_ms % BUCKET_ms);
const minuteOf = (now_ms: number): number => now_ms - (now_ms % WINDOW_ms.minute);
/** Where the oldest bucket begins that counts: the second that holds the moment a minute ago, or today. */
const firstStart = (window: BudgetWindow, now_ms: number): number =>
  window === 'minute' ? secondOf(now_ms - WINDOW_ms.minute) : now_ms - (now_ms % WINDOW_ms.day);

/** When a bucket counts no longer. */
const leavesAt_ms = (window: BudgetWindow, start_ms: number): number =>
  start_ms + WINDOW_ms[window] + (window === 'minute' ? BUCKET_ms : 0);

const remaining = ({ limit, used }: Counter): number => Math.max(0, limit - used);
const isOfTokens = ({ unit }: Counter): boolean => unit === 'tokens';
const needOf = (counter: Counter, tokens: number): number => (isOfTokens(counter) ? tokens : 1);

/** The same after one more request of `tokens`. */
const withRequest = (counter: Counter, tokens: number, now_ms: number): Counter => ({
  ...counter,
  used: counter.used + needOf(counter, tokens),
  lastStart_ms: counter.window === 'minute' ? secondOf(now_ms) : firstStart('day', now_ms),
});

const stateOf = ({ lastStart_ms, ...counter }: Counter, now_ms: number): BudgetState => ({
  ...counter,
  resetsAfter_ms: lastStart_ms === null ? 0 : leavesAt_ms(counter.window, lastStart_ms) - now_ms,
});

/** How long until there is room for `need`, if nothing is asked meanwhile. `buckets`: the oldest first. */
function roomAfter_ms(
  { unit, window, limit, used }: Counter,
  need: number,
  buckets: readonly Bucket[],
  now_ms: number,
): number {
  let missing = need - (limit - used);
  let after_ms = 0;
  for (const bucket of buckets) {
    if (missing <= 0) break;
    missing -= bucket[unit];
    after_ms = leavesAt_ms(window, bucket.start_ms) - now_ms;
  }
  return after_ms;
}

/** Of the limits that have no room for one more request of `tokens`, the one that takes longest to have it. */
const tightest = (
  counters: readonly Counter[],
  tokens: number,
  now_ms: number,
  bucketsOf: (window: BudgetWindow) => readonly Bucket[],
): BudgetState | undefined =>
  counters
    .filter((counter) => remaining(counter) < needOf(counter, tokens))
    .map((counter) => {
      const need = needOf(counter, tokens);
      const resetsAfter_ms = roomAfter_ms(counter, need, bucketsOf(counter.window), now_ms);
      return { ...stateOf(counter, now_ms), resetsAfter_ms };
    })
    .sort((a, b) => b.resetsAfter_ms - a.resetsAfter_ms)[0];

/** Whether a request of `tokens` would fit if nothing were used. */
const fitsUnused = (counters: readonly Counter[], tokens: number): boolean =>
  counters.every((counter) => counter.limit >= needOf(counter, tokens));

/** Settlements that come later than this are lost. */
const KEEP_ms = 2 * WINDOW_ms.day;
/** Longer than anybody asks the same again. */
const KEEP_SETTLED_ms = 30 * 60_000;
/** Seconds that left the minute this long ago are deleted. */
const KEEP_SECONDS_ms = WINDOW_ms.minute;

export interface Ledger {
  reserve(request: ReserveRequest, now_ms: number): ReserveAnswer;
  /**
   * What was really used. Again it changes nothing. For an id that is not there it only keeps that it is settled: a
   * reservation that comes after that, late on its way, weighs nothing.
   */
  settle(id: string, tokens: number, now_ms: number): void;
  states(limits: BudgetLimits, now_ms: number): BudgetState[];
}

/** `minute_ms` is the second in which it was made. */
type Reservation = { minute_ms: number; day_ms: number; tokens: number; settled: number };
/** Of a window, with the start of the last bucket that counts for each unit. */
type Used = {
  requests: number;
  tokens: number;
  requestsLast_ms: number | null;
  tokensLast_ms: number | null;
};

export function openLedger(sql: SqlStorage): Ledger {
  sql.exec(`CREATE TABLE IF NOT EXISTS windows (
    window TEXT NOT NULL, start_ms INTEGER NOT NULL, requests INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (window, start_ms)) WITHOUT ROWID`);
  // `prompt_tokens` and `expires_at_ms` are columns of earlier releases, which objects still have.
  sql.exec(`CREATE TABLE IF NOT EXISTS reservations (
    id TEXT PRIMARY KEY, minute_ms INTEGER NOT NULL, day_ms INTEGER NOT NULL, tokens INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, expires_at_ms INTEGER, settled INTEGER NOT NULL) WITHOUT ROWID`);
  sql.exec('DROP INDEX IF EXISTS held');

  const usedIn = (window: BudgetWindow, now_ms: number): Used =>
    sql
      .exec<Used>(
        `SELECT total(requests) AS requests, total(tokens) AS tokens,
           max(CASE WHEN requests > 0 THEN start_ms END) AS requestsLast_ms,
           max(CASE WHEN tokens > 0 THEN start_ms END) AS tokensLast_ms
         FROM windows WHERE window = ? AND start_ms >= ?`,
        window,
        firstStart(window, now_ms),
      )
      .one();

  /** The oldest first. */
  const bucketsOf = (window: BudgetWindow, now_ms: number): Bucket[] =>
    sql
      .exec<Bucket>(
        'SELECT start_ms, requests, tokens FROM windows WHERE window = ? AND start_ms >= ? ORDER BY start_ms',
        window,
        firstStart(window, now_ms),
      )
      .toArray();

  const seenSince = (start_ms: number): boolean =>
    sql.exec("SELECT 1 FROM windows WHERE window = 'minute' AND start_ms >= ? LIMIT 1", start_ms).toArray()
      .length > 0;

  const add = (window: BudgetWindow, start_ms: number, requests: number, tokens: number): void => {
    sql.exec(
      `INSERT INTO windows VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE
       SET requests = requests + excluded.requests, tokens = tokens + excluded.tokens`,
      window,
      start_ms,
      requests,
      tokens,
    );
  };

  /** Makes a reservation weigh `tokens` from now on, in the windows that it was made in. */
  const reweigh = (reservation: Reservation, tokens: number): void => {
    for (const window of BUDGET_WINDOWS) {
      const start_ms = window === 'minute' ? reservation.minute_ms : reservation.day_ms;
      add(window, start_ms, 0, tokens - reservation.tokens);
    }
  };

  const find = (id: string): Reservation | undefined =>
    sql
      .exec<Reservation>('SELECT minute_ms, day_ms, tokens, settled FROM reservations WHERE id = ?', id)
      .toArray()[0];

  const keep = (id: string, { minute_ms, day_ms, tokens, settled }: Reservation): void => {
    sql.exec(
      'INSERT INTO reservations (id, minute_ms, day_ms, tokens, prompt_tokens, settled) VALUES (?, ?, ?, ?, 0, ?)',
      ...[id, minute_ms, day_ms, tokens, settled],
    );
  };

  const forgetOld = (now_ms: number): void => {
    const second_ms = firstStart('minute', now_ms) - KEEP_SECONDS_ms;
    sql.exec("DELETE FROM windows WHERE window = 'minute' AND start_ms < ?", second_ms);
    sql.exec("DELETE FROM windows WHERE window = 'day' AND start_ms < ?", now_ms - KEEP_ms);
    sql.exec('DELETE FROM reservations WHERE minute_ms < ?', now_ms - KEEP_ms);
    sql.exec('DELETE FROM reservations WHERE settled = 1 AND minute_ms < ?', now_ms - KEEP_SETTLED_ms);
  };

  const countersOf = (limits: BudgetLimits, now_ms: number): Counter[] =>
    BUDGET_WINDOWS.flatMap((window) => {
      const named = BUDGET_UNITS.map((unit) => ({ unit, limit: limitOf(limits, unit, window) }));
      if (named.every(({ limit }) => limit === null)) return [];
      const used = usedIn(window, now_ms);
      return named.flatMap(({ unit, limit }) =>
        limit === null
          ? []
          : [{ unit, window, limit, used: used[unit], lastStart_ms: used[`${unit}Last_ms`] }],
      );
    });
  const statesOf = (counters: readonly Counter[], now_ms: number): BudgetState[] =>
    counters.map((counter) => stateOf(counter, now_ms));

  return {
    states(limits, now_ms) {
      return statesOf(countersOf(limits, now_ms), now_ms);
    },
    reserve({ id, limits, wanted_tokens, least_tokens }, now_ms) {
      const known = find(id);
      const counters = countersOf(limits, now_ms);
      if (known !== undefined) {
        return { granted: true, tokens: known.tokens, states: statesOf(counters, now_ms) };
      }
      const refusedBy = tightest(counters, least_tokens, now_ms, (window) => bucketsOf(window, now_ms));
      if (refusedBy !== undefined) {
        const everFits = fitsUnused(counters, least_tokens);
        return { granted: false, refusedBy, everFits, states: statesOf(counters, now_ms) };
      }
      const tokens = Math.min(wanted_tokens, ...counters.filter(isOfTokens).map(remaining));
      const [minute_ms, day_ms] = [secondOf(now_ms), firstStart('day', now_ms)];
      if (!seenSince(minuteOf(now_ms))) forgetOld(now_ms);
      add('minute', minute_ms, 1, tokens);
      add('day', day_ms, 1, tokens);
      keep(id, { minute_ms, day_ms, tokens, settled: 0 });
      const after = counters.map((counter) => withRequest(counter, tokens, now_ms));
      return { granted: true, tokens, states: statesOf(after, now_ms) };
    },
    settle(id, tokens, now_ms) {
      const reservation = find(id);
      if (reservation === undefined) {
        const [minute_ms, day_ms] = [secondOf(now_ms), firstStart('day', now_ms)];
        keep(id, { minute_ms, day_ms, tokens: 0, settled: 1 });
      } else if (reservation.settled === 0) {
        reweigh(reservation, tokens);
        sql.exec('UPDATE reservations SET tokens = ?, settled = 1 WHERE id = ?', tokens, id);
      }
    },
  };
}
