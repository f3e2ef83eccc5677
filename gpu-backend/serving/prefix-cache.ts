/**
 * Prompts that begin as one that was computed already, the turns of a conversation or a shared system prompt, take its
 * K and V over instead of computing them.
 *
 * K and V depend on the blocks that ran and on what stood in for the others, so only a prompt under the same mask can
 * use them; and how soon an answer comes would tell one tenant what another one asked, so only the same tenant's. What
 * is kept are whole chunks as a prompt is computed in: an answer is the same, to the bit, whether its prompt was found
 * or not.
 */
import { maskBits } from '../../shared/mask.ts';
import type { KvCache } from '../engine/kv-cache.ts';
import type { MaskPlan } from '../engine/types.ts';
import type { GenerateRequest } from './engine.ts';

/** A token takes 46 kB with the default model: 370 MB, once long prompts have filled it. */
export const PREFIX_TOKENS_MAX = 8192;

/** What may be shared: tenant and mask. The model is the engine's own, surrogates included. */
export type PrefixKey = string & { readonly brand: 'PrefixKey' };

export function prefixKey({ tenant, plan }: Pick<GenerateRequest, 'tenant' | 'plan'>): PrefixKey {
  return JSON.stringify([tenant, planKey(plan)]) as PrefixKey;
}

const planKey = ({ mask, kv }: MaskPlan): string[] => [kv, mask.surrogates ?? '', maskBits(mask)];

export type Prefix = {
  readonly key: PrefixKey;
  /** The tokens that others may start with: whole chunks, the first ones of a prompt. */
  readonly tokenIds: Int32Array;
  readonly cache: KvCache;
};

export class PrefixCache {
  readonly #chunkTokens: number;
  readonly #tokensMax: number;
  /** What was used last stands last. */
  #kept: Prefix[] = [];

  /** `tokensMax`: room of all kept caches together, in tokens; 0 keeps none. */
  constructor(limits: { readonly chunkTokens: number; readonly tokensMax: number }) {
    this.#chunkTokens = limits.chunkTokens;
    this.#tokensMax = limits.tokensMax;
  }

  /** Room that is taken, in tokens. */
  get #tokens(): number {
    return this.#kept.reduce((sum, { cache }) => sum + cache.capacity_tokens, 0);
  }

  /** The longest known beginning of a prompt, in whole chunks; its last token is left to be computed, for its logits. */
  find(key: PrefixKey, prompt: Int32Array): { readonly cache: KvCache; readonly tokens: number } | undefined {
    let best: { readonly prefix: Prefix; readonly tokens: number } | undefined;
    for (const prefix of this.#kept) {
      if (prefix.key !== key) continue;
      const shared = sharedTokens(prefix.tokenIds, prompt.subarray(0, -1));
      const tokens = this.#wholeChunks(shared);
      if (tokens > (best?.tokens ?? 0)) best = { prefix, tokens };
    }
    if (best === undefined) return undefined;
    this.#touch(best.prefix);
    return { cache: best.prefix.cache, tokens: best.tokens };
  }

  /**
   * Takes a cache over, whose first `computed` tokens came from `prompt` in chunks. Returns the caches that are free now:
   * the given one when it says nothing new, and what it takes the place of.
   */
  keep(key: PrefixKey, prompt: Int32Array, computed: number, cache: KvCache): KvCache[] {
    const tokenIds = prompt.slice(0, this.#wholeChunks(Math.min(computed, prompt.length)));
    if (tokenIds.length === 0 || cache.capacity_tokens > this.#tokensMax) return [cache];
    const same = this.#kept.filter((prefix) => prefix.key === key);
    const longer = same.find((prefix) => sharedTokens(prefix.tokenIds, tokenIds) === tokenIds.length);
    if (longer !== undefined) {
      this.#touch(longer);
      return [cache];
    }
    const replaced = same.filter(
      (prefix) => sharedTokens(prefix.tokenIds, tokenIds) === prefix.tokenIds.length,
    );
    const free = replaced.map((prefix) => this.#drop(prefix));
    while (this.#tokens + cache.capacity_tokens > this.#tokensMax) free.push(this.#drop(this.#kept[0]!));
    this.#kept.push({ key, tokenIds, cache });
    return free;
  }

  #wholeChunks(tokens: number): number {
    return tokens - (tokens % this.#chunkTokens);
  }

  #touch(prefix: Prefix): void {
    this.#drop(prefix);
    this.#kept.push(prefix);
  }

  #drop(prefix: Prefix): KvCache {
    this.#kept = this.#kept.filter((other) => other !== prefix);
    return prefix.cache;
  }
}

function sharedTokens(a: Int32Array, b: Int32Array): number {
  const length = Math.min(a.length, b.length);
  for (let i = 0; i < length; i++) if (a[i] !== b[i]) return i;
  return length;
}
