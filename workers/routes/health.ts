/** Live: the worker runs. Ready: configuration is loaded and a backend can be reached; else the reasons. */
import { Hono } from 'hono';
import { DEFAULT_TENANT } from '../../shared/admin.ts';
import { type AppContext, type AppEnv, holdOf } from '../context.ts';
import { requestIdHeader } from '../middleware/request-id.ts';
import { servicesFor } from '../services/index.ts';
import { log, reasonOf } from '../services/log.ts';

export const health = new Hono<AppEnv>()
  .get('/healthz', requestIdHeader, (c) => c.json({ status: 'live' }))
  .get('/readyz', requestIdHeader, async (c) => {
    const checks = await readiness(c);
    const ready = Object.values(checks).every((check) => check === 'ok');
    return c.json({ status: ready ? 'ready' : 'not_ready', checks }, ready ? 200 : 503);
  });

type Checks = Record<'configuration' | 'routing_table' | 'encoder' | 'backend', string>;

/** Anyone may ask, so the reasons are general; the log has the particular ones. */
async function readiness(c: AppContext): Promise<Checks> {
  const hold = holdOf(c);
  const check = async (name: keyof Checks, work: () => Promise<unknown>, reason: string) => {
    try {
      await work();
      return 'ok';
    } catch (error) {
      log('warn', 'not_ready', { check: name, reason: reasonOf(error) });
      return reason;
    }
  };
  const configuration = await check(
    'configuration',
    async () => servicesFor(c.env),
    'a variable is missing or wrong',
  );
  if (configuration !== 'ok') {
    const unknown = 'unknown until the configuration is right';
    return { configuration, routing_table: unknown, encoder: unknown, backend: unknown };
  }
  const { table, embedder, readiness: backend } = servicesFor(c.env);
  const [routing_table, encoder, reachable] = await Promise.all([
    check(
      'routing_table',
      () => table.liveFor(DEFAULT_TENANT, () => '', hold),
      'the database cannot be reached',
    ),
    check('encoder', () => embedder.encoder(hold), 'the encoder cannot be loaded'),
    check('backend', () => backend(hold), 'no backend is ready'),
  ]);
  return { configuration, routing_table, encoder, backend: reachable };
}
