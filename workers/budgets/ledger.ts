/**
 * The books of one tenant: what was used of each window, and what is reserved for requests under way. All of
 * it is synchronous on the object's own SQLite, so that no two requests ever see the same remainder.
 *
 * What is used is kept by the second (`minute`) and by the day; a minute's use is the sum of its seconds. A reservation
 * counts where it was made. Settling it replaces what was reserved by what was
 * used; one that nobody settles in time gives its answer's part back and keeps the prompt's part. A settlement
 * that comes later than that still counts.
 */
import {
  BUDGET_UNITS,
  BUDGET_WINDOWS,
  type BudgetLimits,
  type BudgetState,
  type BudgetWindow,
  limitOf,
  type ReserveAnswer,
  type ReserveRequest,
  WINDOW_ms,
} from './budget.ts';
import {
  type Bucket,
  type Counter,
  firstStart,
  fitsUnused,
  isOfTokens,
  minuteOf,
  remaining,
  secondOf,
  stateOf,
  tightest,
  withRequest,
} from './counters.ts';

/** Longer than any answer is generated; a shorter time would free tokens that are still being used. */
export const RESERVATION_ms = 15 * 60_000;
/** Settlements that come later than this are lost. */
const KEEP_ms = 2 * WINDOW_ms.day;
const EXPIRED_AT_ONCE = 500;
/** Seconds that left the minute this long ago are deleted. */
const KEEP_SECONDS_ms = WINDOW_ms.minute;

export interface Ledger {
  reserve(request: ReserveRequest, now_ms: number): ReserveAnswer;
  /** What was really used. Again, or for an unknown id, it changes nothing. */
  settle(id: string, tokens: number): void;
  states(limits: BudgetLimits, now_ms: number): BudgetState[];
}

/** `minute_ms` is the second in which it was made. */
type Reservation = { id: string; minute_ms: number; day_ms: number; tokens: number; prompt_tokens: number };
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
  sql.exec(`CREATE TABLE IF NOT EXISTS reservations (
    id TEXT PRIMARY KEY, minute_ms INTEGER NOT NULL, day_ms INTEGER NOT NULL, tokens INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, expires_at_ms INTEGER, settled INTEGER NOT NULL) WITHOUT ROWID`);
  sql.exec('CREATE INDEX IF NOT EXISTS held ON reservations (expires_at_ms) WHERE expires_at_ms IS NOT NULL');

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

  const expire = (now_ms: number): void => {
    const late = sql
      .exec<Reservation>(
        `SELECT id, minute_ms, day_ms, tokens, prompt_tokens FROM reservations
         WHERE expires_at_ms <= ? LIMIT ?`,
        now_ms,
        EXPIRED_AT_ONCE,
      )
      .toArray();
    for (const reservation of late) {
      const kept = Math.min(reservation.tokens, reservation.prompt_tokens);
      reweigh(reservation, kept);
      sql.exec('UPDATE reservations SET tokens = ?, expires_at_ms = NULL WHERE id = ?', kept, reservation.id);
    }
  };

  const forgetOld = (now_ms: number): void => {
    const second_ms = firstStart('minute', now_ms) - KEEP_SECONDS_ms;
    sql.exec("DELETE FROM windows WHERE window = 'minute' AND start_ms < ?", second_ms);
    sql.exec("DELETE FROM windows WHERE window = 'day' AND start_ms < ?", now_ms - KEEP_ms);
    sql.exec('DELETE FROM reservations WHERE minute_ms < ?', now_ms - KEEP_ms);
    sql.exec('DELETE FROM reservations WHERE settled = 1 AND minute_ms < ?', now_ms - 2 * RESERVATION_ms);
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
      expire(now_ms);
      return statesOf(countersOf(limits, now_ms), now_ms);
    },
    reserve({ id, limits, prompt_tokens, wanted_tokens, least_tokens }, now_ms) {
      expire(now_ms);
      const known = sql
        .exec<{ tokens: number }>('SELECT tokens FROM reservations WHERE id = ?', id)
        .toArray();
      const counters = countersOf(limits, now_ms);
      if (known[0] !== undefined) {
        return { granted: true, tokens: known[0].tokens, states: statesOf(counters, now_ms) };
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
      sql.exec(
        'INSERT INTO reservations VALUES (?, ?, ?, ?, ?, ?, 0)',
        id,
        minute_ms,
        day_ms,
        tokens,
        prompt_tokens,
        now_ms + RESERVATION_ms,
      );
      const after = counters.map((counter) => withRequest(counter, tokens, now_ms));
      return { granted: true, tokens, states: statesOf(after, now_ms) };
    },
    settle(id, tokens) {
      const [reservation] = sql
        .exec<Reservation>(
          `SELECT id, minute_ms, day_ms, tokens, prompt_tokens FROM reservations
           WHERE id = ? AND settled = 0`,
          id,
        )
        .toArray();
      if (reservation === undefined) return;
      reweigh(reservation, tokens);
      sql.exec(
        'UPDATE reservations SET tokens = ?, expires_at_ms = NULL, settled = 1 WHERE id = ?',
        tokens,
        id,
      );
    },
  };
}
