/**
 * Which backend a request goes to, and which come next if that fails: by region, then by conversation (so that a
 * conversation finds its pages of keys and values), then by load; backends that drain or say nothing come last. Pure:
 * what is known of backends comes in, an order comes out.
 *
 * A conversation's place is weighted rendezvous hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016): it has
 * its backend, but a backend with a line, or with a quarter more load than the average of its region, passes requests on.
 */
import { conversationKey, type StickySource, stickyFraction } from '../../shared/mask/sticky.ts';
import { ANYWHERE, type BackendAffinity } from '../../shared/wire/backend-load.ts';
import { LOCAL_REGION } from '../base/place.ts';
import { sha256Hex } from '../base/secrets.ts';

export type Candidate = {
  readonly id: string;
  readonly regions: readonly string[];
  readonly weight: number;
  /** Requests that it works on or that wait there. */
  readonly load: number;
  /** Requests in its line: more would only wait. */
  readonly waiting: number;
  /** It is about to be gone and would refuse, or it is gone already. */
  readonly isAway: boolean;
  /** Undefined: not known. */
  readonly models: ReadonlySet<string> | undefined;
};

export type Wish = {
  /** As `regionOf` gives it: `EU/DE/FRA`. */
  readonly region: string;
  /** Undefined: any will do. */
  readonly model: string | undefined;
  /** Requests with the same one have the same backend, as long as it has room. */
  readonly key: string;
};

/**
 * What a backend keeps pages by: the tenant, the mask, and the conversation. It is named by its opening, which all
 * its later requests repeat, so that isolates agree with nothing remembered.
 */
export const pagesKey = (tenant: string, mask: string, conversation: StickySource): string =>
  sha256Hex(`${mask}\u0000${conversationKey(tenant, conversation)}`);

/** How far a load may be above the average. */
const SLACK = 1.25;
/**
 * A load that is never too much. Two streams in one step hardly slow each other, and a report of a request that has ended
 * counts one more until the next report: neither is worth computing a conversation anew.
 */
const ROOM = 2;

/** Lower is nearer: the data centre, the country, the continent, everywhere, elsewhere. */
export function regionDistance(regions: readonly string[], region: string): number {
  const steps = [...(region === LOCAL_REGION ? [] : region.split('/').reverse()), ANYWHERE];
  const found = steps.findIndex((step) => regions.includes(step));
  return found === -1 ? steps.length : found;
}

/** Farther than any region: who would not answer is no nearer for being next door. */
const AWAY_DISTANCE = 100;

const distance = ({ regions, isAway }: Candidate, region: string): number =>
  regionDistance(regions, region) + (isAway ? AWAY_DISTANCE : 0);

/** All of them, the best first. Backends that are known to serve other models only come if nobody else is left. */
export function orderBackends<C extends Candidate>(candidates: readonly C[], wish: Wish): C[] {
  if (candidates.length < 2) return [...candidates];
  const { model } = wish;
  const serving = candidates.filter(
    ({ models }) => model === undefined || models === undefined || models.has(model),
  );
  const pool = serving.length === 0 ? candidates : serving;
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
