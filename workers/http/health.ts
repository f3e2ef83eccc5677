/**
 * Live: the worker runs. Ready: configuration is loaded and a backend can be reached; else the reasons. An edge that holds
 * a routing table serves without the database, so it is ready then, and says since when the database is away and how old
 * the table is.
 */
import { Hono } from 'hono';
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import { log, reasonOf } from '../base/log.ts';
import { READY_TABLE_AGE_MAX_ms } from '../limits.ts';
import { servicesFor } from '../services.ts';
import { type AppContext, type AppEnv, holdOf } from './context.ts';
import { requestIdHeader } from './error-answers.ts';

export const health = new Hono<AppEnv>()
  .get('/healthz', requestIdHeader, (c) => c.json({ status: 'live' }))
  .get('/readyz', requestIdHeader, async (c) => {
    const { checks, routing_table_age_s } = await readiness(c);
    const { database, ...needed } = checks;
    const ready = Object.values(needed).every((check) => check === OK);
    c.header('cache-control', 'no-store');
    return c.json({ status: ready ? 'ready' : 'not_ready', checks, routing_table_age_s }, ready ? 200 : 503);
  });

type Checks = Record<'configuration' | 'routing_table' | 'database' | 'encoder' | 'backend', string>;
type Report = {
  readonly checks: Checks;
  /** How long ago the table was read from the database; null when there is none. */
  readonly routing_table_age_s: number | null;
};
const OK = 'ok';

/** Anyone may ask, so the reasons are general; the log has the particular ones. */
async function readiness(c: AppContext): Promise<Report> {
  const hold = holdOf(c);
  const check = async (name: keyof Checks, work: () => Promise<unknown>, reason: string) => {
    try {
      await work();
      return OK;
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
  if (configuration !== OK) {
    const unknown = 'unknown until the configuration is right';
    const checks = {
      ...{ configuration, routing_table: unknown, database: unknown },
      ...{ encoder: unknown, backend: unknown },
    };
    return { checks, routing_table_age_s: null };
  }
  const { table, embedder, reached, d1Health } = servicesFor(c.env);
  const [loaded, asked, encoder, backend] = await Promise.all([
    check('routing_table', () => table.liveFor(DEFAULT_TENANT, () => '', hold), 'it cannot be loaded'),
    check('database', () => reached.database.get('', hold), UNREACHABLE),
    check('encoder', () => embedder.encoder(hold), 'the encoder cannot be loaded'),
    check('backend', () => reached.backend.get('', hold), 'no backend is ready'),
  ]);
  const age_ms = table.age_ms(DEFAULT_TENANT);
  const isTooOld = age_ms !== undefined && age_ms > READY_TABLE_AGE_MAX_ms;
  const since = new Date(d1Health.failingSince_ms ?? Date.now()).toISOString();
  const checks = {
    configuration,
    routing_table: loaded === OK && isTooOld ? TOO_OLD : loaded === OK || asked === OK ? loaded : UNREACHABLE,
    database: asked === OK ? OK : `unreachable since ${since}`,
    encoder,
    backend,
  };
  return { checks, routing_table_age_s: age_ms === undefined ? null : Math.round(age_ms / 1000) };
}

const UNREACHABLE = 'the database cannot be reached';
const TOO_OLD = `older than ${READY_TABLE_AGE_MAX_ms / 1000} s, and it cannot be read again`;
