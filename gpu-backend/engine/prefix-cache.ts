/**
 * A prompt that begins as an earlier one did (the turns of a conversation, a shared system prompt) takes its K and V over
 * instead of computing them.
 *
 * K and V depend on the blocks that ran and on what stood in for the others, so only a prompt under the same mask can
 * use them; and how soon an answer comes would tell one tenant what another one asked, so only the same tenant's. What
 * is kept are whole chunks as a prompt is computed in: an answer is the same, to the bit, whether its prompt was found
 * or not.
 *
 * Tenants share the room: a prompt takes the place of what was used longest ago, of the tenant that has most of it. So
 * nobody's prompts push out those of a tenant that has its share or less, and a lone tenant has all the room.
 */
import { maskBits } from '../../shared/mask/mask.ts';
import type { GenerateRequest, MaskPlan } from './engine.ts';
import type { KvCache } from './kv-cache.ts';

/** A token takes 46 kB with the default model: 370 MB, once long prompts have filled it. */
export const PREFIX_TOKENS_MAX = 8192;

/** What was not used for so long goes first, whosever it is: who is gone keeps nobody out. */
const IDLE_ms = 10 * 60_000;

/** Whose prompt, and computed how. */
export type PrefixOwner = Pick<GenerateRequest, 'tenant' | 'plan'>;

/** What may be shared: tenant and mask. The model is the engine's own, surrogates included. */
const keyOf = ({ tenant, plan }: PrefixOwner): string => JSON.stringify([tenant, planKey(plan)]);

const planKey = ({ mask, kv }: MaskPlan): string[] => [kv, mask.surrogates ?? '', maskBits(mask)];

type Prefix = {
  readonly tenant: string;
  readonly key: string;
  /** The tokens that others may start with: whole chunks, the first ones of a prompt. */
  readonly tokenIds: Int32Array;
  readonly cache: KvCache;
  usedAt_ms: number;
};

export class PrefixCache {
  readonly #chunkTokens: number;
  readonly #tokensMax: number;
  readonly #now_ms: () => number;
  /** What was used last stands last. */
  #kept: Prefix[] = [];

  /** `tokensMax`: room of all kept caches together, in tokens; 0 keeps none. */
  constructor(
    limits: { readonly chunkTokens: number; readonly tokensMax: number },
    now_ms = () => performance.now(),
  ) {
    this.#now_ms = now_ms;
    this.#chunkTokens = limits.chunkTokens;
    this.#tokensMax = limits.tokensMax;
  }

  /** The longest known beginning of a prompt, in whole chunks; its last token is left to be computed, for its logits. */
  find(
    owner: PrefixOwner,
    prompt: Int32Array,
  ): { readonly cache: KvCache; readonly tokens: number } | undefined {
    const key = keyOf(owner);
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
   * the given one when it says nothing new or has no place, and what it takes the place of.
   */
  keep(owner: PrefixOwner, prompt: Int32Array, computed: number, cache: KvCache): KvCache[] {
    const key = keyOf(owner);
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
    const added = { tenant: owner.tenant, key, tokenIds, cache, usedAt_ms: this.#now_ms() };
    const others = this.#kept.filter((prefix) => !replaced.includes(prefix));
    const stay = this.#fitting(others, added);
    if (stay === undefined) return [cache];
    const free = this.#kept.filter((prefix) => !stay.includes(prefix));
    this.#kept = [...stay, added];
    return free.map((prefix) => prefix.cache);
  }

  /** The prefixes that can stay beside the added one; undefined when the added one has to give way itself. */
  #fitting(kept: readonly Prefix[], added: Prefix): Prefix[] | undefined {
    const stay = [...kept];
    for (;;) {
      const tokens = new Map<string, number>();
      for (const { tenant, cache } of [added, ...stay])
        tokens.set(tenant, (tokens.get(tenant) ?? 0) + cache.capacity_tokens);
      const all = [...tokens.values()].reduce((sum, one) => sum + one, 0);
      if (all <= this.#tokensMax) return stay;
      const most = Math.max(...tokens.values());
      const isIdle = ({ usedAt_ms }: Prefix) => added.usedAt_ms - usedAt_ms > IDLE_ms;
      // Where several tenants have most, the tenant that adds loses.
      const loses = ({ tenant }: Prefix) =>
        tokens.get(added.tenant) === most ? tenant === added.tenant : tokens.get(tenant) === most;
      const idle = stay.findIndex(isIdle);
      const victim = idle < 0 ? stay.findIndex(loses) : idle;
      if (victim < 0) return undefined;
      stay.splice(victim, 1);
    }
  }

  #wholeChunks(tokens: number): number {
    return tokens - (tokens % this.#chunkTokens);
  }

  #touch(prefix: Prefix): void {
    prefix.usedAt_ms = this.#now_ms();
    this.#kept = [...this.#kept.filter((other) => other !== prefix), prefix];
  }
}

function sharedTokens(a: Int32Array, b: Int32Array): number {
  const length = Math.min(a.length, b.length);
  for (let i = 0; i < length; i++) if (a[i] !== b[i]) return i;
  return length;
}
