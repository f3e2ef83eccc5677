/**
 * Which backend a request goes to, and which come next if that fails: by region, then by mask (so that one
 * backend's requests share masks), then by load; behind all of these those that drain. Pure: what is known of backends
 * comes in, an order comes out.
 *
 * Mask affinity is weighted rendezvous hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016): a mask
 * has its backend, but one that has a quarter more than the average of its region passes requests on.
 */

import { stickyFraction } from '../../shared/mask/sticky.ts';
import { ANYWHERE } from '../../shared/wire/backend-load.ts';
import { LOCAL_REGION } from '../base/place.ts';

export type Candidate = {
  readonly id: string;
  readonly regions: readonly string[];
  readonly weight: number;
  /** Requests that it works on or that wait there. */
  readonly load: number;
  /** Requests in its line: more would only wait. */
  readonly waiting: number;
  readonly isHot: (mask: string) => boolean;
  /** It is about to be gone, and would refuse. */
  readonly isDraining: boolean;
  /** Undefined: not known. */
  readonly models: ReadonlySet<string> | undefined;
};

export type Wish = {
  /** As `regionOf` gives it: `EU/DE/FRA`. */
  readonly region: string;
  readonly mask: string;
  /** Undefined: any will do. */
  readonly model: string | undefined;
};

/** How far a load may be above the average. */
const SLACK = 1.25;

/** Lower is nearer: the data centre, the country, the continent, everywhere, elsewhere. */
export function regionDistance(regions: readonly string[], region: string): number {
  const steps = [...(region === LOCAL_REGION ? [] : region.split('/').reverse()), ANYWHERE];
  const found = steps.findIndex((step) => regions.includes(step));
  return found === -1 ? steps.length : found;
}

/** Farther than any region: who would refuse is no nearer for being next door. */
const DRAINING_DISTANCE = 100;

const distance = ({ regions, isDraining }: Candidate, region: string): number =>
  regionDistance(regions, region) + (isDraining ? DRAINING_DISTANCE : 0);

/** All of them, the best first. Backends that are known to serve other models only come if nobody else is left. */
export function orderBackends<C extends Candidate>(candidates: readonly C[], wish: Wish): C[] {
  if (candidates.length < 2) return [...candidates];
  const { model } = wish;
  const serving = candidates.filter(
    ({ models }) => model === undefined || models === undefined || models.has(model),
  );
  const pool = serving.length === 0 ? candidates : serving;
  const tiers = Map.groupBy(pool, (candidate) => distance(candidate, wish.region));
  return [...tiers].sort(([near], [far]) => near - far).flatMap(([, tier]) => orderTier(tier, wish.mask));
}

function orderTier<C extends Candidate>(tier: readonly C[], mask: string): C[] {
  const weights = tier.reduce((sum, { weight }) => sum + weight, 0);
  const loads = tier.reduce((sum, { load }) => sum + load, 0);
  const ranked = tier.map((candidate) => {
    const { id, weight, load, waiting } = candidate;
    const bound = Math.ceil(SLACK * (loads + 1) * (weight / weights));
    return {
      candidate,
      isFull: waiting > 0 || load + 1 > Math.max(bound, 1),
      pressure: load / weight,
      isHot: candidate.isHot(mask),
      // Weighted rendezvous: the largest -w / ln(u) wins with probability w / Σw.
      score: -weight / Math.log(stickyFraction(id, mask) || Number.MIN_VALUE),
    };
  });
  ranked.sort((a, b) => {
    if (a.isFull !== b.isFull) return a.isFull ? 1 : -1;
    if (a.isFull) return a.pressure - b.pressure || b.score - a.score;
    if (a.isHot !== b.isHot) return a.isHot ? -1 : 1;
    return b.score - a.score;
  });
  return ranked.map(({ candidate }) => candidate);
}
