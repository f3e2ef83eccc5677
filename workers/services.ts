/** Creates the services of an isolate, once, from its environment; the only place that wires them together. */

import { collectorOf } from '../shared/tracing/traces.ts';
import { createVerifier } from '../shared/wire/service-token.ts';
import { sender } from './backends/attempt.ts';
import { type BackendJobs, createBackendJobs } from './backends/backend-jobs.ts';
import { BackendPool } from './backends/pool.ts';
import { createModels, type Models } from './backends/registry.ts';
import { type SourceHealth, SwrCache, unheard } from './base/swr-cache.ts';
import { createTraces, log, type Traces } from './base/telemetry.ts';
import { createDenseComparison, type DenseComparison } from './counting/compare-dense.ts';
import { type CompletionIds, createCompletionIds, createEvents, type Events } from './counting/events.ts';
import { createTrafficSampler, type TrafficSampler } from './counting/traffic.ts';
import { type Database, d1, openDatabase } from './db/d1.ts';
import { listStarted } from './db/experiment-rows.ts';
import { findApiKey, findSessionEnd, insertSessionEnd } from './db/key-rows.ts';
import { findMaskSet, findMaskSparsity } from './db/mask-set-rows.ts';
import { askForTables, findLive } from './db/publication-rows.ts';
import { insertTrafficSample } from './db/request-rows.ts';
import { findTenant } from './db/tenant-rows.ts';
import { type Config, type Env, parseConfig } from './env.ts';
import { BACKEND_ENCODER_LOAD, BURST, ENCODER_LOAD, MODEL_LIST_ms, READINESS } from './limits.ts';
import { createRunningExperiments, type RunningExperiments } from './routing/assignment.ts';
import { createEmbedder, type Embedder, loadEncoder } from './routing/embed.ts';
import {
  createNamedMasks,
  createRoutingTable,
  type NamedMasks,
  type RoutingTable,
} from './routing/live-sets.ts';
import { type ApiKeys, createApiKeys } from './tenants/api-keys.ts';
import { type Budgets, type BurstLimit, createBudgets, createBurstLimit } from './tenants/budgets.ts';
import { createSessions, type Sessions } from './tenants/sessions.ts';

export type Services = {
  readonly config: Config;
  readonly db: Database;
  readonly apiKeys: ApiKeys;
  readonly table: RoutingTable;
  readonly experiments: RunningExperiments;
  readonly embedder: Embedder;
  readonly models: Models;
  readonly backend: BackendPool;
  /** Cached readiness of backends and D1: all checks within a second share one request to each. */
  readonly reached: { readonly backend: SwrCache<true>; readonly database: SwrCache<true> };
  /** The health of D1, shared by all caches. */
  readonly d1Health: SourceHealth;
  readonly budgets: Budgets;
  readonly bursts: {
    readonly tenant: BurstLimit;
    readonly admin: BurstLimit;
    /** Ratings have a limit, as each needs a database query. */
    readonly feedback: BurstLimit;
  };
  readonly namedMasks: NamedMasks;
  readonly completionIds: CompletionIds;
  readonly events: Events;
  readonly comparison: DenseComparison;
  readonly sessions: Sessions;
  readonly jobs: BackendJobs;
  /** Verifies a backend's token. */
  readonly verifyBackend: ReturnType<typeof createVerifier>;
  readonly traffic: TrafficSampler;
  readonly traces: Traces;
};

const made = new WeakMap<Env, Services>();

/** @throws MaskrouteError `configuration_unavailable` when a variable is missing or wrong. */
export function servicesFor(env: Env): Services {
  const known = made.get(env);
  if (known !== undefined) return known;
  const services = createServices(env);
  made.set(env, services);
  return services;
}

/** The first key signs; the second is also accepted during a rotation. */
const keysOf = (first: string, second: string | undefined): string[] =>
  second === undefined ? [first] : [first, second];

/** Whether `ask` is answered. */
const answers = (what: string, ask: () => Promise<unknown>, health?: SourceHealth): SwrCache<true> =>
  new SwrCache(what, () => ask().then(() => true as const), READINESS, { health });

function createServices(env: Env): Services {
  const config = parseConfig(env);
  if (config.EDGE_URL === undefined) {
    const reason = 'backends cannot fetch masks that they do not know, and such requests run dense';
    log('warn', 'edge_url_missing', { reason });
  }
  const db = openDatabase(env.DB);
  const send = sender(env.BACKEND_NETWORK);
  const backendKeys = keysOf(config.BACKEND_KEY, config.BACKEND_KEY_2);
  /** Limits that share a binding: each counts under names of its own. */
  const fewAtOnce = (what: string) => createBurstLimit(env.ADMIN_BURST, what, BURST.adminAskedEvery);
  const backend = new BackendPool(db, config, send);
  const events = createEvents(env.EVENTS, env.METRICS);
  const d1Health = unheard();
  const table = createRoutingTable(
    {
      findLive: (tenant) => findLive(db, tenant),
      findMaskSet: (owner, version) => findMaskSet(db, owner, version),
    },
    d1Health,
  );
  return {
    config,
    db,
    backend,
    table,
    experiments: createRunningExperiments(
      async () => (await listStarted(db, Date.now())).experiments,
      table,
      d1Health,
    ),
    reached: {
      backend: answers('readiness of the backends', () => backend.askAny('/readyz', READINESS.load_ms)),
      database: answers('the database', () => askForTables(db), d1Health),
    },
    d1Health,
    budgets: createBudgets(env.BUDGETS),
    bursts: {
      tenant: createBurstLimit(
        env.TENANT_BURST,
        'This tenant sends too many requests',
        BURST.tenantAskedEvery,
      ),
      admin: fewAtOnce('This administrator asks for too much'),
      feedback: fewAtOnce('This tenant rates too much'),
    },
    namedMasks: createNamedMasks(
      fewAtOnce('This tenant names too many unknown masks'),
      (id) => table.findMask(id) !== undefined,
      (id) => d1(findMaskSparsity(db, id)),
    ),
    completionIds: createCompletionIds(backendKeys),
    events,
    comparison: createDenseComparison({ backend, events, share: config.COMPARISON_SHARE }),
    sessions: createSessions(
      keysOf(config.ADMIN_KEY, config.ADMIN_KEY_2),
      {
        findEnd: (subject) => findSessionEnd(db, subject),
        saveEnd: (...end) => insertSessionEnd(db, ...end),
        isEnabled: async (tenant) => (await findTenant(db, tenant))?.enabled ?? true,
      },
      d1Health,
    ),
    jobs: createBackendJobs(config.BACKEND_KEY, send),
    verifyBackend: createVerifier(backendKeys, 'edge'),
    traffic: createTrafficSampler((sample) => insertTrafficSample(db, sample)),
    traces: createTraces(collectorOf(config)),
    apiKeys: createApiKeys((sha256) => findApiKey(db, sha256), d1Health),
    embedder: createEmbedder(
      () => loadEncoder(config, env, backend),
      config.ENCODER === 'backend' ? BACKEND_ENCODER_LOAD : ENCODER_LOAD,
    ),
    models: createModels(() => backend.modelLists(MODEL_LIST_ms)),
  };
}
