/** What a ledger's figures mean for a request: how much is left, and when there is more. Pure arithmetic. */
import { BUCKET_ms, type BudgetState, type BudgetUnit, type BudgetWindow, WINDOW_ms } from './budget.ts';

/** A second or a day, with what was used in it. */
export type Bucket = Record<BudgetUnit, number> & { start_ms: number };

/** One limit, with what is used of it and when the last bucket begins that something of it was used in. */
export type Counter = Omit<BudgetState, 'resetsAfter_ms'> & { readonly lastStart_ms: number | null };

export const secondOf = (now_ms: number): number => now_ms - (now_ms % BUCKET_ms);
export const minuteOf = (now_ms: number): number => now_ms - (now_ms % WINDOW_ms.minute);
/** Where the oldest bucket begins that counts: the second that holds the moment a minute ago, or today. */
export const firstStart = (window: BudgetWindow, now_ms: number): number =>
  window === 'minute' ? secondOf(now_ms - WINDOW_ms.minute) : now_ms - (now_ms % WINDOW_ms.day);

/** When a bucket counts no longer. */
const leavesAt_ms = (window: BudgetWindow, start_ms: number): number =>
  start_ms + WINDOW_ms[window] + (window === 'minute' ? BUCKET_ms : 0);

export const remaining = ({ limit, used }: Counter): number => Math.max(0, limit - used);
export const isOfTokens = ({ unit }: Counter): boolean => unit === 'tokens';
const needOf = (counter: Counter, tokens: number): number => (isOfTokens(counter) ? tokens : 1);

/** The same after one more request of `tokens`. */
export const withRequest = (counter: Counter, tokens: number, now_ms: number): Counter => ({
  ...counter,
  used: counter.used + needOf(counter, tokens),
  lastStart_ms: counter.window === 'minute' ? secondOf(now_ms) : firstStart('day', now_ms),
});

export const stateOf = ({ lastStart_ms, ...counter }: Counter, now_ms: number): BudgetState => ({
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
export const tightest = (
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
export const fitsUnused = (counters: readonly Counter[], tokens: number): boolean =>
  counters.every((counter) => counter.limit >= needOf(counter, tokens));
