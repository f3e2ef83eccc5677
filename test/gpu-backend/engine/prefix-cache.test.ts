/** Pages alone: real caches, no model. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import type { MaskPlan } from '../../../gpu-backend/engine/engine.ts';
import { type CacheShape, KvCache, tokenBytes } from '../../../gpu-backend/engine/kv-cache.ts';
import {
  keyOf,
  PAGE_TOKENS,
  PrefixCache,
  type PrefixOwner,
} from '../../../gpu-backend/engine/prefix-cache.ts';
import { floats } from '../../../gpu-backend/onnx/session.ts';
import { denseMask, maskFromBits, type SurrogatesId, withSurrogates } from '../../../shared/mask/mask.ts';

const SHAPE: CacheShape = { layerCount: 1, width: 1, contextTokens: 1024, kvType: 'f32' };
const HALVES: CacheShape = { ...SHAPE, kvType: 'f16' };
const owner = (tenant: string, plan: Partial<MaskPlan> = {}): PrefixOwner => ({
  tenant,
  plan: { mask: denseMask(2), kv: 'preserve', ...plan },
});

/** As an engine fills it: K of token t of a prompt is the sum of its first t tokens, V is minus that. */
function filled(tokenIds: readonly number[], from: KvCache): KvCache {
  from.reserve(tokenIds.length - from.length);
  let sum = tokenIds.slice(0, from.length).reduce((all, id) => all + id, 0);
  for (const id of tokenIds.slice(from.length)) {
    sum += id;
    from.write(0, Float32Array.of(sum), 0, 1);
    from.write(1, Float32Array.of(-sum), 0, 1);
    from.advance(1);
  }
  return from;
}
const contents = (cache: KvCache) =>
  cache.past(0).map((buffer) => [...floats(buffer)].slice(0, cache.length));
const prompt = (pages: number, first: number) =>
  Array.from({ length: pages * PAGE_TOKENS + 5 }, (_, i) => (i === 0 ? first : i % 7));

function historyOf(pagesMax: number, shape = SHAPE) {
  let now_ms = 0;
  const prefixes = new PrefixCache(pagesMax * PAGE_TOKENS, () => now_ms);
  return {
    prefixes,
    wait: (ms: number) => {
      now_ms += ms;
    },
    /** As an engine does with a prompt: takes what is known, computes the rest, keeps all. Returns the tokens that were known. */
    run(tenant: string, tokenIds: readonly number[]): number {
      now_ms++;
      const cache = new KvCache(shape);
      cache.reserve(tokenIds.length);
      const known = prefixes.take(owner(tenant), tokenIds, cache);
      filled(tokenIds, cache);
      expect(contents(cache)).toEqual(contents(filled(tokenIds, new KvCache(shape))));
      prefixes.keep(owner(tenant), tokenIds, known, tokenIds.length, cache);
      return known;
    },
    known: (tenant: string, tokenIds: readonly number[]): number => {
      const cache = new KvCache(shape);
      cache.reserve(tokenIds.length);
      return prefixes.take(owner(tenant), tokenIds, cache) / PAGE_TOKENS;
    },
  };
}

test('prompts that begin alike share pages', () => {
  const { run, prefixes } = historyOf(100);
  expect(run('a', prompt(4, 1))).toBe(0);
  expect(prefixes.pageCount).toBe(4);
  const longer = [...prompt(4, 1).slice(0, 3 * PAGE_TOKENS), ...prompt(3, 9)];
  expect(run('a', longer)).toBe(3 * PAGE_TOKENS);
  expect(prefixes.pageCount).toBe(7);
  expect(run('b', longer)).toBe(0);
});

test('the last two tokens of a prompt are always computed', () => {
  const { run } = historyOf(100);
  const whole = prompt(4, 1).slice(0, 4 * PAGE_TOKENS);
  run('a', whole);
  expect(run('a', whole)).toBe(3 * PAGE_TOKENS);
  expect(run('a', [...whole, 3])).toBe(3 * PAGE_TOKENS);
  expect(run('a', [...whole, 3, 3])).toBe(4 * PAGE_TOKENS);
});

test('pages are apart where their K and V are: by tenant, mask, surrogates, and what skipped blocks write', () => {
  const mask = denseMask(2);
  const owners = [
    owner('a'),
    owner('b'),
    owner('a', { kv: 'elide' }),
    owner('a', { mask: maskFromBits(2, '4') }),
    ...['x', 'y'].map((table) => owner('a', { mask: withSurrogates(mask, table as SurrogatesId) })),
  ];
  expect(new Set(owners.map(keyOf)).size).toBe(owners.length);
  expect(keyOf(owner('a', { mask: denseMask(2) }))).toBe(keyOf(owner('a')));
});

test('tenants have as many pages each: a tenant that adds a page gives up a page of its own', () => {
  const { run, known } = historyOf(4);
  run('a', prompt(2, 0));
  run('b', prompt(1, 0));
  run('c', prompt(1, 0));
  run('b', prompt(1, 1));
  expect([known('a', prompt(2, 0)), known('c', prompt(1, 0))]).toEqual([2, 1]);
  expect([known('b', prompt(1, 0)), known('b', prompt(1, 1))]).toEqual([0, 1]);
});

test('a long answer keeps the pages of its prompt in use', () => {
  const { prefixes, run, wait, known } = historyOf(4);
  const tokenIds = prompt(3, 0);
  const cache = filled(tokenIds, new KvCache(SHAPE));
  prefixes.keep(owner('a'), tokenIds, 0, 2 * PAGE_TOKENS, cache);
  wait(11 * 60_000);
  prefixes.keep(owner('a'), tokenIds, 2 * PAGE_TOKENS, 3 * PAGE_TOKENS, cache);
  run('b', prompt(4, 0));
  expect([known('a', tokenIds), known('b', prompt(4, 0))]).toEqual([2, 2]);
});

test('a lone tenant has all the room; who comes gets a share of it, from who has most', () => {
  const { run, known, prefixes } = historyOf(12);
  for (let first = 0; first < 10; first++) run('a', prompt(2, first));
  expect(prefixes.pageCount).toBe(12);
  for (let first = 0; first < 10; first++) run('b', prompt(2, first));
  const pages = (tenant: string) =>
    Array.from({ length: 10 }, (_, first) => known(tenant, prompt(2, first))).reduce((a, b) => a + b);
  expect([pages('a'), pages('b')]).toEqual([6, 6]);
  expect([known('a', prompt(2, 9)), known('a', prompt(2, 0))]).toEqual([2, 0]);
});

test('who has not come for long keeps nobody out', () => {
  const { run, wait, known } = historyOf(4);
  run('gone', prompt(2, 0));
  wait(11 * 60_000);
  run('a', prompt(4, 1));
  expect([known('gone', prompt(2, 0)), known('a', prompt(4, 1))]).toEqual([0, 4]);
});

test('without room nothing is kept', () => {
  const { run, prefixes } = historyOf(0);
  run('a', prompt(3, 0));
  expect([run('a', prompt(3, 0)), prefixes.pageCount]).toEqual([0, 0]);
});

test('halves take half the memory, in caches and in pages', () => {
  const [whole, half] = [SHAPE, HALVES].map((shape) => {
    const cache = filled(prompt(3, 1), new KvCache(shape));
    const page = cache.copyPage(PAGE_TOKENS, PAGE_TOKENS);
    expect(page.byteLength).toBe(PAGE_TOKENS * tokenBytes(shape));
    const again = new KvCache(shape);
    again.reserve(PAGE_TOKENS);
    again.appendPage(page, PAGE_TOKENS);
    expect(contents(again)).toEqual(contents(cache).map((buffer) => buffer.slice(16, 32)));
    return cache.past(0).reduce((sum, { data }) => sum + (data as Float32Array).byteLength, 0);
  });
  expect(half).toBe(whole! / 2);
});

test.each([SHAPE, HALVES])('whoever comes: pages are right, and the bound holds (%o)', (shape) => {
  const act = fc.record({
    tenant: fc.constantFrom('a', 'b', 'c', 'd'),
    first: fc.nat(6),
    pages: fc.integer({ min: 0, max: 6 }),
    branch: fc.nat(3),
  });
  fc.assert(
    fc.property(fc.array(act, { maxLength: 60 }), fc.integer({ min: 1, max: 24 }), (acts, pagesMax) => {
      const { run, prefixes } = historyOf(pagesMax, shape);
      for (const { tenant, first, pages, branch } of acts) {
        // Prompts of one first token begin alike for two pages, and may part there.
        run(tenant, [
          ...prompt(Math.min(pages, 2), first).slice(0, 2 * PAGE_TOKENS),
          ...prompt(pages, branch),
        ]);
        expect(prefixes.pageCount).toBeLessThanOrEqual(pagesMax);
      }
    }),
    { seed: 1107, numRuns: 200 },
  );
});
