/**
 * The prefix cache: pages of K and V for prompts that begin alike, such as the turns of a conversation or a common system
 * prompt.
 *
 * A page holds K and V of `PAGE_TOKENS` tokens, all layers. Pages form a tree: a page is a child of the page before it and
 * is found by its tokens. A prompt copies the pages that it begins with, computes the rest, and adds its own full pages,
 * those of its answer included. ONNX Runtime's attention needs K and V of a sequence in one piece, so pages are copied into
 * and out of a sequence's cache: 46 kB a token of the default model (half with fp16), in a hundredth of the time that
 * computing them takes.
 *
 * K and V depend on the blocks that run and on the surrogates, so pages are shared only under the same mask plan. They are
 * shared only within a tenant, since response times would otherwise reveal another tenant's prompts.
 *
 * All tenants share one bound. A new page evicts the least recently used page of the tenant that has most. So no tenant can
 * push another below an equal share, and a single tenant may use everything. Only leaves of the tree are evicted, so that
 * all other pages stay reachable.
 */
import { maskBits } from '../../shared/mask/mask.ts';
import type { GenerateRequest, MaskPlan } from './engine.ts';
import type { KvValues, SequenceCache } from './kv-cache.ts';

export const PAGE_TOKENS = 16;
/** With the default model, 46 kB a token: 370 MB when full. */
export const PREFIX_TOKENS_MAX = 8192;

export const pagesOf = (tokens: number): number => Math.ceil(tokens / PAGE_TOKENS);

/** Pages unused for this long are evicted first, whatever their tenant: tenants that left do not take room from others. */
export const IDLE_ms = 10 * 60_000;

/**
 * Which tenants may lose a page: those that have most. If `adding` is one of them, it alone.
 * `counts`: pages by tenant, including the page to be added.
 */
export function losing(counts: ReadonlyMap<string, number>, adding: string): (tenant: string) => boolean {
  const most = Math.max(...counts.values());
  return (tenant) => (counts.get(adding) === most ? tenant === adding : counts.get(tenant) === most);
}

/** Pages are shared only between requests with the same tenant and mask plan. */
export type PrefixOwner = Pick<GenerateRequest, 'tenant' | 'plan'>;

/** The key of a tree of pages. The engine serves one model, so that is not part of it. */
export const keyOf = ({ tenant, plan }: PrefixOwner): string => JSON.stringify([tenant, planKey(plan)]);

const planKey = ({ mask, kv }: MaskPlan): string[] => [kv, mask.surrogates ?? '', maskBits(mask)];

/** `followers`: child pages by their tokens. The root of a tree has no data. */
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

  /** `tokensMax`: size of all pages together, in tokens; 0 disables the cache. */
  constructor(tokensMax: number, now_ms = () => performance.now()) {
    this.pagesMax = Math.floor(tokensMax / PAGE_TOKENS);
    this.#now_ms = now_ms;
  }

  get pageCount(): number {
    return this.#pages.size;
  }

  /**
   * Copies the longest cached prefix of a prompt into an empty cache with enough room. At least two tokens are left to be
   * computed: the last one's logits are needed, and attention sums a single row in another order (`scheduler.ts`).
   * @returns the number of tokens copied.
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

  /** Adds the full pages among the first `computed` tokens of a cache; those before token `from` were offered before. */
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

  /** The memory of an evicted page to reuse; undefined: allocate; `none`: nothing may be evicted for this page. */
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
