/**
 * The playground's key: an ordinary tenant key, so that budgets and routing are the tenant's. It is made when it is
 * first needed, lives an hour, and exists in this page's memory only.
 */
import { createdKeySchema } from '../../../shared/admin.ts';
import { admin } from '../api.ts';

const LIFETIME_ms = 3_600_000;
/** A key about to expire is not used for a long answer. */
const SPARE_ms = 300_000;

const held = new Map<string, { readonly key: string; readonly expiresAt_ms: number }>();

/** @throws ApiError when the edge makes none. */
export async function playgroundKey(tenant: string): Promise<string> {
  const known = held.get(tenant);
  if (known !== undefined && known.expiresAt_ms - Date.now() > SPARE_ms) return known.key;
  const expiresAt_ms = Date.now() + LIFETIME_ms;
  const body = {
    kind: 'tenant',
    tenant,
    name: 'Playground',
    expires_at: new Date(expiresAt_ms).toISOString(),
  };
  const { key } = await admin(createdKeySchema, '/keys', { method: 'POST', body });
  held.set(tenant, { key, expiresAt_ms });
  return key;
}
