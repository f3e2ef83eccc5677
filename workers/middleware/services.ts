/** Hands every request the isolate's services. A worker that is not configured answers 503, never half-works. */
import { createMiddleware } from 'hono/factory';
import type { AppEnv } from '../context.ts';
import { servicesFor } from '../services/index.ts';

export const services = createMiddleware<AppEnv>(async (c, next) => {
  c.set('services', servicesFor(c.env));
  await next();
});
