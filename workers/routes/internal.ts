/** What backends ask: the bits of a mask id. Sets that the isolate holds answer without D1. */
import { Hono } from 'hono';
import { MaskrouteError } from '../../shared/errors.ts';
import { MASK_ID_PATTERN } from '../../shared/mask.ts';
import type { MaskRecord } from '../../shared/protocol.ts';
import type { AppEnv } from '../context.ts';
import { findMask } from '../db/mask-sets.ts';
import { backendOnly } from '../middleware/authenticate.ts';
import { d1 } from '../services/d1.ts';
import type { RoutingTable } from '../services/routing-table.ts';

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
