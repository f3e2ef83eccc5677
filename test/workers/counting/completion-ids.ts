/** The names of completions: nobody has two alike, and nobody makes up a tenant's. */
import { expect, it } from 'vitest';
import { EVENT_ID_PATTERN } from '../../../shared/admin/requests-wire.ts';
import { ageOf_ms, createCompletionIds, lotOf } from '../../../workers/counting/events.ts';

const SECRET = 'secret-of-this-test-0123456789';

it('are each known again, by their tenant alone, with and without what the answer puts before them', () => {
  const ids = createCompletionIds([SECRET]);
  const made = Array.from({ length: 1_001 }, (_, index) => {
    const tenant = `tenant-${index % 3}`;
    return { tenant, ...ids.create(tenant) };
  });
  expect(new Set(made.map(({ event }) => event)).size).toBe(made.length);
  const later = createCompletionIds([SECRET]);
  for (const { tenant, event, completion } of made) {
    expect(event).toMatch(EVENT_ID_PATTERN);
    expect(later.eventOf(completion, tenant)).toBe(event);
    expect(later.eventOf(`chatcmpl-${completion}`, tenant)).toBe(event);
    expect(later.eventOf(completion, `${tenant}x`)).toBeNull();
    expect(createCompletionIds([`${SECRET}x`]).eventOf(completion, tenant)).toBeNull();
  }
});

it('hold neither for a changed event nor for another one', () => {
  const ids = createCompletionIds([SECRET]);
  const [one, other] = [ids.create('a'), ids.create('a')];
  const signature = one.completion.slice(one.event.length + 1);
  expect(ids.eventOf(`${other.event}.${signature}`, 'a')).toBeNull();
  const changed = one.event.slice(0, -1) + (one.event.endsWith('0') ? '1' : '0');
  expect(ids.eventOf(`${changed}.${signature}`, 'a')).toBeNull();
});

it('of one batch lie together, and draw lots evenly', () => {
  const ids = createCompletionIds([SECRET]);
  const events = Array.from({ length: 4_000 }, (_, index) => ids.create(`tenant-${index % 500}`).event);
  expect(new Set(events.map((event) => event.slice(0, 6))).size).toBeLessThan(3);
  const share = events.filter((event) => lotOf(event) < 0.25).length / events.length;
  expect(share).toBeGreaterThan(0.2);
  expect(share).toBeLessThan(0.3);
});

it('say when they were made, also where their digits begin anew', () => {
  const ids = createCompletionIds([SECRET]);
  const { event } = ids.create('a');
  const now_ms = Date.now();
  expect(Math.abs(ageOf_ms(event, now_ms))).toBeLessThan(1_000);
  expect(ageOf_ms(event, now_ms + 8 * 86_400_000)).toBeCloseTo(8 * 86_400_000, -4);
  expect(ageOf_ms('f'.repeat(20), 2 ** 40 + 600_000)).toBeCloseTo(600_000, -3);
  // Another isolate's clock may be ahead.
  expect(ageOf_ms(event, now_ms - 60_000)).toBeCloseTo(-60_000, -3);
});
