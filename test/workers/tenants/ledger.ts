/** One tenant's books, against a naive account of the same requests. */
import { runInDurableObject } from 'cloudflare:test';
import { env } from 'cloudflare:workers';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { BudgetLimits } from '../../../workers/db/tenant-rows.ts';
import { Ledger, type ReserveRequest } from '../../../workers/tenants/ledger.ts';

const NO_LIMITS: BudgetLimits = {
  requestsPerMinute: null,
  tokensPerMinute: null,
  requestsPerDay: null,
  tokensPerDay: null,
};
const MINUTE_ms = 60_000;
const DAY_ms = 86_400_000;
/** The first minute of a day. */
const START_ms = 20_000 * 86_400_000;

let books = 0;
/** A ledger over the SQLite of an object that nobody used. */
const withLedger = <T>(work: (ledger: Ledger) => T): Promise<T> =>
  runInDurableObject(env.BUDGETS.getByName(`books-${++books}`), (_object, state) =>
    work(new Ledger(state.storage.sql)),
  );

const want = (
  id: string,
  tokens: number,
  limits: Partial<BudgetLimits>,
  more: Partial<ReserveRequest> = {},
) => ({
  id,
  limits: { ...NO_LIMITS, ...limits },
  wanted_tokens: tokens,
  least_tokens: tokens,
  ...more,
});
const used = (ledger: Ledger, limits: Partial<BudgetLimits>, now_ms: number) =>
  ledger.states({ ...NO_LIMITS, ...limits }, now_ms).map((state) => state.used);

describe('a reservation', () => {
  const limits = { tokensPerDay: 100 };

  it('is made once for an id, and settled once', async () => {
    await withLedger((ledger) => {
      const first = ledger.reserve(want('a', 60, limits), START_ms);
      expect(ledger.reserve(want('a', 60, limits), START_ms + 1)).toEqual({
        ...first,
        states: [{ ...first.states[0], resetsAfter_ms: 86_400_000 - 1 }],
      });
      expect(used(ledger, limits, START_ms)).toEqual([60]);
      ledger.settle('a', 10, START_ms);
      ledger.settle('a', 99, START_ms);
      ledger.settle('unknown', 99, START_ms);
      expect(used(ledger, limits, START_ms)).toEqual([10]);
    });
  });

  it('does not count for an hour more when the clock is set back by an hour', async () => {
    const HOUR_ms = 60 * MINUTE_ms;
    const minute = { tokensPerMinute: 100 };
    await withLedger((ledger) => {
      expect(ledger.reserve(want('a', 100, minute), START_ms + 2 * HOUR_ms).granted).toBe(true);
      // A clock that is off by a little forgets nothing.
      expect(used(ledger, minute, START_ms + 2 * HOUR_ms - 2_000)).toEqual([100]);
      expect(used(ledger, minute, START_ms + HOUR_ms)).toEqual([0]);
      expect(ledger.reserve(want('b', 100, minute), START_ms + HOUR_ms).granted).toBe(true);
      const refused = ledger.reserve(want('c', 1, minute), START_ms + HOUR_ms + 1);
      expect(refused).toMatchObject({ granted: false, refusedBy: { resetsAfter_ms: 61_000 - 1 } });
    });
  });

  it('that nobody settles counts in full until the day is over; a late settlement still counts', async () => {
    await withLedger((ledger) => {
      ledger.reserve(want('a', 60, limits), START_ms);
      expect(used(ledger, limits, START_ms + DAY_ms - 1)).toEqual([60]);
      expect(ledger.reserve(want('b', 41, limits), START_ms + DAY_ms - 1).granted).toBe(false);
      ledger.settle('a', 33, START_ms + DAY_ms - 1);
      expect(used(ledger, limits, START_ms + DAY_ms - 1)).toEqual([33]);
      expect(used(ledger, limits, START_ms + DAY_ms)).toEqual([0]);
    });
  });

  it('that comes after its settlement weighs nothing', async () => {
    await withLedger((ledger) => {
      ledger.settle('a', 0, START_ms);
      expect(ledger.reserve(want('a', 60, limits), START_ms + 1).granted).toBe(true);
      expect(used(ledger, limits, START_ms + 1)).toEqual([0]);
    });
  });

  it('counts in the windows in which it was made', async () => {
    await withLedger((ledger) => {
      const both = { tokensPerMinute: 50, tokensPerDay: 100 };
      ledger.reserve(want('a', 40, both), START_ms + 59_999);
      expect(used(ledger, both, START_ms + MINUTE_ms)).toEqual([40, 40]);
      expect(used(ledger, both, START_ms + 2 * MINUTE_ms)).toEqual([0, 40]);
      ledger.settle('a', 5, START_ms + 2 * MINUTE_ms);
      expect(used(ledger, both, START_ms + 2 * MINUTE_ms)).toEqual([0, 5]);
      expect(used(ledger, both, START_ms + 59_999)).toEqual([5, 5]);
      expect(used(ledger, both, START_ms + 86_400_000)).toEqual([0, 0]);
    });
  });

  it('of an open answer takes what is left, if that is enough', async () => {
    await withLedger((ledger) => {
      ledger.reserve(want('a', 60, limits), START_ms);
      const open = { least_tokens: 30 };
      expect(ledger.reserve(want('b', 500, limits, open), START_ms)).toMatchObject({
        granted: true,
        tokens: 40,
      });
      expect(ledger.reserve(want('c', 500, limits, open), START_ms)).toMatchObject({
        granted: false,
        everFits: true,
        refusedBy: { unit: 'tokens', window: 'day', limit: 100, used: 100 },
      });
    });
  });

  it('that never fits is refused by the limit that is too small, whatever else is used up', async () => {
    await withLedger((ledger) => {
      const all = { requestsPerDay: 1, tokensPerMinute: 50, tokensPerDay: 100 };
      expect(ledger.reserve(want('a', 50, all), START_ms).granted).toBe(true);
      expect(ledger.reserve(want('b', 51, all), START_ms + MINUTE_ms)).toMatchObject({
        granted: false,
        everFits: false,
        refusedBy: { unit: 'tokens', window: 'minute', limit: 50 },
      });
    });
  });
});

describe('a minute', () => {
  const limits = { requestsPerMinute: 3, tokensPerMinute: 100 };
  const at = (ledger: Ledger, id: string, now_ms: number, tokens = 10) =>
    ledger.reserve(want(id, tokens, limits), now_ms);

  it('is any sixty seconds: at the edge of two of the clock no more passes than in one', async () => {
    await withLedger((ledger) => {
      for (const id of ['a', 'b', 'c']) expect(at(ledger, id, START_ms + 59_000).granted).toBe(true);
      expect(at(ledger, 'd', START_ms + 60_000)).toMatchObject({
        granted: false,
        refusedBy: { unit: 'requests', window: 'minute', limit: 3, used: 3, resetsAfter_ms: 60_000 },
      });
      expect(at(ledger, 'd', START_ms + 119_999).granted).toBe(false);
      expect(at(ledger, 'd', START_ms + 120_000).granted).toBe(true);
    });
  });

  it('says when there is room for this request, and when all of it is free', async () => {
    await withLedger((ledger) => {
      at(ledger, 'a', START_ms, 70);
      at(ledger, 'b', START_ms + 30_000, 20);
      const small = at(ledger, 'c', START_ms + 40_000, 60);
      expect(small).toMatchObject({ granted: false, refusedBy: { unit: 'tokens', resetsAfter_ms: 21_000 } });
      const large = at(ledger, 'c', START_ms + 40_000, 90);
      expect(large).toMatchObject({ granted: false, refusedBy: { resetsAfter_ms: 51_000 } });
      const states = ledger.states({ ...NO_LIMITS, ...limits }, START_ms + 40_000);
      expect(states.map(({ resetsAfter_ms }) => resetsAfter_ms)).toEqual([51_000, 51_000]);
      ledger.settle('b', 0, START_ms + 40_000);
      expect(ledger.states({ ...NO_LIMITS, tokensPerMinute: 100 }, START_ms + 40_000)).toMatchObject([
        { used: 70, resetsAfter_ms: 21_000 },
      ]);
    });
  });
});

/** What was reserved, by a plain list. */
type Entry = { at_ms: number; requests: number; tokens: number; is: 'held' | 'settled' };

const SECOND_ms = 1_000;

it('never lets more through than the limits in any sixty seconds, and agrees with a naive account', async () => {
  const step = fc.record({
    kind: fc.constantFrom('reserve', 'reserve', 'settle'),
    // Asked about again soon: the ledger forgets what was settled half an hour ago.
    back: fc.nat(10),
    tokens: fc.integer({ min: 1, max: 60 }),
    wait_ms: fc.constantFrom(0, 1, 999, 5_000, 30_000, 59_001, 61_000, 150_000),
  });
  const limits = { requestsPerMinute: 4, tokensPerMinute: 100, requestsPerDay: 12, tokensPerDay: 250 };
  await fc.assert(
    fc.asyncProperty(fc.array(step, { maxLength: 40 }), fc.nat(59_999), async (steps, first_ms) => {
      await withLedger((ledger) => {
        const naive = new Map<string, Entry>();
        let now_ms = START_ms + first_ms;
        const count = (isInside: (at_ms: number) => boolean) => {
          const inside = [...naive.values()].filter(({ at_ms }) => isInside(at_ms));
          return [
            inside.reduce((total, { requests }) => total + requests, 0),
            inside.reduce((total, { tokens }) => total + tokens, 0),
          ] as const;
        };
        /** A second that reaches into the last minute counts whole. */
        const minuteUse = () =>
          count((at_ms) => at_ms - (at_ms % SECOND_ms) + SECOND_ms > now_ms - MINUTE_ms);
        const dayUse = () => count((at_ms) => at_ms >= now_ms - (now_ms % DAY_ms));
        for (const [index, { kind, back, tokens, wait_ms }] of steps.entries()) {
          now_ms += wait_ms;
          const id = String(index - back);
          const known = naive.get(id);
          if (kind === 'settle') {
            // An answer takes no more than was reserved for it.
            const cost = Math.min(tokens, known?.tokens ?? tokens);
            ledger.settle(id, cost, now_ms);
            if (known === undefined) naive.set(id, { at_ms: now_ms, requests: 0, tokens: 0, is: 'settled' });
            else if (known.is !== 'settled') Object.assign(known, { tokens: cost, is: 'settled' });
          } else {
            const [minute, day] = [minuteUse(), dayUse()];
            const fits =
              known !== undefined ||
              (minute[0] < 4 && minute[1] + tokens <= 100 && day[0] < 12 && day[1] + tokens <= 250);
            expect(ledger.reserve(want(id, tokens, limits), now_ms).granted).toBe(fits);
            if (fits && known === undefined)
              naive.set(id, { at_ms: now_ms, requests: 1, tokens, is: 'held' });
          }
          expect(used(ledger, limits, now_ms)).toEqual([...minuteUse(), ...dayUse()]);
          const [requests, spent] = count((at_ms) => at_ms > now_ms - MINUTE_ms);
          expect(requests).toBeLessThanOrEqual(limits.requestsPerMinute);
          expect(spent).toBeLessThanOrEqual(limits.tokensPerMinute);
        }
      });
    }),
    { numRuns: 25, seed: 7 },
  );
});

it('has room exactly when it said that it would', async () => {
  const request = fc.record({ tokens: fc.integer({ min: 1, max: 60 }), wait_ms: fc.nat(20_000) });
  const limits = { requestsPerMinute: 5, tokensPerMinute: 120 };
  await fc.assert(
    fc.asyncProperty(fc.array(request, { minLength: 5, maxLength: 30 }), async (requests) => {
      await withLedger((ledger) => {
        let now_ms = START_ms;
        for (const [index, { tokens, wait_ms }] of requests.entries()) {
          now_ms += wait_ms;
          const asked = want(String(index), tokens, limits);
          const answer = ledger.reserve(asked, now_ms);
          if (answer.granted) continue;
          const { resetsAfter_ms } = answer.refusedBy;
          expect(ledger.reserve(asked, now_ms + resetsAfter_ms - 1).granted).toBe(false);
          now_ms += resetsAfter_ms;
          expect(ledger.reserve(asked, now_ms).granted).toBe(true);
        }
      });
    }),
    { numRuns: 25, seed: 7 },
  );
});
