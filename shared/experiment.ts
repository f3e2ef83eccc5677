/**
 * Sticky A/B assignment: hash(experiment, sticky key) picks the variant, never a coin a request.
 * The same key always gets the same variant, and shares follow the weights.
 */
import { sha256 } from '@noble/hashes/sha2.js';
import { utf8ToBytes } from '@noble/hashes/utils.js';

export type Variant = { readonly name: string; readonly weight: number };

/** A number in [0, 1) from 48 bits of SHA-256 over `experiment`, a zero byte and `stickyKey`. */
export function stickyFraction(experiment: string, stickyKey: string): number {
  const digest = sha256(utf8ToBytes(`${experiment}\u0000${stickyKey}`));
  let value = 0;
  for (let i = 0; i < 6; i++) value = value * 256 + digest[i]!;
  return value / 2 ** 48;
}

/** @throws RangeError when no variant has a positive weight. */
export function assignVariant<V extends Variant>(
  experiment: string,
  variants: readonly V[],
  stickyKey: string,
): V {
  const total = variants.reduce((sum, variant) => sum + Math.max(0, variant.weight), 0);
  if (!(total > 0)) throw new RangeError(`experiment ${experiment} has no variant with a positive weight`);
  let left = stickyFraction(experiment, stickyKey) * total;
  for (const variant of variants) {
    left -= Math.max(0, variant.weight);
    if (left < 0) return variant;
  }
  return variants.findLast((variant) => variant.weight > 0)!;
}

/** Whom, what and where an experiment is about; an empty list is no limit. Times are milliseconds. */
export type Scope = {
  readonly tenants: readonly string[];
  readonly models: readonly string[];
  readonly regions: readonly Place[];
  readonly startsAt_ms: number;
  /** Infinity: until it is stopped. */
  readonly endsAt_ms: number;
};
/** A place, known as precisely as it is: a scope names one of the three, a request has all that are known. */
export type Place = {
  readonly continent?: string | undefined;
  readonly country?: string | undefined;
  readonly colo?: string | undefined;
};
const PLACE_KINDS = ['continent', 'country', 'colo'] as const;

export type ScopedRequest = { readonly tenant: string; readonly model: string; readonly place: Place };

export const isInScope = (scope: Scope, request: ScopedRequest, now_ms: number): boolean =>
  scope.startsAt_ms <= now_ms &&
  now_ms < scope.endsAt_ms &&
  isListed(scope.tenants, request.tenant) &&
  isListed(scope.models, request.model) &&
  (scope.regions.length === 0 || scope.regions.some((region) => isWithin(request.place, region)));

const isListed = (list: readonly string[], item: string): boolean => list.length === 0 || list.includes(item);

const isWithin = (place: Place, region: Place): boolean =>
  PLACE_KINDS.every((kind) => region[kind] === undefined || region[kind] === place[kind]);

/**
 * Whether one request could be in both. Places of different kinds may hold one another (nothing here knows
 * which country a data centre is in), so they count as overlapping.
 */
export const overlap = (a: Scope, b: Scope): boolean =>
  a.startsAt_ms < b.endsAt_ms &&
  b.startsAt_ms < a.endsAt_ms &&
  share(a.tenants, b.tenants) &&
  share(a.models, b.models) &&
  (a.regions.length === 0 ||
    b.regions.length === 0 ||
    a.regions.some((one) => b.regions.some((other) => mayMeet(one, other))));

const share = (a: readonly string[], b: readonly string[]): boolean =>
  a.length === 0 || b.length === 0 || a.some((item) => b.includes(item));

const mayMeet = (a: Place, b: Place): boolean =>
  PLACE_KINDS.every((kind) => a[kind] === undefined || b[kind] === undefined || a[kind] === b[kind]);
