/** Endpoints without a model call: models and feedback, for clients; masks, for backends; and health, for anybody. */
import { Hono } from 'hono';
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import { MASK_ID_PATTERN } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { feedbackSchema } from '../../shared/wire/openai.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import {
  DENSE_SUFFIX,
  type MaskRecord,
  type ModelEntry,
  splitModelName,
} from '../../shared/wire/protocol.ts';
import { listByName } from '../backends/registry.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { steadyNow_ms, systemTime_ms } from '../base/waiting.ts';
import { ageOf_ms } from '../counting/events.ts';
import { d1, existing } from '../db/d1.ts';
import { findMask } from '../db/mask-set-rows.ts';
import { insertFeedback } from '../db/request-rows.ts';
import { backendOnly, tenantOnly } from '../http/authentication.ts';
import { type AppContext, type AppEnv, holdOf, requestIdHeader } from '../http/context.ts';
import { readJson } from '../http/request-body.ts';
import { EVENTS, READY_TABLE_AGE_MAX_ms } from '../limits.ts';
import type { RoutingTable } from '../routing/live-sets.ts';
import { servicesFor } from '../services.ts';

/** `GET /v1/models`: the backends' models, each also with its `:dense` name. */
export const models = new Hono<AppEnv>()
  .get('/models', tenantOnly, async (c) => c.json({ object: 'list', data: withDense(await list(c)) }))
  .get('/models/:id{.+}', tenantOnly, async (c) => {
    const id = c.req.param('id');
    const entry = withDense(await list(c)).find((candidate) => candidate.id === id);
    if (entry === undefined) {
      throw new MaskrouteError('model_not_found', `There is no model ${id}.`, { param: 'model' });
    }
    return c.json(entry);
  });

/** The models that the caller may use. @throws MaskrouteError `backend_unreachable`. */
async function list(c: AppContext): Promise<readonly ModelEntry[]> {
  const { models } = c.var.caller.policy;
  const served = await listByName(c.var.services.models, holdOf(c));
  return served.filter(({ id }) => models === null || models.includes(splitModelName(id).model));
}

function withDense(entries: readonly ModelEntry[]): ModelEntry[] {
  return entries
    .filter((entry) => !splitModelName(entry.id).dense)
    .flatMap((entry) => [
      entry,
      {
        ...entry,
        id: entry.id + DENSE_SUFFIX,
        ...(entry.maskroute === undefined ? {} : { maskroute: { ...entry.maskroute, dense: true } }),
      },
    ]);
}

/** The bits of a mask id; without D1 if a cached set has the mask. */
export const internal = new Hono<AppEnv>().get('/masks/:id', backendOnly, async (c) => {
  const id = c.req.param('id');
  const { table, db } = c.var.services;
  const find = () => existing(MASK_ID_PATTERN.test(id) ? findMask(db, id) : null, 'There is no such mask.');
  const record = held(table, id) ?? (await find());
  // Immutable: the id is the hash of the content.
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

/* Feedback: a caller rates a completion once. */

export const feedback = new Hono<AppEnv>().post('/feedback', tenantOnly, async (c) => {
  const { id, rating, comment } = parse(feedbackSchema, await readJson(c.req.raw));
  const { caller, services } = c.var;
  // The same error for unknown completions and those of other tenants.
  const request = services.completionIds.eventOf(id, caller.tenant);
  if (request === null) {
    throw new MaskrouteError('not_found', 'There is no such completion.', { param: 'id' });
  }
  if (ageOf_ms(request, Date.now()) > EVENTS.counted_ms) {
    throw new MaskrouteError('not_found', 'The completion is too old to be rated.', { param: 'id' });
  }
  await services.bursts.feedback.enter(`feedback:${caller.tenant}`);
  const { tenant, keyId: key_id } = caller;
  const event = { kind: 'rating', request, tenant, key_id, rating, created_at_ms: Date.now() } as const;
  const kept = insertFeedback(services.db, event, comment ?? null);
  // A stored rating is always counted, even if the client or the time limit of D1 ends the request earlier.
  holdOf(c)(kept.then(() => services.events.send(event)).catch(() => {}));
  await d1(kept);
  return c.json({ object: 'maskroute.feedback', id, rating }, 201);
});

/*
 * Liveness: the worker runs. Readiness: configuration is loaded and a backend can be reached; otherwise the reasons. An
 * edge with a cached routing table serves without the database, so it is ready, and reports since when the database is
 * unreachable and how old the table is.
 */

export const health = new Hono<AppEnv>()
  .get('/healthz', requestIdHeader, (c) => c.json({ status: 'live' }))
  .get('/readyz', requestIdHeader, async (c) => {
    const { checks, routing_table_age_s } = await readiness(c);
    const { database, ...needed } = checks;
    const ready = Object.values(needed).every((check) => check === OK);
    c.header('cache-control', 'no-store');
    return c.json({ status: ready ? 'ready' : 'not_ready', checks, routing_table_age_s }, ready ? 200 : 503);
  });

type Checks = Record<'configuration' | 'routing_table' | 'database' | 'encoder' | 'backend', string>;
type Report = {
  readonly checks: Checks;
  /** How long ago the table was read from the database; null when there is none. */
  readonly routing_table_age_s: number | null;
};
const OK = 'ok';

/** The endpoint is public, so its reasons are general; the log has the details. */
async function readiness(c: AppContext): Promise<Report> {
  const hold = holdOf(c);
  const check = async (name: keyof Checks, work: () => Promise<unknown>, reason: string) => {
    try {
      await work();
      return OK;
    } catch (error) {
      log('warn', 'not_ready', { check: name, reason: reasonOf(error) });
      return reason;
    }
  };
  const configuration = await check(
    'configuration',
    async () => servicesFor(c.env),
    'a variable is missing or wrong',
  );
  if (configuration !== OK) {
    const unknown = 'unknown until the configuration is right';
    const checks = {
      configuration,
      routing_table: unknown,
      database: unknown,
      encoder: unknown,
      backend: unknown,
    };
    return { checks, routing_table_age_s: null };
  }
  const { table, embedder, reached, d1Health } = servicesFor(c.env);
  const [loaded, asked, encoder, backend] = await Promise.all([
    check('routing_table', () => table.liveFor(DEFAULT_TENANT, () => '', hold), 'it cannot be loaded'),
    check('database', () => reached.database.get('', hold), UNREACHABLE),
    check('encoder', () => embedder.encoder(hold), 'the encoder cannot be loaded'),
    check('backend', () => reached.backend.get('', hold), 'no backend is ready'),
  ]);
  const age_ms = table.age_ms(DEFAULT_TENANT);
  const isTooOld = age_ms !== undefined && age_ms > READY_TABLE_AGE_MAX_ms;
  const since = new Date(systemTime_ms(d1Health.failingSince_ms ?? steadyNow_ms())).toISOString();
  const checks = {
    configuration,
    routing_table: loaded === OK && isTooOld ? TOO_OLD : loaded === OK || asked === OK ? loaded : UNREACHABLE,
    database: asked === OK ? OK : `unreachable since ${since}`,
    encoder,
    backend,
  };
  return { checks, routing_table_age_s: age_ms === undefined ? null : Math.round(age_ms / 1000) };
}

const UNREACHABLE = 'the database cannot be reached';
const TOO_OLD = `older than ${READY_TABLE_AGE_MAX_ms / 1000} s, and it cannot be read again`;
