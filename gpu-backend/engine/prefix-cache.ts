/**
 * Pages of K and V that prompts which begin alike share: the turns of a conversation, a common system prompt.
 *
 * A page holds the K and V of `PAGE_TOKENS` tokens, in all layers. Pages hang in a tree: a page belongs behind the one
 * before it, and is found by its own tokens. A prompt takes over the pages that it begins with, computes what is new, and
 * leaves its own whole pages here, its answer's too. ONNX Runtime's attention reads K and V of a sequence in one piece, so
 * pages are copied into a sequence's cache and out of it as they are: 46 kB a token of the default model, half of it where
 * K and V are halves, a hundredth of the time that computing them takes.
 *
 * K and V depend on the blocks that ran and on what stood in for the others, so only a prompt under the same mask can
 * use them; and how soon an answer comes would tell one tenant what another one asked, so only the same tenant's.
 *
 * There is one bound for all pages. Tenants share it: a page takes the place of what was used longest ago, of the tenant
 * that has most. So nobody's prompts push out those of a tenant that has its share or less, and a lone tenant has all the
 * room. Only pages without followers go: what is left can be reached.
 */
import { maskBits } from '../../shared/mask/mask.ts';
import type { GenerateRequest, MaskPlan } from './engine.ts';
import type { KvValues, SequenceCache } from './kv-cache.ts';

export const PAGE_TOKENS = 16;
/** A token takes 46 kB with the default model: 370 MB, once pages have filled it. */
export const PREFIX_TOKENS_MAX = 8192;

export const pagesOf = (tokens: number): number => Math.ceil(tokens / PAGE_TOKENS);

/** What was not used for so long goes first, whosever it is: who is gone keeps nobody out. */
export const IDLE_ms = 10 * 60_000;

/**
 * Which tenants lose a page when there is no room: who has most of them. Where several have, `adding` loses, if it is one of them.
 * `counts`: pages by tenant, those that are added counted.
 */
export function losing(counts: ReadonlyMap<string, number>, adding: string): (tenant: string) => boolean {
  const most = Math.max(...counts.values());
  return (tenant) => (counts.get(adding) === most ? tenant === adding : counts.get(tenant) === most);
}

/** Whose prompt, and computed how. */
export type PrefixOwner = Pick<GenerateRequest, 'tenant' | 'plan'>;

/** What may be shared: tenant and mask. The model is the engine's own, surrogates included. */
export const keyOf = ({ tenant, plan }: PrefixOwner): string => JSON.stringify([tenant, planKey(plan)]);

const planKey = ({ mask, kv }: MaskPlan): string[] => [kv, mask.surrogates ?? '', maskBits(mask)];

/** `followers` by their tokens. The root of a tree has no data. */
type Tree = { readonly followers: Map<string, Page> };
type Page = Tree & {
  readonly tenant: string;
  readonly key: string;
  readonly before: Tree;
  readonly name: string;
  readonly data: KvValues;
  usedAt_ms: number;
};

export class PrefixCache {
  readonly pagesMax: number;
  readonly #now_ms: () => number;
  readonly #trees = new Map<string, Tree>();
  readonly #pages = new Set<Page>();

  /** `tokensMax`: room of all pages together, in tokens; 0 keeps none. */
  constructor(tokensMax: number, now_ms = () => performance.now()) {
    this.pagesMax = Math.floor(tokensMax / PAGE_TOKENS);
    this.#now_ms = now_ms;
  }

  get pageCount(): number {
    return this.#pages.size;
  }

  /**
   * Copies the longest known beginning of a prompt into an empty cache that has room for it; returns how many tokens that
   * is. Two tokens are left to be computed: the last one's logits are wanted, and a lone row is summed otherwise
   * (`scheduler.ts`).
   */
  take(owner: PrefixOwner, tokenIds: ArrayLike<number>, cache: SequenceCache): number {
    let tree = this.#trees.get(keyOf(owner));
    for (let at = 0; at + PAGE_TOKENS + 2 <= tokenIds.length; at += PAGE_TOKENS) {
      const page = tree?.followers.get(nameOf(tokenIds, at));
      if (page === undefined) break;
      page.usedAt_ms = this.#now_ms();
      cache.appendPage(page.data, PAGE_TOKENS);
      tree = page;
    }
    return cache.length;
  }

  /** Keeps the whole pages among the first `computed` tokens of a cache; those before token `from` are here already or gone. */
  keep(
    owner: PrefixOwner,
    tokenIds: ArrayLike<number>,
    from: number,
    computed: number,
    cache: SequenceCache,
  ): void {
    if (this.pagesMax === 0 || Math.floor(from / PAGE_TOKENS) === Math.floor(computed / PAGE_TOKENS)) return;
    const now_ms = this.#now_ms();
    const key = keyOf(owner);
    let tree: Tree = this.#trees.get(key) ?? { followers: new Map() };
    this.#trees.set(key, tree);
    for (let at = 0; at + PAGE_TOKENS <= computed; at += PAGE_TOKENS) {
      const name = nameOf(tokenIds, at);
      let page = tree.followers.get(name);
      if (page === undefined && at + PAGE_TOKENS <= from) break;
      if (page === undefined) {
        const room = this.#room(owner.tenant, now_ms, tree);
        if (room === 'none') break;
        const data = cache.copyPage(at, PAGE_TOKENS, room);
        page = {
          tenant: owner.tenant,
          key,
          before: tree,
          name,
          data,
          followers: new Map(),
          usedAt_ms: now_ms,
        };
        tree.followers.set(name, page);
        this.#pages.add(page);
      }
      page.usedAt_ms = now_ms;
      tree = page;
    }
    if (this.#trees.get(key)!.followers.size === 0) this.#trees.delete(key);
  }

  /** The memory of a page that gave way, undefined for new memory, or `none` when the new page has to give way itself. */
  #room(tenant: string, now_ms: number, behind: Tree): KvValues | undefined | 'none' {
    if (this.#pages.size < this.pagesMax) return undefined;
    const victim = this.#victim(tenant, now_ms, behind);
    if (victim === undefined) return 'none';
    this.#pages.delete(victim);
    victim.before.followers.delete(victim.name);
    const isRoot = victim.before === this.#trees.get(victim.key);
    if (isRoot && victim.before !== behind && victim.before.followers.size === 0)
      this.#trees.delete(victim.key);
    return victim.data;
  }

  #victim(tenant: string, now_ms: number, behind: Tree): Page | undefined {
    const counts = new Map<string, number>([[tenant, 1]]);
    for (const page of this.#pages) counts.set(page.tenant, (counts.get(page.tenant) ?? 0) + 1);
    const loses = losing(counts, tenant);
    let oldest: Page | undefined;
    for (const page of this.#pages) {
      if (page.followers.size > 0 || page === behind) continue;
      const isIdle = now_ms - page.usedAt_ms > IDLE_ms;
      if ((isIdle || loses(page.tenant)) && page.usedAt_ms < (oldest?.usedAt_ms ?? Number.POSITIVE_INFINITY))
        oldest = page;
    }
    return oldest;
  }
}

function nameOf(tokenIds: ArrayLike<number>, at: number): string {
  let name = '';
  for (let i = at; i < at + PAGE_TOKENS; i++) name += `${tokenIds[i]!.toString(36)} `;
  return name;
}
