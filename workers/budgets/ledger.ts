/**
 * The books of one tenant: what was used of each window, and what is reserved for requests under way. All of
 * it is synchronous on the object's own SQLite, so that no two requests ever see the same remainder.
 *
 * A reservation counts in the windows in which it was made. Settling it replaces what was reserved by what was
 * used; one that nobody settles in time gives its answer's part back and keeps the prompt's part. A settlement
 * that comes later than that still counts.
 */
import {
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
} from './budget.ts';

/** Longer than any answer is generated; a shorter time would free tokens that are still being used. */
export const RESERVATION_ms = 15 * 60_000;
/** Settlements that come later than this are lost. */
const KEEP_ms = 2 * WINDOW_ms.day;
const EXPIRED_AT_ONCE = 500;

export interface Ledger {
  reserve(request: ReserveRequest, now_ms: number): ReserveAnswer;
  /** What was really used. Again, or for an unknown id, it changes nothing. */
  settle(id: string, tokens: number): void;
  states(limits: BudgetLimits, now_ms: number): BudgetState[];
}

type Reservation = { id: string; minute_ms: number; day_ms: number; tokens: number; prompt_tokens: number };
type Used = Record<BudgetUnit, number>;

export function openLedger(sql: SqlStorage): Ledger {
  sql.exec(`CREATE TABLE IF NOT EXISTS windows (
    window TEXT NOT NULL, start_ms INTEGER NOT NULL, requests INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (window, start_ms)) WITHOUT ROWID`);
  sql.exec(`CREATE TABLE IF NOT EXISTS reservations (
    id TEXT PRIMARY KEY, minute_ms INTEGER NOT NULL, day_ms INTEGER NOT NULL, tokens INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, expires_at_ms INTEGER, settled INTEGER NOT NULL) WITHOUT ROWID`);
  sql.exec('CREATE INDEX IF NOT EXISTS held ON reservations (expires_at_ms) WHERE expires_at_ms IS NOT NULL');

  const usedIn = (window: BudgetWindow, start_ms: number): Used =>
    sql
      .exec<Used>('SELECT requests, tokens FROM windows WHERE window = ? AND start_ms = ?', window, start_ms)
      .toArray()[0] ?? { requests: 0, tokens: 0 };

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
    sql.exec('DELETE FROM windows WHERE start_ms < ?', now_ms - KEEP_ms);
    sql.exec("DELETE FROM windows WHERE window = 'minute' AND start_ms < ?", now_ms - 2 * RESERVATION_ms);
    sql.exec('DELETE FROM reservations WHERE minute_ms < ?', now_ms - KEEP_ms);
    sql.exec('DELETE FROM reservations WHERE settled = 1 AND minute_ms < ?', now_ms - 2 * RESERVATION_ms);
  };

  const states = (limits: BudgetLimits, now_ms: number): BudgetState[] =>
    BUDGET_WINDOWS.flatMap((window) => {
      const start_ms = startOf(window, now_ms);
      const used = usedIn(window, start_ms);
      return BUDGET_UNITS.flatMap((unit): BudgetState[] => {
        const limit = limitOf(limits, unit, window);
        if (limit === null) return [];
        return [
          { unit, window, limit, used: used[unit], resetsAfter_ms: start_ms + WINDOW_ms[window] - now_ms },
        ];
      });
    });

  return {
    states(limits, now_ms) {
      expire(now_ms);
      return states(limits, now_ms);
    },
    reserve({ id, limits, prompt_tokens, wanted_tokens, least_tokens }, now_ms) {
      expire(now_ms);
      const known = sql
        .exec<{ tokens: number }>('SELECT tokens FROM reservations WHERE id = ?', id)
        .toArray();
      if (known[0] !== undefined) {
        return { granted: true, tokens: known[0].tokens, states: states(limits, now_ms) };
      }
      const before = states(limits, now_ms);
      const refusedBy = tightest(before, least_tokens);
      if (refusedBy !== undefined) {
        return { granted: false, refusedBy, everFits: fits(before, least_tokens), states: before };
      }
      const tokens = Math.min(wanted_tokens, ...before.filter(isOfTokens).map(remaining));
      const [minute_ms, day_ms] = [startOf('minute', now_ms), startOf('day', now_ms)];
      if (usedIn('minute', minute_ms).requests === 0) forgetOld(now_ms);
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
      return { granted: true, tokens, states: states(limits, now_ms) };
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

const startOf = (window: BudgetWindow, now_ms: number): number => now_ms - (now_ms % WINDOW_ms[window]);
const remaining = ({ limit, used }: BudgetState): number => Math.max(0, limit - used);
const isOfTokens = ({ unit }: BudgetState): boolean => unit === 'tokens';
const needOf = (state: BudgetState, tokens: number): number => (isOfTokens(state) ? tokens : 1);

/** Of the limits that have no room for one more request of `tokens`, the one that takes longest to reset. */
const tightest = (states: readonly BudgetState[], tokens: number): BudgetState | undefined =>
  states
    .filter((state) => remaining(state) < needOf(state, tokens))
    .sort((a, b) => b.resetsAfter_ms - a.resetsAfter_ms)[0];

const fits = (states: readonly BudgetState[], tokens: number): boolean =>
  states.every((state) => state.limit >= needOf(state, tokens));
