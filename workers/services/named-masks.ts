/**
 * Masks that clients name. Naming one that no live set here has costs the database a question (the edge's for a tenant
 * with a ceiling, else the backend's), and names can be made up: so of each tenant only so many are let through, but for
 * those that turned out to be masks, which may come as often as anything.
 */
import { LRUCache } from 'lru-cache';
import { DENSE_MASK_ID } from '../../shared/mask.ts';
import { NAMED_MASKS_MAX } from '../limits.ts';
import type { BurstLimit } from './burst.ts';

export interface NamedMasks {
  /**
   * Undefined when nobody need be asked, which is at once.
   * @throws MaskrouteError `rate_limit_exceeded`.
   */
  enter(tenant: string, id: string): Promise<void> | undefined;
  /** A backend worked with it. */
  met(id: string): void;
  /** Null when nobody knows the mask. */
  sparsityOf(id: string): Promise<number | null>;
}

export function createNamedMasks(
  burst: BurstLimit,
  isHeld: (id: string) => boolean,
  find: (id: string) => Promise<number | null>,
): NamedMasks {
  /** Their sparsities where they were asked for: an id is its content's hash. */
  const known = new LRUCache<string, { readonly sparsity: number | null }>({ max: NAMED_MASKS_MAX });
  return {
    enter: (tenant, id) =>
      id === DENSE_MASK_ID || known.has(id) || isHeld(id) ? undefined : burst.enter(`mask:${tenant}`),
    met(id) {
      if (!known.has(id)) known.set(id, { sparsity: null });
    },
    async sparsityOf(id) {
      const sparsity = known.get(id)?.sparsity ?? (await find(id));
      if (sparsity !== null) known.set(id, { sparsity });
      return sparsity;
    },
  };
}
