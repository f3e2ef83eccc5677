/**
 * Checks that all resources of the admin API share: whether the endpoint takes a query, which tenant the caller may
 * access, how much it may store, and which page of a list it requests; and warnings when a tenant's limits conflict
 * with its live mask set.
 */
import { createMiddleware } from 'hono/factory';
import { matchedRoutes } from 'hono/route';
import { z } from 'zod';
import {
  DEFAULT_TENANT,
  type Tenant,
  type TenantWarning,
  tenantPageQuerySchema,
  tenantQuerySchema,
  writeCursor,
} from '../../shared/admin/admin-wire.ts';
import { GROUPS } from '../../shared/openapi/endpoints.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { type Database, d1, findStored, type Page, type Stored } from '../db/d1.ts';
import { findLive } from '../db/publication-rows.ts';
import { tenantExists } from '../db/tenant-rows.ts';
import type { AppContext, AppEnv } from '../http/context.ts';
import { readQuery } from '../http/request-body.ts';
import { TENANT_ROOM } from '../limits.ts';
import { isOverCeiling, meetsFloor, percent } from '../routing/decision.ts';
import type { LiveSet, RoutingTable } from '../routing/live-sets.ts';

/**
 * The tenant that a request is about: the one it names, or the caller's own.
 * @throws MaskrouteError `forbidden` when that is not the caller's, `not_found` when there is no such tenant.
 */
export async function scopedTenant(c: AppContext, named: string | undefined): Promise<string> {
  const own = c.get('admin').tenant;
  if (own !== undefined) {
    if (named !== undefined && named !== DEFAULT_TENANT && named !== own) throw forbidden();
    return own;
  }
  const tenant = named ?? DEFAULT_TENANT;
  if (tenant !== DEFAULT_TENANT && !(await d1(tenantExists(c.get('services').db, tenant)))) {
    throw new MaskrouteError('not_found', `There is no tenant ${tenant}.`, { param: 'tenant' });
  }
  return tenant;
}

/**
 * Like {@link scopedTenant}, but a request that names no tenant is about all that its caller may see; undefined: all
 * tenants.
 */
export async function scopedTenantOrAll(
  c: AppContext,
  named: string | undefined,
): Promise<string | undefined> {
  const tenant = await scopedTenant(c, named);
  return tenant === DEFAULT_TENANT ? undefined : tenant;
}

/** @throws MaskrouteError `forbidden` for a tenant's own administrator. */
export function requireGlobal(c: AppContext): void {
  if (c.get('admin').tenant !== undefined) throw forbidden();
}

const forbidden = () => new MaskrouteError('forbidden', 'This key administrates its own tenant only.');

/** The endpoints of the API's document, by method and route as the app has it. */
const ENDPOINTS = new Map(
  GROUPS.flatMap(({ endpoints }) => endpoints).map((endpoint) => [
    `${endpoint.method} ${endpoint.path.replaceAll(/\{(\w+)\}/g, ':$1')}`,
    endpoint,
  ]),
);

/** The pattern of the request's route, without its parameters' values; undefined when there is no such route. */
export const routeOf = (c: AppContext): string | undefined =>
  matchedRoutes(c)
    .map(({ path }) => path)
    .find((path) => !path.endsWith('*'));

/**
 * Refuses a query where the API's document has none: it would be ignored, and a change meant for a tenant would be the
 * default's. Where it has one, `readQuery` checks it.
 * @throws MaskrouteError `invalid_request`.
 */
export const noStrayQuery = createMiddleware<AppEnv>(async (c, next) => {
  const [name] = Object.keys(c.req.query());
  const method = c.req.method === 'HEAD' ? 'GET' : c.req.method;
  const endpoint = name === undefined ? undefined : ENDPOINTS.get(`${method} ${routeOf(c)}`);
  if (name !== undefined && endpoint !== undefined && endpoint.query === undefined) {
    const { body } = endpoint;
    const isInBody = body instanceof z.ZodObject && 'tenant' in body.shape;
    const advice = isInBody ? '; name the tenant in its body' : '';
    throw new MaskrouteError('invalid_request', `${name}: this request takes no query${advice}.`, {
      param: name,
    });
  }
  await next();
});

export const tenantPageQuery = (c: AppContext) => readQuery(c, tenantPageQuerySchema);
/** The tenant in the query of a single resource, which takes nothing else. */
export const namedTenant = (c: AppContext): string | undefined => readQuery(c, tenantQuerySchema).tenant;

/** A page in the wire format. */
export const listed = <T>({ data, next }: Page<T>) => ({
  object: 'list' as const,
  data,
  has_more: next !== null,
  next: next === null ? null : writeCursor(next),
});

/* How much the administrators of one tenant may store in the database that all tenants share. */

const NAMES = {
  keys: 'keys',
  experiments: 'experiments',
  maskSets_bytes: 'bytes of mask sets',
} satisfies Record<keyof Stored, string>;

/**
 * Checks a tenant's storage limit. Concurrent requests may exceed it slightly. `tenant`: the caller's tenant; undefined
 * for administrators of all tenants, who have no limit. `more`: how much the request adds; 0 needs no room.
 * @throws MaskrouteError `conflict` when there is no room.
 */
export async function requireRoom(
  db: Database,
  tenant: string | undefined,
  what: keyof Stored,
  more = 1,
): Promise<void> {
  if (tenant === undefined || more <= 0) return;
  const stored = await d1(findStored(db, tenant));
  if (stored[what] + more <= TENANT_ROOM[what]) return;
  const message = `A tenant stores at most ${TENANT_ROOM[what]} ${NAMES[what]} itself; ask the edge's operator.`;
  throw new MaskrouteError('conflict', message);
}

/*
 * A tenant's limits may be tightened at any time and hold for every request from then on. Tightening is never refused;
 * the answer has warnings about its effect.
 */

type WarningParts = { readonly db: Database; readonly table: RoutingTable };

/** Undefined when the live set cannot be read; the tenant is shown all the same. */
export async function tenantWarnings(
  { db, table }: WarningParts,
  tenant: Tenant,
): Promise<TenantWarning[] | undefined> {
  try {
    const live = (await d1(findLive(db, tenant.id))) ?? (await d1(findLive(db, DEFAULT_TENANT)));
    if (live === null) return [];
    return warningsOf(await d1(table.versionOf(live.owner, live.version)), tenant);
  } catch (error) {
    log('warn', 'tenant_warnings_unknown', { tenant: tenant.id, reason: reasonOf(error) });
    return undefined;
  }
}

function warningsOf(
  { version, model, agreement, clusters }: LiveSet,
  { models, sparsity_max, agreement_min }: Pick<Tenant, 'models' | 'sparsity_max' | 'agreement_min'>,
): TenantWarning[] {
  const warnings: TenantWarning[] = [];
  if (!meetsFloor({ agreement }, agreement_min)) {
    const figure = agreement === null ? 'an unknown share' : percent(agreement);
    const message =
      `The live set ${version} agrees with dense on ${figure} of held-out tokens, less than ` +
      `${percent(agreement_min ?? 0)}: requests run dense (under_floor).`;
    warnings.push({ code: 'quality_below_floor', message });
  }
  const sparser = clusters.filter(({ sparsity }) => isOverCeiling(sparsity, sparsity_max)).length;
  if (sparser > 0) {
    const instead = sparser === clusters.length ? 'dense (over_ceiling)' : 'under the nearest other mask';
    const message =
      `${sparser} of the ${clusters.length} masks of the live set ${version} skip more than ` +
      `${percent(sparsity_max ?? 0)} of the blocks: their requests run ${instead}.`;
    warnings.push({ code: 'sparsity_over_ceiling', message });
  }
  if (models !== null && !models.includes(model.name)) {
    const message = `The live set ${version} is for ${model.name}, which this tenant may not use.`;
    warnings.push({ code: 'model_not_allowed', message });
  }
  return warnings;
}
