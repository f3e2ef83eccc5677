/**
 * Wrong administrators' keys of the last minutes, and from where: what bounds guessing. An attempt is counted before
 * its key is looked at, so that many at once are not more than one after the other, and one that turns out right is
 * taken back. All of it is synchronous on the object's own SQLite.
 *
 * The bound on all addresses together is for guesses that come from many; it would also let anybody keep everybody
 * out, so addresses from which the right key came lately are held to their own bound only.
 */

export type AttemptLimits = {
  readonly window_ms: number;
  /** Wrong keys from one address in a window. */
  readonly addressMax: number;
  /** Wrong keys from all addresses that are not known, in a window. */
  readonly totalMax: number;
  /** How long an address is known after the right key came from it. */
  readonly known_ms: number;
  /** Known addresses that are remembered: the latest. */
  readonly knownMax: number;
};

export type AttemptAnswer =
  | { readonly allowed: true; readonly attempt: number }
  | { readonly allowed: false; readonly retryAfter_ms: number };

export interface AttemptBook {
  /** Counts an attempt, unless there were too many. */
  begin(address: string, now_ms: number): AttemptAnswer;
  /** The attempt's key was right: it counts no longer, and its address is known from now on. */
  succeeded(attempt: number, now_ms: number): void;
  /** Nothing was learned about the key: it counts no longer. */
  forget(attempt: number): void;
}

export function openAttemptBook(sql: SqlStorage, limits: AttemptLimits): AttemptBook {
  sql.exec(`CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, address TEXT NOT NULL, at_ms INTEGER NOT NULL)`);
  sql.exec('CREATE INDEX IF NOT EXISTS attempts_of ON attempts (address, at_ms)');
  sql.exec('CREATE INDEX IF NOT EXISTS attempts_at ON attempts (at_ms)');
  sql.exec('CREATE TABLE IF NOT EXISTS known (address TEXT PRIMARY KEY, at_ms INTEGER NOT NULL)');

  const isKnown = (address: string, now_ms: number): boolean =>
    sql
      .exec('SELECT 1 FROM known WHERE address = ? AND at_ms > ?', address, now_ms - limits.known_ms)
      .toArray().length > 0;

  /** The time of the newest attempt that must pass out of the window before another is allowed. */
  const blockedBy = (of: string, values: readonly string[], max: number): number | undefined =>
    sql
      .exec<{ at_ms: number }>(
        `SELECT at_ms FROM attempts ${of} ORDER BY at_ms DESC LIMIT 1 OFFSET ?`,
        ...values,
        max - 1,
      )
      .toArray()[0]?.at_ms;

  const forget = (attempt: number): void => {
    sql.exec('DELETE FROM attempts WHERE id = ?', attempt);
  };

  return {
    begin(address, now_ms) {
      sql.exec('DELETE FROM attempts WHERE at_ms <= ?', now_ms - limits.window_ms);
      const own = blockedBy('WHERE address = ?', [address], limits.addressMax);
      const all = isKnown(address, now_ms) ? undefined : blockedBy('', [], limits.totalMax);
      if (own !== undefined || all !== undefined) {
        const until_ms = Math.max(own ?? 0, all ?? 0) + limits.window_ms;
        return { allowed: false, retryAfter_ms: until_ms - now_ms };
      }
      const [row] = sql
        .exec<{ id: number }>(
          'INSERT INTO attempts (address, at_ms) VALUES (?, ?) RETURNING id',
          address,
          now_ms,
        )
        .toArray();
      return { allowed: true, attempt: row!.id };
    },
    succeeded(attempt, now_ms) {
      sql.exec(
        `INSERT INTO known SELECT address, ? FROM attempts WHERE id = ?
         ON CONFLICT DO UPDATE SET at_ms = excluded.at_ms`,
        now_ms,
        attempt,
      );
      forget(attempt);
      sql.exec(
        'DELETE FROM known WHERE address NOT IN (SELECT address FROM known ORDER BY at_ms DESC LIMIT ?)',
        limits.knownMax,
      );
    },
    forget,
  };
}
