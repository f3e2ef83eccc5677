/** Time in an isolate: a clock that never goes back, waits with limits, and what to try again. */
import { type ErrorCode, MaskrouteError } from '../../shared/wire/errors.ts';
import { RETRY_AFTER_s } from '../limits.ts';

/**
 * A clock for ages and waits: it follows `read` (ms) but never goes back. When the system's clock is set back by an hour,
 * this one goes on from its last reading; otherwise breakers would stay open, and cached values fresh, for an hour longer.
 * Times of two clocks cannot be compared.
 */
export function createSteadyClock(read: () => number): () => number {
  let last_ms = Number.NEGATIVE_INFINITY;
  let lost_ms = 0;
  return () => {
    const now_ms = read();
    if (now_ms < last_ms) lost_ms += last_ms - now_ms;
    last_ms = now_ms;
    return now_ms + lost_ms;
  };
}

/**
 * The isolate's clock for ages and waits, ms. Times that are stored, shown or compared with another machine's are
 * `Date.now()`. (In Workers `performance.now()` is the system's clock, too.)
 */
export const steadyNow_ms = createSteadyClock(() => Date.now());

/** Converts a time of {@link steadyNow_ms} to the system's time, ms, to show it. */
export const systemTime_ms = (at_ms: number): number => Date.now() - (steadyNow_ms() - at_ms);

/**
 * Waits with time limits, one after the other, with one timer for all of them. Setting a timer takes a fortieth of a
 * request's time on the edge's main thread, and a fifth of a token's.
 */

export interface Wait {
  /** The result of `work`, or `late` when it takes longer than `limit_ms`. One wait at a time. */
  within<T>(work: Promise<T>, limit_ms: number): Promise<T | 'late'>;
  /** Stops the timer; no further waits. */
  end(): void;
}

/** @param limitMin_ms the shortest limit that will be used: the timer's interval. */
export function createWait(limitMin_ms: number): Wait {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let until_ms = 0;
  let giveUp = (_late: 'late'): void => {};

  // Ending a wait that is already over has no effect.
  const look = (): void => {
    const left_ms = until_ms - steadyNow_ms();
    timer = left_ms > 0 ? setTimeout(look, Math.min(left_ms, limitMin_ms)) : undefined;
    if (left_ms <= 0) giveUp('late');
  };

  return {
    within<T>(work: Promise<T>, limit_ms: number) {
      until_ms = steadyNow_ms() + limit_ms;
      timer ??= setTimeout(look, limitMin_ms);
      return new Promise<T | 'late'>((resolve, reject) => {
        giveUp = resolve;
        work.then(resolve, reject);
      });
    },
    end() {
      if (timer !== undefined) clearTimeout(timer);
      timer = undefined;
    },
  };
}

/** The error for what cannot be reached at the moment: clients may ask again soon. */
export const notNow = (
  code: ErrorCode,
  message: string,
  cause?: unknown,
  retryAfter_s = RETRY_AFTER_s,
): MaskrouteError => new MaskrouteError(code, message, { retryAfter_s, cause });

export const sleep = (delay_ms: number): Promise<void> =>
  new Promise((resolve) => setTimeout(resolve, delay_ms));

/** Tries after the first of these delays and, while it fails, after each later one. @throws what the last try threw. */
export async function retried<T>(
  [first_ms = 0, ...later_ms]: readonly number[],
  work: () => Promise<T>,
): Promise<T> {
  if (first_ms > 0) await sleep(first_ms);
  return await (later_ms.length === 0 ? work() : work().catch(() => retried(later_ms, work)));
}

/* Bounded waiting. The work continues after the wait ends; its caller keeps it alive with `waitUntil`. */

/** Keeps work alive after the response: the platform's `waitUntil`. */
export type Hold = (work: Promise<unknown>) => void;
/** For work that something else keeps alive. */
export const noHold: Hold = () => {};

export class DeadlineError extends Error {
  constructor(what: string, timeout_ms: number) {
    super(`${what} took more than ${timeout_ms} ms`);
    this.name = 'DeadlineError';
  }
}

/** The result of `work`. @throws DeadlineError when `work` does not settle in time. */
export async function withDeadline<T>(work: Promise<T>, timeout_ms: number, what: string): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const deadline = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => reject(new DeadlineError(what, timeout_ms)), timeout_ms);
  });
  try {
    return await Promise.race([work, deadline]);
  } finally {
    if (timer !== undefined) clearTimeout(timer);
  }
}

/**
 * Counts running work. The platform may end a request at any point without running any code, so each piece of work
 * counts until it ends, but no longer than it may take.
 */
export class UnderWay {
  readonly #pieces = new Set<{ readonly until_ms: number; readonly tenant: string | undefined }>();

  /** Call the result when the work has ended. */
  begin(longest_ms: number, tenant?: string): () => void {
    const piece = { until_ms: steadyNow_ms() + longest_ms, tenant };
    this.#pieces.add(piece);
    return () => void this.#pieces.delete(piece);
  }

  /** `now_ms` is of {@link steadyNow_ms}. */
  count(now_ms = steadyNow_ms()): number {
    for (const piece of this.#pieces) if (now_ms >= piece.until_ms) this.#pieces.delete(piece);
    return this.#pieces.size;
  }

  has(tenant: string): boolean {
    const now_ms = steadyNow_ms();
    for (const piece of this.#pieces) if (piece.tenant === tenant && now_ms < piece.until_ms) return true;
    return false;
  }
}
