/** Assignment: shares as the weights say, the same variant for the same key, and experiments that never meet. */
import { describe, expect, it } from 'vitest';
import { assignVariant, isInScope, overlap, type Scope } from '../../shared/experiment.ts';

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
    ...{ tenants: [], models: [], regions: [], startsAt_ms: 0, endsAt_ms: 100 },
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
