/** The worker's entry point. */
import { app } from './app.ts';
import { consumeEvents, forgetOld } from './counting/consume-events.ts';
import type { Env } from './env.ts';
import { servicesFor } from './services.ts';

export { TenantBudget } from './tenants/budgets.ts';

export default {
  fetch: (request, env, context) => app.fetch(request, env, context),
  queue: (batch, env, context) => consumeEvents(servicesFor(env), batch, (work) => context.waitUntil(work)),
  scheduled: (_event, env) => forgetOld(servicesFor(env)),
} satisfies ExportedHandler<Env>;
