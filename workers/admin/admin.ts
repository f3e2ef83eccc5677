/** The admin API; `shared/admin/admin-wire.ts` describes it. */
import { Hono } from 'hono';
import { adminOnly, mayChange, noStore } from '../http/authentication.ts';
import type { AppEnv } from '../http/context.ts';
import { audit, audited } from './audit.ts';
import { backends } from './backends.ts';
import { drift, models, stats, traffic, usage } from './counted.ts';
import { experiments } from './experiments.ts';
import { keys, ownSessions } from './keys.ts';
import { maskSets } from './mask-sets.ts';
import { publications } from './publications.ts';
import { ratings, requests } from './requests.ts';
import { tenants } from './tenants.ts';

export const admin = new Hono<AppEnv>()
  .use(noStore)
  .use(adminOnly)
  .use(mayChange)
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
  .route('/models', models)
  .route('/stats', stats)
  .route('/traffic', traffic)
  .route('/drift', drift);
