/** Whether a backend is ready; one question answers all who ask within a second. */
import { READINESS } from '../limits.ts';
import type { BackendPool } from './backends/index.ts';
import type { Hold } from './deadline.ts';
import { createSwrCache } from './swr-cache.ts';

/** Rejects with the reason when no backend is ready. */
export type Readiness = (hold: Hold) => Promise<void>;

export function createReadiness(backend: Pick<BackendPool, 'askAll'>): Readiness {
  const cache = createSwrCache(
    'readiness of the backends',
    async () => {
      await backend.askAll('/readyz', READINESS.load_ms, () => {});
      return true;
    },
    READINESS,
  );
  return async (hold) => {
    await cache.get('', hold);
  };
}
