/**
 * The prefix cache in a GPU's memory. Keys, bound and eviction between tenants are those of `prefix-cache.ts`.
 *
 * A copy costs a dispatch for each layer, however small it is. So a sequence is kept as a whole, in one run of a graph: when
 * its prompt is computed, and when it ends. A prompt copies the pages that it shares with the best-matching sequence, in one
 * run as well; K and V never leave the device. A prefix shared by several conversations is kept once for each.
 */
import type { SequenceCache } from './kv-cache.ts';
import { IDLE_ms, keyOf, losing, PAGE_TOKENS, type PrefixOwner } from './prefix-cache.ts';
import type { Prefixes } from './runner-interface.ts';
import { type DeviceCache, type DeviceCaches, type KeptRows, onDevice } from './webgpu-caches.ts';
import { dispose } from './webgpu-copies.ts';

/** K and V of one kept sequence. */
type Kept = {
  readonly tenant: string;
  readonly key: string;
  /** A multiple of `PAGE_TOKENS`. */
  tokens: Int32Array;
  /** Resolves when the copy is made, in turn. */
  rows: Promise<KeptRows>;
  usedAt_ms: number;
};

export class DevicePrefixes implements Prefixes {
  readonly pagesMax: number;
  readonly #caches: DeviceCaches;
  readonly #now_ms: () => number;
  readonly #kept = new Set<Kept>();

  /** `tokensMax`: size of all kept sequences together, in tokens; 0 disables the cache. */
  constructor(caches: DeviceCaches, tokensMax: number, now_ms = () => performance.now()) {
    this.pagesMax = Math.floor(tokensMax / PAGE_TOKENS);
    this.#caches = caches;
    this.#now_ms = now_ms;
  }

  get pageCount(): number {
    return [...this.#kept].reduce((sum, kept) => sum + pagesIn(kept), 0);
  }

  /** As `PrefixCache.take`; the copy is made before the next step. */
  take(owner: PrefixOwner, tokenIds: ArrayLike<number>, cache: SequenceCache): number {
    const usable = Math.max(0, tokenIds.length - 2);
    const found = this.#of(owner).map((kept) => ({
      kept,
      pages: sharedPages(kept.tokens, tokenIds, usable),
    }));
    const best = found.toSorted((a, b) => b.pages - a.pages)[0];
    if (best === undefined || best.pages === 0) return 0;
    best.kept.usedAt_ms = this.#now_ms();
    const own = onDevice(cache);
    own.length = best.pages * PAGE_TOKENS;
    this.#fill(own, best.kept.rows);
    return own.length;
  }

  #fill(cache: DeviceCache, rows: Promise<KeptRows>): void {
    const { lives, length } = cache;
    void this.#caches.inTurn(async () => {
      if (cache.lives !== lives) return;
      try {
        await this.#caches.fill(cache, await rows, length);
      } catch (error) {
        cache.failure = error as Error;
      }
    });
  }

  /** As `PrefixCache.keep`, but only after the last piece of a prompt; single tokens of an answer are ignored. */
  keep(
    owner: PrefixOwner,
    tokenIds: ArrayLike<number>,
    from: number,
    computed: number,
    cache: SequenceCache,
  ): void {
    if (computed - from > 1 && computed === tokenIds.length) this.#keep(owner, tokenIds, onDevice(cache));
  }

  /** Keeps a sequence before its cache is recycled. */
  keepLast(owner: PrefixOwner, tokenIds: ArrayLike<number>, cache: SequenceCache): void {
    this.#keep(owner, tokenIds, onDevice(cache));
  }

  #keep(owner: PrefixOwner, tokenIds: ArrayLike<number>, { place, length, failure }: DeviceCache): void {
    if (place === undefined || failure !== undefined) return;
    const made = this.#newKept(owner, tokenIds, length);
    if (made === undefined) return;
    const rows = this.#caches.inTurn(() => this.#caches.keep(place, made.tokens.length));
    const kept: Kept = { ...made, rows };
    this.#kept.add(kept);
    this.#forgetIfItFails(kept);
  }

  /** A failed copy only costs time: later prompts are computed instead. */
  #forgetIfItFails(kept: Kept): void {
    kept.rows.catch(() => this.#kept.delete(kept));
  }

  /** The part of a sequence to keep, after making room for it; undefined if it is kept already or finds no room. */
  #newKept(
    owner: PrefixOwner,
    tokenIds: ArrayLike<number>,
    computed: number,
  ): Omit<Kept, 'rows'> | undefined {
    const pages = Math.min(Math.floor(computed / PAGE_TOKENS), this.pagesMax);
    const tokens = Int32Array.from({ length: pages * PAGE_TOKENS }, (_, i) => tokenIds[i]!);
    const made = { tenant: owner.tenant, key: keyOf(owner), tokens, usedAt_ms: this.#now_ms() };
    const shared = this.#of(owner).map((kept) => ({
      kept,
      pages: sharedPages(kept.tokens, tokens, tokens.length),
    }));
    const same = shared.find((each) => each.pages === pages);
    if (same !== undefined) same.kept.usedAt_ms = made.usedAt_ms;
    if (pages === 0 || same !== undefined) return undefined;
    for (const each of shared) if (each.pages === pagesIn(each.kept)) this.#shorten(each.kept, 0);
    const left = this.#makeRoom(made);
    return left === 0 ? undefined : { ...made, tokens: tokens.subarray(0, left * PAGE_TOKENS) };
  }

  #of(owner: PrefixOwner): Kept[] {
    const key = keyOf(owner);
    return [...this.#kept].filter((kept) => kept.key === key);
  }

  /** Evicts page by page, from the new sequence too. @returns how many pages of the new one may stay. */
  #makeRoom(made: Omit<Kept, 'rows'>): number {
    const pages = new Map([...this.#kept, made].map((kept) => [kept, pagesIn(kept)]));
    let over = [...pages.values()].reduce((sum, count) => sum + count, 0) - this.pagesMax;
    for (; over > 0; over--) {
      const loser = this.#loser(pages, made.tenant);
      pages.set(loser, pages.get(loser)! - 1);
    }
    for (const kept of this.#kept) this.#shorten(kept, pages.get(kept)!);
    return pages.get(made)!;
  }

  /** Which sequence loses its last page: an idle sequence, else the least recently used one of a tenant that loses. */
  #loser<T extends Omit<Kept, 'rows'>>(pages: ReadonlyMap<T, number>, adding: string): T {
    const byUse = [...pages.keys()]
      .filter((kept) => pages.get(kept)! > 0)
      .toSorted((a, b) => a.usedAt_ms - b.usedAt_ms);
    const oldest = byUse[0]!;
    if (this.#now_ms() - oldest.usedAt_ms > IDLE_ms) return oldest;
    const all = new Map<string, number>();
    for (const kept of byUse) all.set(kept.tenant, (all.get(kept.tenant) ?? 0) + pages.get(kept)!);
    const loses = losing(all, adding);
    return byUse.find(({ tenant }) => loses(tenant))!;
  }

  /** Shortens a kept sequence to `pages` pages; 0 removes it. */
  #shorten(kept: Kept, pages: number): void {
    if (pages === pagesIn(kept)) return;
    const { rows } = kept;
    const tokens = pages * PAGE_TOKENS;
    kept.tokens = kept.tokens.subarray(0, tokens);
    if (pages > 0) {
      kept.rows = this.#caches.inTurn(async () => this.#caches.shorten(await rows, tokens));
      this.#forgetIfItFails(kept);
      return;
    }
    this.#kept.delete(kept);
    this.#caches.inTurn(async () => dispose(await rows)).catch(() => undefined);
  }
}

const pagesIn = ({ tokens }: Pick<Kept, 'tokens'>): number => tokens.length / PAGE_TOKENS;

/** The number of full pages that two sequences have in common from the start, within `most` tokens. */
function sharedPages(a: ArrayLike<number>, b: ArrayLike<number>, most: number): number {
  const end = Math.min(a.length, b.length, most);
  let same = 0;
  while (same < end && a[same] === b[same]) same++;
  return Math.floor(same / PAGE_TOKENS);
}
