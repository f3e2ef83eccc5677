/** The edge, composed. Health comes before the services, so that it can say why there are none. */
import { Hono } from 'hono';
import type { AppEnv } from './context.ts';
import { onError, onNotFound } from './middleware/errors.ts';
import { requestId, requestIdHeader } from './middleware/request-id.ts';
import { browsers, services } from './middleware/services.ts';
import { unreadBody } from './middleware/unread-body.ts';
import { admin } from './routes/admin/index.ts';
import { completions } from './routes/completions.ts';
import { dashboard } from './routes/dashboard/index.ts';
import { feedback } from './routes/feedback.ts';
import { health } from './routes/health.ts';
import { internal } from './routes/internal.ts';
import { models } from './routes/models.ts';
import { dryRun } from './routes/route.ts';

export const app = new Hono<AppEnv>()
  .onError(onError)
  .notFound(onNotFound)
  .use(unreadBody)
  .use(requestId)
  .route('/', health)
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
