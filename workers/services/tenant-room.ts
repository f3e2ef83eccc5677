/**
 * What a tenant's own administrators may store, so that none of them fills the database that all tenants share. Whoever
 * administrates everything is not held to it, and may store for a tenant that has no room left.
 */
import { MaskrouteError } from '../../shared/errors.ts';
import type { Database } from '../db/client.ts';
import { findStored, type Stored } from '../db/stored.ts';
import { TENANT_ROOM } from '../limits.ts';
import { d1 } from './d1.ts';

const NAMES = {
  keys: 'keys',
  experiments: 'experiments',
  maskSets_bytes: 'bytes of mask sets',
} satisfies Record<keyof Stored, string>;

/**
 * Some requests at once may each find the last room and go past it by so many.
 * `tenant`: whose administrator asks; undefined for one of everything.
 * @throws MaskrouteError `conflict` when there is no room.
 */
export async function requireRoom(
  db: Database,
  tenant: string | undefined,
  what: keyof Stored,
  more = 1,
): Promise<void> {
  if (tenant === undefined) return;
  const stored = await d1(findStored(db, tenant));
  if (stored[what] + more <= TENANT_ROOM[what]) return;
  const message = `A tenant stores at most ${TENANT_ROOM[what]} ${NAMES[what]} itself; ask who runs the edge.`;
  throw new MaskrouteError('conflict', message);
}
