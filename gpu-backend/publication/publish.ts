/**
 * Publishing: the set is stored under its content address, then one pointer is flipped at the edge. Every
 * step may be repeated; two publishers at once get a `conflict`, never a mixture.
 */
import {
  type LivePublication,
  listSchema,
  livePublicationSchema,
  maskSetSummarySchema,
  type Publication,
  publicationSchema,
  publishCheckSchema,
} from '../../shared/admin.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import { type EvaluationFigures, evaluatedRowSchema } from '../../shared/evaluation.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask-set.ts';
import { type AdminClient, listAll } from './admin-client.ts';
import type { PublishSchedule } from './schedule.ts';

export type PublishOutcome = {
  readonly version: string;
  /**
   * `stored`: not live; `activated`: live since now; `scheduled`: not seen by everyone yet; `already_live`:
   * nothing was changed; `bounds_changed`: nothing but the bounds of a version that everyone saw.
   */
  readonly state: 'stored' | 'activated' | 'scheduled' | 'already_live' | 'bounds_changed';
  readonly replacedVersion: string | null;
};

/** @throws MaskrouteError as the edge words it: another model or encoder, `conflict`, no right to. */
export async function publishMaskSet(
  client: AdminClient,
  set: MaskSet,
  options: { readonly tenant: string; readonly activate: boolean; readonly schedule?: PublishSchedule },
): Promise<PublishOutcome> {
  const { tenant, activate, schedule } = options;
  const version = maskSetVersion(set);
  const live = await livePublication(client, tenant);
  await storeMaskSet(client, set, tenant);
  const common = { version, tenant, activate, expected_version: live?.version ?? null };
  const request = (more: PublishSchedule | undefined) =>
    ({ method: 'POST', path: '/publications', body: { ...common, ...more } }) as const;
  // One that only some see yet goes live for everyone, or by another schedule.
  if (live?.version === version && live.share === 1) {
    const bounds = schedule?.auto_rollback;
    if (!activate || bounds === undefined) return { version, state: 'already_live', replacedVersion: null };
    await client.request(request({ auto_rollback: bounds }), publicationSchema);
    return { version, state: 'bounds_changed', replacedVersion: null };
  }
  if (!activate) {
    await client.request(request(schedule), publishCheckSchema);
    return { version, state: 'stored', replacedVersion: null };
  }
  const publication = await client.request(request(schedule), publicationSchema);
  const isGradual = publication.rollout.length > 0 || publication.activate_at > publication.created_at;
  const state = isGradual ? 'scheduled' : 'activated';
  return { version, state, replacedVersion: publication.replaced_version };
}

/** Not live yet; the same set again is the same. @throws MaskrouteError as the edge words it. */
export async function storeMaskSet(client: AdminClient, set: MaskSet, tenant: string): Promise<void> {
  await client.request(
    { method: 'POST', path: `/mask-sets${tenantQuery(tenant)}`, body: set },
    maskSetSummarySchema,
  );
}

/** Of a stored set; in place of what was measured of it before. @throws MaskrouteError as the edge words it. */
export async function storeEvaluation(
  client: AdminClient,
  version: string,
  figures: EvaluationFigures,
  tenant: string,
): Promise<void> {
  const path = `/mask-sets/${version}/evaluation${tenantQuery(tenant)}`;
  await client.request({ method: 'PUT', path, body: figures }, listSchema(evaluatedRowSchema));
}

/** Makes the version live that was live before. @throws MaskrouteError `conflict` when nothing came before. */
export async function rollBack(client: AdminClient, tenant: string): Promise<Publication> {
  const live = await livePublication(client, tenant);
  const body = { tenant, expected_version: live?.version ?? null };
  return client.request({ method: 'POST', path: '/publications/rollback', body }, publicationSchema);
}

/** `undefined` when nothing was published. */
export async function livePublication(
  client: AdminClient,
  tenant: string,
): Promise<LivePublication | undefined> {
  try {
    return await client.request(
      { method: 'GET', path: `/publications/live${tenantQuery(tenant)}` },
      livePublicationSchema,
    );
  } catch (error) {
    if (error instanceof MaskrouteError && error.code === 'not_found') return undefined;
    throw error;
  }
}

/** Newest first. */
export const publicationHistory = (client: AdminClient, tenant: string): Promise<Publication[]> =>
  listAll(client, `/publications${tenantQuery(tenant)}`, publicationSchema);

const tenantQuery = (tenant: string): string =>
  tenant === '' ? '' : `?tenant=${encodeURIComponent(tenant)}`;
