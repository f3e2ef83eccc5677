/** Experiments: drafts can be created and changed; started experiments can only be stopped. */
import { Hono } from 'hono';
import { z } from 'zod';
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import {
  changeExperimentSchema,
  createExperimentSchema,
  type ExperimentDefinition,
  type ExperimentResults,
  experimentDefinitionSchema,
  resultsQuerySchema,
} from '../../shared/admin/experiment-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { experimentResults } from '../counting/side-by-side.ts';
import { d1, existing } from '../db/d1.ts';
import {
  changeDraft,
  deleteDraft,
  findExperiment,
  findExperimentsOfAnybody,
  insertExperiment,
  listExperiments,
  type StoredExperiment,
  toExperiment,
} from '../db/experiment-rows.ts';
import { latenciesOfVariants } from '../db/latencies.ts';
import { sumsOfVariants } from '../db/outcomes.ts';
import { tenantExists } from '../db/tenant-rows.ts';
import { type AppContext, type AppEnv, holdOf } from '../http/context.ts';
import { readJson, readQuery } from '../http/request-body.ts';
import { requireReadable, start, stop } from '../releases/experiment-life.ts';
import {
  listed,
  namedTenant,
  requireRoom,
  scopedTenant,
  scopedTenantOrAll,
  tenantPageQuery,
} from './scope.ts';

export const experiments = new Hono<AppEnv>()
  .post('/', async (c) => {
    const { id, tenant, ...definition } = parse(createExperimentSchema, await readJson(c.req.raw));
    const owner = await scopedTenant(c, tenant);
    await checkDefinition(c, owner, definition);
    await requireRoom(c.var.services.db, c.var.admin.tenant, 'experiments');
    const draft = { id, owner, definition, createdAt_ms: Date.now(), actor: c.var.admin.actor };
    return answer(c, await d1(insertExperiment(c.var.services.db, draft)), 201);
  })
  .get('/', async (c) => {
    const { tenant, ...page } = tenantPageQuery(c);
    const owner = await scopedTenantOrAll(c, tenant);
    const { data, next } = await d1(listExperiments(c.var.services.db, owner, page));
    const now_ms = Date.now();
    return c.json(listed({ data: data.map((experiment) => toExperiment(experiment, now_ms)), next }));
  })
  .get('/:id', async (c) => answer(c, await find(c, namedTenant(c))))
  .patch('/:id', async (c) => {
    const draft = await find(c, namedTenant(c));
    // What this version cannot read it would drop.
    requireReadable(draft);
    // One schema finds unknown fields and wrong values, so that the error names all at once.
    const change = parse(z.record(z.string(), z.unknown()), await readJson(c.req.raw));
    const { shape } = changeExperimentSchema;
    const merged = Object.entries({ ...draft.definition, ...change }).filter(
      ([name, value]) => value !== null || !Object.hasOwn(shape, name),
    );
    const definition = parse(experimentDefinitionSchema, Object.fromEntries(merged));
    await checkDefinition(c, draft.owner, definition);
    if (!(await d1(changeDraft(c.var.services.db, draft, definition)))) {
      throw draft.startsAt_ms === null ? changedMeanwhile(draft.id) : started(draft.id);
    }
    return answer(c, { ...draft, definition });
  })
  .delete('/:id', async (c) => {
    const draft = await find(c, namedTenant(c));
    if (!(await d1(deleteDraft(c.var.services.db, draft)))) throw started(draft.id);
    return answer(c, draft);
  })
  .get('/:id/results', async (c) => {
    const query = readQuery(c, resultsQuerySchema);
    const experiment = await find(c, query.tenant);
    requireReadable(experiment);
    const region = (query.region ?? '').replace(/\/+$/, '');
    const { db } = c.var.services;
    const counted = Promise.all([
      sumsOfVariants(db, experiment, region),
      latenciesOfVariants(db, experiment, region),
    ]);
    const [sums, latencies] = await d1(counted);
    const { id, definition } = experiment;
    return c.json(experimentResults(id, definition, region, sums, latencies) satisfies ExperimentResults);
  })
  .post('/:id/start', async (c) =>
    answer(c, await start(c.var.services, await find(c, namedTenant(c)), holdOf(c))),
  )
  .post('/:id/stop', async (c) =>
    answer(c, await stop(c.var.services, await find(c, namedTenant(c)), holdOf(c))),
  );

const answer = (c: AppContext, experiment: StoredExperiment, status: 200 | 201 = 200): Response =>
  c.json(toExperiment(experiment, Date.now()), status);

/**
 * The experiment of the caller's tenant, or of the named tenant. For an administrator of the edge who names none it is
 * the experiment that belongs to no tenant, or else the only one with this id.
 * @throws MaskrouteError `not_found`, `conflict` when several tenants have it, and what `scopedTenant` throws.
 */
async function find(c: AppContext, named: string | undefined): Promise<StoredExperiment> {
  const found = await findStored(c, named);
  c.set('before', toExperiment(found, Date.now()));
  return found;
}

async function findStored(c: AppContext, named: string | undefined): Promise<StoredExperiment> {
  const { db } = c.var.services;
  const id = c.req.param('id') ?? '';
  if (named !== undefined || c.var.admin.tenant !== undefined) {
    const owner = await scopedTenant(c, named);
    return await existing(findExperiment(db, { owner, id }), NOT_FOUND);
  }
  const [first, second] = await d1(findExperimentsOfAnybody(db, id));
  if (first === undefined) throw new MaskrouteError('not_found', NOT_FOUND);
  if (first.owner === DEFAULT_TENANT || second === undefined) return first;
  const message = `Several tenants have an experiment ${id}: say which with ?tenant=.`;
  throw new MaskrouteError('conflict', message, { param: 'tenant' });
}

const NOT_FOUND = 'There is no such experiment.';

/** @throws MaskrouteError `invalid_request` or `not_found` for tenants that cannot take part. */
async function checkDefinition(
  c: AppContext,
  owner: string,
  definition: ExperimentDefinition,
): Promise<void> {
  if (owner !== DEFAULT_TENANT && definition.tenants.length > 0) {
    const message = "tenants: a tenant's own experiment is on that tenant alone.";
    throw new MaskrouteError('invalid_request', message, { param: 'tenants' });
  }
  for (const tenant of definition.tenants) {
    if (await d1(tenantExists(c.var.services.db, tenant))) continue;
    throw new MaskrouteError('not_found', `There is no tenant ${tenant}.`, { param: 'tenants' });
  }
}

const changedMeanwhile = (id: string) =>
  new MaskrouteError('conflict', `${id} was changed or started meanwhile; look at it and try again.`);

const started = (id: string) =>
  new MaskrouteError('conflict', `${id} was started, so it stays as it is; stop it and make another.`);
