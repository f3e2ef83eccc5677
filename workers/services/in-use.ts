/** Which publication a tenant's requests are routed by, for those who ask about it; requests have `routing-table.ts`. */
import { DEFAULT_TENANT } from '../../shared/admin.ts';
import { shareAt } from '../../shared/rollout.ts';
import type { Database } from '../db/client.ts';
import { findLive, findPublication, type PublicationState } from '../db/publications.ts';
import { d1 } from './d1.ts';

/**
 * The tenant's own or the default one, and of each what came before while nobody sees the newest yet; null when every
 * request runs dense.
 */
export async function findInUse(
  db: Database,
  tenant: string,
  now_ms: number,
): Promise<PublicationState | null> {
  const newest = await d1(findLive(db, tenant));
  if (newest !== null && shareAt(newest.schedule, now_ms) > 0) return newest;
  if (newest?.previousId != null) return await d1(findPublication(db, newest.previousId));
  return tenant === DEFAULT_TENANT ? null : await findInUse(db, DEFAULT_TENANT, now_ms);
}
