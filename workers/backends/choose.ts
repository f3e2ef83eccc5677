/**
 * Orders the backends for a request: by region, then by conversation (so that a conversation finds its KV cache pages),
 * then by load; draining and silent backends come last. A pure function of what is known about backends.
 *
 * A conversation's backend follows from weighted rendezvous hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam
 * 2016): a backend with waiting requests, or with 25 % more load than its region's average, is passed over.
 */
import { conversationKey, type StickySource, stickyFraction } from '../../shared/mask/sticky.ts';
import { ANYWHERE, type BackendAffinity } from '../../shared/wire/backend-load.ts';
import type { ModelEntry } from '../../shared/wire/protocol.ts';
import { LOCAL_REGION } from '../base/place.ts';
import { sha256Hex } from '../base/secrets.ts';

export type Candidate = {
  readonly id: string;
  readonly regions: readonly string[];
  readonly weight: number;
  /** Its running and waiting requests. */
  readonly load: number;
  /** Its waiting requests; more would only wait. */
  readonly waiting: number;
  /** It is shutting down and would refuse, or it does not answer. */
  readonly isAway: boolean;
  /** What it lists, by the model's name; undefined: not known. */
  readonly models: ServedModels | undefined;
};

/** An entry is undefined for a backend that does not say which weights it serves. */
export type ServedModels = ReadonlyMap<string, ModelEntry['maskroute']>;

/** What a backend must serve so that it can use a mask: the model's weights, and the mask's surrogates if it has any. */
export type MaskNeeds = { readonly modelHash: string; readonly surrogates: string | undefined };

export type Wish = {
  /** The request's region, as `regionOf` returns it: `EU/DE/FRA`. */
  readonly region: string;
  /** Undefined: any model. */
  readonly model: string | undefined;
  /** Undefined: any weights will do. */
  readonly needs: MaskNeeds | undefined;
  /** Requests with the same key go to the same backend, as long as it has room. */
  readonly key: string;
};

/**
 * The key of a conversation's KV cache pages: tenant, mask and conversation. The conversation is identified by its
 * opening, which all its later requests repeat, so isolates agree without shared state.
 */
export const pagesKey = (tenant: string, mask: string, conversation: StickySource): string =>
  sha256Hex(`${mask}\u0000${conversationKey(tenant, conversation)}`);

/** A backend is passed over above this multiple of the average load. */
const SLACK = 1.25;
/**
 * A load that is always acceptable. Two streams in one step hardly slow each other, and a load report may count a
 * request that has just ended: neither is worth recomputing a conversation's cache elsewhere.
 */
const ROOM = 2;

/** Lower is nearer: the data centre, the country, the continent, everywhere, elsewhere. */
export function regionDistance(regions: readonly string[], region: string): number {
  const steps = [...(region === LOCAL_REGION ? [] : region.split('/').reverse()), ANYWHERE];
  const found = steps.findIndex((step) => regions.includes(step));
  return found === -1 ? steps.length : found;
}

/** Farther than any region: a backend that is away would not answer, wherever it is. */
const AWAY_DISTANCE = 100;

const distance = ({ regions, isAway }: Candidate, region: string): number =>
  regionDistance(regions, region) + (isAway ? AWAY_DISTANCE : 0);

/**
 * All of them, the best first. Backends that are known not to serve the model are included only if there are no others.
 *
 * Backends may serve different weights under one name, for example while one after the other gets new ones. Those that
 * can use the mask come first, wherever they are, unless requests wait there: the last one of the old weights must not
 * get the traffic of all.
 */
export function orderBackends<C extends Candidate>(candidates: readonly C[], wish: Wish): C[] {
  if (candidates.length < 2) return [...candidates];
  const { model } = wish;
  const serving = candidates.filter(
    ({ models }) => model === undefined || models === undefined || models.has(model),
  );
  const pool = serving.length === 0 ? candidates : serving;
  if (pool.every((candidate) => canUseMask(candidate, wish))) return orderPool(pool, wish);
  const isFirst = (one: C) => canUseMask(one, wish) && one.waiting === 0 && !one.isAway;
  const { first = [], later = [] } = Object.groupBy(pool, (one) => (isFirst(one) ? 'first' : 'later'));
  return [...orderPool(first, wish), ...orderPool(later, wish)];
}

/** Whether a backend can use the mask, as far as it is known. */
export function canUseMask({ models }: Candidate, { model, needs }: Wish): boolean {
  const served = model === undefined ? undefined : models?.get(model);
  if (needs === undefined || served === undefined) return true;
  const { modelHash, surrogates } = needs;
  return served.hash === modelHash && (surrogates === undefined || served.surrogates === surrogates);
}

function orderPool<C extends Candidate>(pool: readonly C[], wish: Wish): C[] {
  const tiers = Map.groupBy(pool, (candidate) => distance(candidate, wish.region));
  return [...tiers].sort(([near], [far]) => near - far).flatMap(([, tier]) => orderTier(tier, wish.key));
}

function orderTier<C extends Candidate>(tier: readonly C[], key: string): C[] {
  if (tier.length < 2) return [...tier];
  const weights = tier.reduce((sum, { weight }) => sum + weight, 0);
  const loads = tier.reduce((sum, { load }) => sum + load, 0);
  const ranked = tier.map((candidate) => {
    const { id, weight, load, waiting } = candidate;
    const bound = Math.ceil(SLACK * (loads + 1) * (weight / weights));
    return {
      candidate,
      isFull: waiting > 0 || load + 1 > Math.max(bound, ROOM),
      pressure: load / weight,
      // Weighted rendezvous: the largest -w / ln(u) wins with probability w / Σw.
      score: -weight / Math.log(stickyFraction(id, key) || Number.MIN_VALUE),
    };
  });
  ranked.sort((a, b) => {
    if (a.isFull !== b.isFull) return a.isFull ? 1 : -1;
    if (a.isFull) return a.pressure - b.pressure || b.score - a.score;
    return b.score - a.score;
  });
  return ranked.map(({ candidate }) => candidate);
}

/** The backend of a conversation while all are well and idle; undefined without a choice. */
export function homeOf(candidates: readonly Candidate[], wish: Wish): string | undefined {
  if (candidates.length < 2) return undefined;
  const idle = candidates.map((candidate) => ({ ...candidate, load: 0, waiting: 0, isAway: false }));
  return orderBackends(idle, wish)[0]!.id;
}

/** How an answer that came from `backend` relates to the conversation's home, if there is one. */
export function affinityOf(
  backend: string,
  home: string | undefined,
  isHomeFull: boolean,
): BackendAffinity | undefined {
  if (home === undefined) return undefined;
  if (backend === home) return 'hit';
  return isHomeFull ? 'overflow' : 'failover';
}
