/**
 * Masks that clients name. A mask that no live set here has costs the database a question (the edge's for a tenant
 * with a ceiling, else the backend's), and names can be made up: so of each tenant only so many are let through, but for
 * those that turned out to be masks, which may come as often as anything.
 */
import { LRUCache } from 'lru-cache';
import { DENSE_MASK_ID } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { createVerifier, isFor } from '../../shared/wire/service-token.ts';
import type { Config } from '../env.ts';
import { NAMED_MASKS_MAX } from '../limits.ts';
import type { BurstLimit } from '../tenants/bursts.ts';

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

/* Masks that backends ask for. */

/**
 * Lets backends ask for masks, with a token that one of them signed for this edge and for that alone; a token of the edge
 * itself, for a backend, opens nothing here, and neither does the backend key. A token may come twice: what it gets is
 * what its id says, every time, and isolates share no memory of those that were used.
 * The result throws MaskrouteError `invalid_api_key`, `expired_token`, or `configuration_unavailable` when nobody said
 * which address is this edge's.
 */
export function createMaskDoor({
  BACKEND_KEY,
  BACKEND_KEY_2,
  EDGE_URL,
}: Pick<Config, 'BACKEND_KEY' | 'BACKEND_KEY_2' | 'EDGE_URL'>): (token: string) => Promise<void> {
  const verify = createVerifier(
    [BACKEND_KEY, ...(BACKEND_KEY_2 === undefined ? [] : [BACKEND_KEY_2])],
    'edge',
  );
  return async (token) => {
    const claims = await verify(token, Math.floor(Date.now() / 1000));
    if (claims.scope !== 'masks') {
      throw new MaskrouteError('invalid_api_key', 'The service token is not for masks.');
    }
    if (EDGE_URL === undefined) {
      const message = 'This edge does not know its own address: EDGE_URL is not configured.';
      throw new MaskrouteError('configuration_unavailable', message);
    }
    if (!isFor(claims, EDGE_URL)) {
      throw new MaskrouteError('invalid_api_key', 'The service token is for another edge.');
    }
  };
}
