/**
 * Masks that clients name. Naming one that no live set here has costs the database a question (the edge's for a tenant
 * with a ceiling, else the backend's), and names can be made up: so of each tenant only so many are let through, but for
 * those that turned out to be masks, which may come as often as anything.
 */

import { Hono } from 'hono';
import { LRUCache } from 'lru-cache';
import { DENSE_MASK_ID, MASK_ID_PATTERN } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { MaskRecord } from '../../shared/wire/protocol.ts';
import { d1 } from '../db/d1.ts';
import { findMask } from '../db/mask-set-rows.ts';
import { backendOnly } from '../http/authentication.ts';
import type { AppEnv } from '../http/context.ts';
import { NAMED_MASKS_MAX } from '../limits.ts';
import type { BurstLimit } from '../tenants/bursts.ts';
import type { RoutingTable } from './live-sets.ts';

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

/* What backends ask: the bits of a mask id. Sets that the isolate holds answer without D1. */

export const internal = new Hono<AppEnv>().get('/masks/:id', backendOnly, async (c) => {
  const id = c.req.param('id');
  const { table, db } = c.var.services;
  const record = MASK_ID_PATTERN.test(id) ? (held(table, id) ?? (await d1(findMask(db, id)))) : null;
  if (record === null) throw new MaskrouteError('not_found', 'There is no such mask.');
  // The id is the hash of the content.
  c.header('cache-control', 'private, max-age=31536000, immutable');
  return c.json(record satisfies MaskRecord);
});

function held(table: RoutingTable, id: string): MaskRecord | undefined {
  const found = table.findMask(id);
  if (found === undefined || found.cluster.mask === 'dense') return undefined;
  const { hash, blockCount } = found.set.model;
  const surrogates = found.set.surrogates ?? null;
  return { id, modelHash: hash, blockCount, bits: found.cluster.bits, surrogates };
}
