/** The worker's entry point. */
import { app } from './app.ts';
import type { Env } from './env.ts';

export { TenantBudget } from './budgets/tenant-budget.ts';

export default {
  fetch: (request, env, context) => app.fetch(request, env, context),
} satisfies ExportedHandler<Env>;
