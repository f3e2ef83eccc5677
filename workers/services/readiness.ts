/** Whether a backend and the database can be reached; one question to each answers all who ask within a second. */
import { READINESS } from '../limits.ts';
import type { BackendPool } from './backends/index.ts';
import type { Hold } from './deadline.ts';
import { createSwrCache, type SourceHealth } from './swr-cache.ts';

export interface Readiness {
  /** Rejects with the reason when no backend is ready. */
  backend(hold: Hold): Promise<void>;
  /** Rejects with the reason when the database does not answer within a second, however long it goes on. */
  database(hold: Hold): Promise<void>;
  /** Since when the database answers nobody in this isolate; undefined when the last question had an answer. */
  unreachableSince_ms(): number | undefined;
}

export function createReadiness(
  pool: Pick<BackendPool, 'askAll'>,
  askDatabase: () => Promise<unknown>,
  health: SourceHealth,
): Readiness {
  const backends = createSwrCache(
    'readiness of the backends',
    async () => {
      await pool.askAll('/readyz', READINESS.load_ms, () => {});
      return true;
    },
    READINESS,
  );
  const database = createSwrCache('the database', () => askDatabase().then(() => true), READINESS, health);
  return {
    async backend(hold) {
      await backends.get('', hold);
    },
    async database(hold) {
      await database.get('', hold);
    },
    unreachableSince_ms: () => health.failingSince_ms,
  };
}
