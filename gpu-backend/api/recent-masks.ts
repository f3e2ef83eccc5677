/** The masks of recent requests: what this backend works with, which is where their next requests should go. */
import { HOT_MASKS_MAX } from '../../shared/backends.ts';

export type RecentMasks = { used(mask: string): void; list(): string[] };

export function createRecentMasks(): RecentMasks {
  /** The latest is last. */
  const masks = new Set<string>();
  return {
    used(mask) {
      masks.delete(mask);
      if (masks.size >= HOT_MASKS_MAX) masks.delete(masks.values().next().value!);
      masks.add(mask);
    },
    list: () => [...masks].reverse(),
  };
}
