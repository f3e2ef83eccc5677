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
