/** Whether a backend is ready; one question answers all who ask within a second. */
import { READINESS } from '../limits.ts';
import type { Backend } from './backend.ts';
import type { Hold } from './deadline.ts';
import { createSwrCache } from './swr-cache.ts';

/** Rejects with the reason when no backend is ready. */
export type Readiness = (hold: Hold) => Promise<void>;

export function createReadiness(backend: Backend): Readiness {
  const cache = createSwrCache(
    'readiness of the backend',
    async () => {
      const response = await backend.call({
        path: '/readyz',
        requestId: `edge_${crypto.randomUUID()}`,
        tenant: '',
        edge: '',
        signal: new AbortController().signal,
        timeout_ms: READINESS.load_ms,
      });
      await response.body?.cancel();
      if (!response.ok) throw new Error(`the backend answered ${response.status}`);
      return true;
    },
    READINESS,
  );
  return async (hold) => {
    await cache.get('', hold);
  };
}
