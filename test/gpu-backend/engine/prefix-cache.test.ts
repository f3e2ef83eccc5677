/** The room for prompts alone: real caches, no model. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { KvCache } from '../../../gpu-backend/engine/kv-cache.ts';
import { PrefixCache, type PrefixOwner } from '../../../gpu-backend/engine/prefix-cache.ts';
import { denseMask } from '../../../shared/mask/mask.ts';

const CHUNK = 4;
const owner = (tenant: string): PrefixOwner => ({ tenant, plan: { mask: denseMask(2), kv: 'preserve' } });
/** A cache has 256, 512 or 1024 tokens of room. */
function cacheOf(tokens: number): KvCache {
  const cache = new KvCache({ layerCount: 1, width: 1, contextTokens: 1024 });
  cache.reserve(tokens);
  return cache;
}
const prompt = (first: number) => Int32Array.from([first, 1, 2, 3, 4]);

/** Keeps and finds as told, and knows what is kept from what came back. */
function historyOf(tokensMax: number) {
  let now_ms = 0;
  const prefixes = new PrefixCache({ chunkTokens: CHUNK, tokensMax }, () => now_ms);
  const kept = new Map<KvCache, { readonly tenant: string; readonly first: number }>();
  const tokensOf = (tenant: string) =>
    [...kept].reduce((sum, [cache, of]) => sum + (of.tenant === tenant ? cache.capacity_tokens : 0), 0);
  return {
    kept,
    tokensOf,
    wait: (ms: number) => {
      now_ms += ms;
    },
    find: (tenant: string, first: number) => prefixes.find(owner(tenant), prompt(first)),
    /** What was let go. */
    keep(tenant: string, first: number, tokens: number) {
      const cache = cacheOf(tokens);
      const gone = prefixes
        .keep(owner(tenant), prompt(first), 5, cache)
        .map((free) => ({ cache: free, tenant, ...kept.get(free) }));
      kept.set(cache, { tenant, first });
      for (const free of gone) kept.delete(free.cache);
      return gone;
    },
  };
}

test('a lone tenant has all the room; who comes gets a share of it, from who has most', () => {
  const history = historyOf(2048);
  for (let first = 0; first < 10; first++) history.keep('a', first, 200);
  expect(history.tokensOf('a')).toBe(2048);
  for (let first = 0; first < 10; first++) history.keep('b', first, 200);
  expect([history.tokensOf('a'), history.tokensOf('b')]).toEqual([1024, 1024]);
  for (let first = 0; first < 10; first++) history.keep('c', first, 200);
  expect(history.tokensOf('c')).toBe(512);
  expect(history.find('a', 9)).toBeDefined();
  expect(history.find('a', 0)).toBeUndefined();
});

test('a prompt larger than what its tenant can have leaves all as it is', () => {
  const history = historyOf(2048);
  for (let first = 0; first < 4; first++) history.keep('a', first, 200);
  for (let first = 0; first < 3; first++) history.keep('b', first, 200);
  expect(history.keep('b', 9, 1024)).toHaveLength(3);
  const full = historyOf(1024);
  full.keep('a', 0, 500);
  full.keep('b', 0, 200);
  expect(full.keep('c', 0, 1024)).toHaveLength(1);
  expect([full.tokensOf('a'), full.tokensOf('b'), full.tokensOf('c')]).toEqual([512, 256, 0]);
});

test('who has not come for long keeps nobody out', () => {
  const history = historyOf(1024);
  history.keep('gone', 0, 500);
  history.wait(11 * 60_000);
  for (let first = 0; first < 4; first++) history.keep('a', first, 200);
  expect([history.tokensOf('gone'), history.tokensOf('a')]).toEqual([0, 1024]);
});

test('whoever comes: the room is kept to, and nobody loses to others what is no more than a share', () => {
  const act = fc.record({
    tenant: fc.constantFrom('a', 'b', 'c', 'd'),
    first: fc.nat(30),
    tokens: fc.constantFrom(200, 300, 600),
    finds: fc.boolean(),
  });
  fc.assert(
    fc.property(fc.array(act, { maxLength: 120 }), (acts) => {
      const history = historyOf(4096);
      for (const { tenant, first, tokens, finds } of acts) {
        const before = new Map(['a', 'b', 'c', 'd'].map((one) => [one, history.tokensOf(one)]));
        const holders = [...before].filter(([one, has]) => has > 0 || one === tenant).length;
        const known = [...history.kept.values()].some((of) => of.tenant === tenant && of.first === first);
        expect(history.find(tenant, first) !== undefined).toBe(known);
        if (finds) continue;
        for (const lost of history.keep(tenant, first, tokens)) {
          if (lost.tenant !== tenant) expect(before.get(lost.tenant)).toBeGreaterThan(4096 / holders);
        }
        const all = [...history.kept.keys()].reduce((sum, cache) => sum + cache.capacity_tokens, 0);
        expect(all).toBeLessThanOrEqual(4096);
      }
    }),
    { seed: 1107, numRuns: 200 },
  );
});
