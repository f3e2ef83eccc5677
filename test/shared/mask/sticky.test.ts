/** Assignment: shares as the weights say, the same variant for the same key, and experiments that never meet. */
import { describe, expect, it } from 'vitest';
import {
  assignVariant,
  completesAt_ms,
  isInScope,
  overlap,
  type Rollout,
  type Scope,
  seesNew,
  shareAt,
  stickyKey,
} from '../../../shared/mask/sticky.ts';

const KEYS = Array.from({ length: 100_000 }, (_, i) => `["conversation","tenant",["user","question ${i}"]]`);

function sharesOf(variants: readonly { name: string; weight: number }[], experiment: string) {
  const counts = new Map<string, number>();
  for (const key of KEYS) {
    const { name } = assignVariant(experiment, variants, key);
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return variants.map(({ name }) => (counts.get(name) ?? 0) / KEYS.length);
}

describe('over 100,000 keys', () => {
  it.each([
    [[1, 1], 'halves'],
    [[8, 1, 1], 'uneven'],
    [[0.5, 99.5], 'a trickle'],
    [[1, 1, 1, 1, 1, 1, 1], 'seven'],
  ])('shares are within 1 %% of the weights %j', (weights, experiment) => {
    const variants = weights.map((weight, i) => ({ name: `v${i}`, weight }));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    sharesOf(variants, experiment).forEach((share, i) => {
      expect(Math.abs(share - weights[i]! / total)).toBeLessThan(0.01);
    });
  });

  it('the same key always gets the same variant, and another experiment draws anew', () => {
    const variants = [
      { name: 'a', weight: 1 },
      { name: 'b', weight: 1 },
    ];
    const some = KEYS.filter((_, i) => i % 10 === 0);
    const namesIn = (experiment: string) => some.map((key) => assignVariant(experiment, variants, key).name);
    const first = namesIn('first');
    expect(namesIn('first')).toEqual(first);
    const moved = namesIn('second').filter((name, i) => name !== first[i]);
    expect(moved.length / some.length).toBeCloseTo(0.5, 1);
  });
});

describe('scopes', () => {
  const scope = (change: Partial<Scope> = {}): Scope => ({
    tenants: [],
    models: [],
    regions: [],
    startsAt_ms: 0,
    endsAt_ms: 100,
    ...change,
  });

  it('hold what lies in every one of their limits, from start to end', () => {
    const limited = scope({ tenants: ['a'], models: ['m'], regions: [{ country: 'DE' }, { colo: 'LHR' }] });
    const request = { tenant: 'a', model: 'm', place: { continent: 'EU', country: 'DE', colo: 'FRA' } };
    expect(isInScope(limited, request, 50)).toBe(true);
    expect(isInScope(limited, { ...request, tenant: 'b' }, 50)).toBe(false);
    expect(isInScope(limited, { ...request, model: 'n' }, 50)).toBe(false);
    expect(isInScope(limited, { ...request, place: { country: 'FR', colo: 'CDG' } }, 50)).toBe(false);
    expect(isInScope(limited, { ...request, place: { country: 'GB', colo: 'LHR' } }, 50)).toBe(true);
    expect([-1, 0, 99, 100].map((now_ms) => isInScope(limited, request, now_ms))).toEqual([
      ...[false, true, true, false],
    ]);
  });

  it('overlap when one request could be in both', () => {
    const cases: [Partial<Scope>, Partial<Scope>, boolean][] = [
      [{}, {}, true],
      [{ tenants: ['a'] }, { tenants: ['b'] }, false],
      [{ tenants: ['a'] }, { tenants: ['b', 'a'] }, true],
      [{ tenants: ['a'] }, {}, true],
      [{ models: ['m'] }, { models: ['n'] }, false],
      [{ regions: [{ country: 'DE' }] }, { regions: [{ country: 'FR' }] }, false],
      [{ regions: [{ country: 'DE' }] }, { regions: [{ continent: 'EU' }] }, true],
      [{ regions: [{ colo: 'FRA' }] }, { regions: [{ country: 'FR' }] }, true],
      [{ endsAt_ms: 50 }, { startsAt_ms: 50 }, false],
      [{ endsAt_ms: 51 }, { startsAt_ms: 50, endsAt_ms: Number.POSITIVE_INFINITY }, true],
    ];
    for (const [a, b, expected] of cases) {
      expect(overlap(scope(a), scope(b))).toBe(expected);
      expect(overlap(scope(b), scope(a))).toBe(expected);
    }
  });
});

/* Schedules of publications: who sees the new version when. */

const ROLLOUT: Rollout = {
  id: 'p_1',
  activateAt_ms: 1_000_000,
  steps: [
    { share: 0.01, duration_s: 60 },
    { share: 0.1, duration_s: 600 },
  ],
  pausedAt_ms: null,
};

describe('a rollout', () => {
  it('goes through its steps by the clock alone', () => {
    const at = (seconds: number) => shareAt(ROLLOUT, 1_000_000 + seconds * 1000);
    expect([-1, 0, 59.999, 60, 659.999, 660].map(at)).toEqual([0, 0.01, 0.01, 0.1, 0.1, 1]);
    expect(completesAt_ms(ROLLOUT)).toBe(1_660_000);
    const atOnce = { ...ROLLOUT, steps: [] };
    expect([999_999, 1_000_000].map((now_ms) => shareAt(atOnce, now_ms))).toEqual([0, 1]);
  });

  it('shows the new version to its share of 100,000 keys, and never takes it from one again', () => {
    const keys = Array.from({ length: 100_000 }, (_, i) => `key ${i}`);
    const seenBy = (seconds: number) =>
      keys.filter((key) => seesNew(ROLLOUT, key, 1_000_000 + seconds * 1000));
    const [first, second] = [seenBy(0), seenBy(60)];
    expect(first.length / keys.length).toBeCloseTo(0.01, 2.5);
    expect(second.length / keys.length).toBeCloseTo(0.1, 2);
    expect(new Set([...first, ...second]).size).toBe(second.length);
    expect(seenBy(-1)).toHaveLength(0);
    expect(seenBy(660)).toHaveLength(keys.length);
    const other = keys.filter((key) => seesNew({ ...ROLLOUT, id: 'p_2' }, key, 1_000_000));
    expect(other.filter((key) => first.includes(key)).length).toBeLessThan(50);
  });
});

describe('a sticky key', () => {
  const caller = { tenant: 'a', keyId: 'k1' };
  const chat = (...messages: [string, string][]) => ({
    kind: 'chat' as const,
    body: { messages: messages.map(([role, content]) => ({ role: role as 'user', content })) },
  });
  const conversation = (source: Parameters<typeof stickyKey>[2], who = caller) =>
    stickyKey('conversation', who, source);

  it('of a conversation stays while it grows, and is another for another tenant', () => {
    const start = chat(['system', 'be kind'], ['user', 'hello']);
    const later = chat(['system', 'be kind'], ['user', 'hello'], ['assistant', 'hi'], ['user', 'more']);
    expect(conversation(later)).toBe(conversation(start));
    expect(conversation(start, { tenant: 'a', keyId: 'k2' })).toBe(conversation(start));
    expect(conversation(start, { tenant: 'b', keyId: 'k1' })).not.toBe(conversation(start));
    expect(conversation(chat(['user', 'hello']))).not.toBe(conversation(start));
  });

  it('of a completion is the beginning of its prompt', () => {
    const prompt = 'x'.repeat(300);
    const completion = (text: string | number[]) => ({ kind: 'completion' as const, body: { prompt: text } });
    expect(conversation(completion(`${prompt} and more`))).toBe(conversation(completion(prompt)));
    expect(conversation(completion([1, 2, 3]))).not.toBe(conversation(completion([1, 2, 4])));
  });

  it('of a user is the user field, and the conversation without one', () => {
    const hello = chat(['user', 'hello']);
    const named = { ...hello, body: { ...hello.body, user: 'ann' } };
    expect(stickyKey('user', caller, named)).toBe(stickyKey('user', { ...caller, keyId: 'k2' }, named));
    expect(stickyKey('user', caller, hello)).toBe(conversation(hello));
    expect(stickyKey('api_key', caller, hello)).not.toBe(
      stickyKey('api_key', { ...caller, keyId: 'k2' }, hello),
    );
  });
});
