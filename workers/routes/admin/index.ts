/** The admin API; `shared/admin.ts` describes it. */
import { Hono } from 'hono';
import type { AppEnv } from '../../context.ts';
import { adminOnly } from '../../middleware/authenticate.ts';
import { noStore } from '../../middleware/session.ts';
import { backends } from './backends.ts';
import { experiments } from './experiments.ts';
import { keys, ownSessions } from './keys.ts';
import { maskSets } from './mask-sets.ts';
import { publications } from './publications.ts';
import { stats } from './stats.ts';
import { tenants } from './tenants.ts';
import { traffic } from './traffic.ts';
import { usage } from './usage.ts';

export const admin = new Hono<AppEnv>()
  .use(noStore)
  .use(adminOnly)
  .route('/tenants', tenants)
  .route('/keys', keys)
  .route('/sessions', ownSessions)
  .route('/usage', usage)
  .route('/mask-sets', maskSets)
  .route('/publications', publications)
  .route('/backends', backends)
  .route('/experiments', experiments)
  .route('/stats', stats)
  .route('/traffic', traffic);
