/** The worker's entry point. */
import { app } from './app.ts';
import type { Env } from './env.ts';
import { consumeEvents } from './services/consume-events.ts';
import { servicesFor } from './services/index.ts';

export { TenantBudget } from './budgets/tenant-budget.ts';

export default {
  fetch: (request, env, context) => app.fetch(request, env, context),
  queue: (batch, env, context) => consumeEvents(servicesFor(env), batch, (work) => context.waitUntil(work)),
} satisfies ExportedHandler<Env>;
