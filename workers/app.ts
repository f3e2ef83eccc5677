/** Composes the edge. Health and pages come before the services, so that they also work when a variable is wrong. */
import { Hono } from 'hono';
import { audit, audited } from './admin/audit.ts';
import { backends } from './admin/backends.ts';
import { drift, ratings, requests, models as servedModels, stats, traffic, usage } from './admin/counted.ts';
import { experiments } from './admin/experiments.ts';
import { maskSets, publications } from './admin/releases.ts';
import { noStrayQuery } from './admin/scope.ts';
import { keys, ownSessions, tenants } from './admin/tenants.ts';
import { adminOnly, mayChange, noStore } from './http/authentication.ts';
import {
  type AppEnv,
  browsers,
  onError,
  onNotFound,
  requestId,
  requestIdHeader,
  services,
} from './http/context.ts';
import { dashboard, site } from './http/dashboard-page.ts';
import { unreadBody } from './http/request-body.ts';
import { completions, dryRun } from './requests/complete.ts';
import { feedback, health, internal, models } from './requests/small-endpoints.ts';

/* The admin API; `shared/admin/admin-wire.ts` describes it. */

const admin = new Hono<AppEnv>()
  .use(noStore)
  .use(adminOnly)
  .use(mayChange)
  .use(noStrayQuery)
  .use(audited)
  .route('/tenants', tenants)
  .route('/keys', keys)
  .route('/sessions', ownSessions)
  .route('/usage', usage)
  .route('/mask-sets', maskSets)
  .route('/publications', publications)
  .route('/backends', backends)
  .route('/experiments', experiments)
  .route('/audit', audit)
  .route('/requests', requests)
  .route('/ratings', ratings)
  .route('/models', servedModels)
  .route('/stats', stats)
  .route('/traffic', traffic)
  .route('/drift', drift);

/** `/openai/…` are the paths of Azure's clients, for the endpoints of `/v1`. */
export const app = new Hono<AppEnv>();
app
  .onError(onError)
  .notFound(onNotFound(app))
  .use(unreadBody)
  .use(requestId)
  .route('/', health)
  .route('/', site)
  .use(services)
  .use('/v1/*', browsers)
  .use('/openai/*', browsers)
  .route('/v1', completions)
  .route('/openai/deployments/:deployment', completions)
  .route('/openai/v1', completions)
  .route('/openai', completions)
  .use(requestIdHeader)
  .route('/v1', dryRun)
  .route('/v1', models)
  .route('/openai/v1', models)
  .route('/openai', models)
  .route('/v1', feedback)
  .route('/internal/v1', internal)
  .route('/admin/v1', admin)
  .route('/dashboard', dashboard);
