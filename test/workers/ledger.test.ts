/** One tenant's books, against a naive account of the same requests. */
import { runInDurableObject } from 'cloudflare:test';
import { env } from 'cloudflare:workers';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type BudgetLimits, NO_LIMITS, type ReserveRequest } from '../../workers/budgets/budget.ts';
import { type Ledger, openLedger, RESERVATION_ms } from '../../workers/budgets/ledger.ts';

const MINUTE_ms = 60_000;
/** The first minute of a day. */
const START_ms = 20_000 * 86_400_000;

let books = 0;
/** A ledger over the SQLite of an object that nobody used. */
const withLedger = <T>(work: (ledger: Ledger) => T): Promise<T> =>
  runInDurableObject(env.BUDGETS.getByName(`books-${++books}`), (_object, state) =>
    work(openLedger(state.storage.sql)),
  );

const want = (
  id: string,
  tokens: number,
  limits: Partial<BudgetLimits>,
  more: Partial<ReserveRequest> = {},
) => ({
  id,
  limits: { ...NO_LIMITS, ...limits },
  prompt_tokens: 1,
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
      ledger.settle('a', 10);
      ledger.settle('a', 99);
      ledger.settle('unknown', 99);
      expect(used(ledger, limits, START_ms)).toEqual([10]);
    });
  });

  it('that nobody settles gives the answer back and keeps the prompt; a late settlement still counts', async () => {
    await withLedger((ledger) => {
      ledger.reserve(want('a', 60, limits, { prompt_tokens: 20 }), START_ms);
      expect(used(ledger, limits, START_ms + RESERVATION_ms - 1)).toEqual([60]);
      expect(used(ledger, limits, START_ms + RESERVATION_ms)).toEqual([20]);
      ledger.settle('a', 33);
      expect(used(ledger, limits, START_ms + RESERVATION_ms)).toEqual([33]);
    });
  });

  it('counts in the windows in which it was made', async () => {
    await withLedger((ledger) => {
      const both = { tokensPerMinute: 50, tokensPerDay: 100 };
      ledger.reserve(want('a', 40, both), START_ms + 59_999);
      expect(used(ledger, both, START_ms + MINUTE_ms)).toEqual([0, 40]);
      ledger.settle('a', 5);
      expect(used(ledger, both, START_ms + MINUTE_ms)).toEqual([0, 5]);
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
});

it('never lets more through than the limits, and agrees with a naive account', async () => {
  const step = fc.record({
    kind: fc.constantFrom('reserve', 'reserve', 'settle'),
    id: fc.nat(30),
    tokens: fc.integer({ min: 1, max: 60 }),
    wait_ms: fc.constantFrom(0, 1, 5_000, 30_000, 61_000, 700_000),
  });
  const limits = { requestsPerMinute: 4, tokensPerMinute: 100, requestsPerDay: 12, tokensPerDay: 250 };
  await fc.assert(
    fc.asyncProperty(fc.array(step, { maxLength: 40 }), async (steps) => {
      await withLedger((ledger) => {
        const naive = new Map<
          string,
          { at_ms: number; tokens: number; is: 'held' | 'expired' | 'settled' }
        >();
        let now_ms = START_ms;
        const sum = (since_ms: number) => {
          const inside = [...naive.values()].filter(({ at_ms }) => at_ms >= since_ms);
          return [inside.length, inside.reduce((total, { tokens }) => total + tokens, 0)] as const;
        };
        for (const { kind, id: number, tokens, wait_ms } of steps) {
          now_ms += wait_ms;
          for (const entry of naive.values()) {
            if (entry.is === 'held' && now_ms >= entry.at_ms + RESERVATION_ms)
              Object.assign(entry, { tokens: 1, is: 'expired' });
          }
          const id = String(number);
          const known = naive.get(id);
          if (kind === 'settle') {
            ledger.settle(id, tokens);
            if (known !== undefined && known.is !== 'settled')
              Object.assign(known, { tokens, is: 'settled' });
          } else {
            const [minute, day] = [sum(now_ms - (now_ms % MINUTE_ms)), sum(now_ms - (now_ms % 86_400_000))];
            const fits =
              known !== undefined ||
              (minute[0] < 4 && minute[1] + tokens <= 100 && day[0] < 12 && day[1] + tokens <= 250);
            expect(ledger.reserve(want(id, tokens, limits), now_ms).granted).toBe(fits);
            if (fits && known === undefined) naive.set(id, { at_ms: now_ms, tokens, is: 'held' });
          }
          const [minute, day] = [sum(now_ms - (now_ms % MINUTE_ms)), sum(now_ms - (now_ms % 86_400_000))];
          expect(used(ledger, limits, now_ms)).toEqual([...minute, ...day]);
        }
      });
    }),
    { numRuns: 25 },
  );
});
