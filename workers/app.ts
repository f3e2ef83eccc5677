/** The edge, composed. Health and pages come before the services: they are there where a variable is wrong, too. */
import { Hono } from 'hono';
import { admin } from './admin/admin.ts';
import type { AppEnv } from './http/context.ts';
import { browsers, services } from './http/context.ts';
import { dashboard, site } from './http/dashboard-page.ts';
import { onError, onNotFound, requestId, requestIdHeader } from './http/error-answers.ts';
import { health } from './http/health.ts';
import { unreadBody } from './http/request-body.ts';
import { internal, models } from './requests/catalogue.ts';
import { completions } from './requests/complete.ts';
import { dryRun } from './requests/dry-run.ts';
import { feedback } from './requests/feedback.ts';

export const app = new Hono<AppEnv>()
  .onError(onError)
  .notFound(onNotFound)
  .use(unreadBody)
  .use(requestId)
  .route('/', health)
  .route('/', site)
  .use(services)
  .use('/v1/*', browsers)
  .route('/v1', completions)
  .use(requestIdHeader)
  .route('/v1', dryRun)
  .route('/v1', models)
  .route('/v1', feedback)
  .route('/internal/v1', internal)
  .route('/admin/v1', admin)
  .route('/dashboard', dashboard);
