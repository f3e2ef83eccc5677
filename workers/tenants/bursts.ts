/**
 * A ceiling for everybody, with budgets or without: what one caller may send at once, so that it cannot take everything
 * from the others. The platform counts, a location for itself and not to the last request.
 */
import { LRUCache } from 'lru-cache';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { log, reasonOf } from '../base/log.ts';
import { BURST } from '../limits.ts';

export interface BurstLimit {
  /** Undefined when there is nothing to wait for. @throws MaskrouteError `rate_limit_exceeded`. */
  enter(who: string): Promise<void> | undefined;
}

/** What this isolate let in of one caller, and a head start. */
type Seen = { count: number; refused: boolean };

/**
 * `binding` is asked once for `askedEvery` requests, so that its limit counts so many at a time. A caller that it refused
 * last is asked about at every request. Chance says at which of the first requests an isolate asks: if all isolates
 * asked at the first, a caller with few requests in many isolates would be counted for many. A binding that is absent
 * or can't be asked lets everybody in: it holds off bursts, and whoever must not pass a limit has a budget.
 */
export function createBurstLimit(
  binding: Pick<RateLimit, 'limit'> | undefined,
  what: string,
  askedEvery: number,
  random: () => number = Math.random,
): BurstLimit {
  const seen = new LRUCache<string, Seen>({ max: BURST.callersMax });

  const seenOf = (who: string): Seen => {
    const known = seen.get(who);
    if (known !== undefined) return known;
    const first = { count: Math.floor(random() * askedEvery), refused: false };
    seen.set(who, first);
    return first;
  };

  const ask = async (limiter: Pick<RateLimit, 'limit'>, who: string, of: Seen): Promise<void> => {
    const { success } = await limiter.limit({ key: who }).catch((error: unknown) => {
      log('warn', 'burst_limit_unreachable', { who, reason: reasonOf(error) });
      return { success: true };
    });
    if (!success && !of.refused) log('warn', 'burst_refused', { who });
    of.refused = !success;
    if (success) return;
    throw new MaskrouteError('rate_limit_exceeded', `${what} at once: wait ${BURST.window_s} s.`, {
      retryAfter_s: BURST.window_s,
    });
  };

  return {
    enter(who) {
      if (binding === undefined) return undefined;
      const of = seenOf(who);
      const isDue = ++of.count % askedEvery === 0;
      return isDue || of.refused ? ask(binding, who, of) : undefined;
    },
  };
}
