/** The names of completions: nobody has two alike, and nobody makes up a tenant's. */
import { afterEach, expect, it, vi } from 'vitest';
import { EVENT_ID_PATTERN } from '../../../shared/admin/request-event.ts';
import { ageOf_ms, createCompletionIds, lotOf } from '../../../workers/counting/completion-ids.ts';

afterEach(() => {
  vi.useRealTimers();
});

const SECRET = 'secret-of-this-test-0123456789';

it('are each known again, by their tenant alone, with and without what the answer puts before them', () => {
  const ids = createCompletionIds(SECRET);
  const made = Array.from({ length: 1_001 }, (_, index) => {
    const tenant = `tenant-${index % 3}`;
    return { tenant, ...ids.create(tenant) };
  });
  expect(new Set(made.map(({ event }) => event)).size).toBe(made.length);
  const later = createCompletionIds(SECRET);
  for (const { tenant, event, completion } of made) {
    expect(event).toMatch(EVENT_ID_PATTERN);
    expect(later.eventOf(completion, tenant)).toBe(event);
    expect(later.eventOf(`chatcmpl-${completion}`, tenant)).toBe(event);
    expect(later.eventOf(completion, `${tenant}x`)).toBeNull();
    expect(createCompletionIds(`${SECRET}x`).eventOf(completion, tenant)).toBeNull();
  }
});

it('do not give the other signatures of their series away', () => {
  const ids = createCompletionIds(SECRET);
  const series = Array.from({ length: 4 }, () => ids.create('a').completion.split('.') as [string, string]);
  for (const [event] of series) {
    const known = series.filter(([, signature]) => ids.eventOf(`${event}.${signature}`, 'a') !== null);
    expect(known).toHaveLength(1);
  }
  expect(ids.eventOf(`${series[0]![0].slice(0, -1)}4.${series[0]![1]}`, 'a')).toBeNull();
});

it('of one batch lie together, and draw lots evenly', () => {
  const ids = createCompletionIds(SECRET);
  const events = Array.from({ length: 4_000 }, (_, index) => ids.create(`tenant-${index % 500}`).event);
  expect(new Set(events.map((event) => event.slice(0, 6))).size).toBeLessThan(3);
  const share = events.filter((event) => lotOf(event) < 0.25).length / events.length;
  expect(share).toBeGreaterThan(0.2);
  expect(share).toBeLessThan(0.3);
});

it('of one series draw each its own lot', () => {
  const ids = createCompletionIds(SECRET);
  const series = Array.from({ length: 1_000 }, () =>
    Array.from({ length: 4 }, () => lotOf(ids.create('a').event) < 0.5),
  );
  const alike = series.filter((lots) => new Set(lots).size === 1).length / series.length;
  // By chance an eighth.
  expect(alike).toBeGreaterThan(0.07);
  expect(alike).toBeLessThan(0.2);
});

it('say when they were made, also where their digits begin anew', () => {
  const ids = createCompletionIds(SECRET);
  const { event } = ids.create('a');
  const now_ms = Date.now();
  expect(Math.abs(ageOf_ms(event, now_ms))).toBeLessThan(1_000);
  expect(ageOf_ms(event, now_ms + 8 * 86_400_000)).toBeCloseTo(8 * 86_400_000, -4);
  expect(ageOf_ms('f'.repeat(20), 2 ** 40 + 600_000)).toBeCloseTo(600_000, -3);
  // Another isolate's clock may be ahead.
  expect(ageOf_ms(event, now_ms - 60_000)).toBeCloseTo(-60_000, -3);
  // A tenant that comes back after days does not go on with what it began then.
  vi.useFakeTimers({ toFake: ['Date'], now: now_ms + 8 * 86_400_000 });
  expect(Math.abs(ageOf_ms(ids.create('a').event, Date.now()))).toBeLessThan(1_000);
});
