/** The mask set that the requests of the tenant in view are routed by: its own, or the default one. */
import { type PublicationInUse, publicationInUseSchema } from '../../shared/admin.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask-set.ts';
import { ApiError, admin, query } from './api.ts';
import { useScope } from './context.ts';
import { type Load, useLoad } from './use-load.ts';

export type LiveSet = { readonly publication: PublicationInUse; readonly set: MaskSet };

/** Null when nothing is live. */
export function useLiveSet(): Load<LiveSet | null> & { readonly reload: () => void } {
  const { tenant } = useScope();
  return useLoad((signal) => loadLive(tenant, signal), [tenant]);
}

async function loadLive(tenant: string, signal: AbortSignal): Promise<LiveSet | null> {
  const publication = await publicationInUse(tenant, signal);
  if (publication === null) return null;
  const path = `/mask-sets/${publication.version}${query({ tenant })}`;
  return { publication, set: await admin(maskSetSchema, path, { signal }) };
}

/** Null when nothing is live. @throws ApiError */
export async function publicationInUse(
  tenant: string,
  signal: AbortSignal,
): Promise<PublicationInUse | null> {
  try {
    return await admin(publicationInUseSchema, `/publications/in-use${query({ tenant })}`, { signal });
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null;
    throw error;
  }
}
