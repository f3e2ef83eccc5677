/**
 * Which backends there are, and which models they serve. The backends are the enabled ones of the registry in D1,
 * refreshed behind requests, or what `BACKEND_URL` names while the registry is empty or was never reached.
 */
import { ANYWHERE } from '../../shared/wire/backend-load.ts';
import { type ModelEntry, modelListSchema } from '../../shared/wire/protocol.ts';
import { SwrCache } from '../base/swr-cache.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import type { BackendRow } from '../db/backend-rows.ts';
import { BACKENDS, MODELS } from '../limits.ts';

/** Id of the entry for `BACKEND_URL`. */
export const DEFAULT_BACKEND = 'default';

export interface Registry {
  /** The enabled backends; empty when all are disabled. Never rejects. */
  enabled(hold: Hold): Promise<readonly BackendRow[]>;
  /** After a change: this isolate sees it at once. */
  refresh(hold: Hold): Promise<void>;
}

export const defaultBackend = (url: string): BackendRow => ({
  id: DEFAULT_BACKEND,
  url,
  regions: [ANYWHERE],
  weight: 1,
  enabled: true,
  createdAt_ms: null,
  updatedAt_ms: null,
});

/** `read` gives all rows. */
export function createRegistry(read: () => Promise<readonly BackendRow[]>, defaultUrl: string): Registry {
  const cache = new SwrCache(
    'the registry of backends',
    async () => {
      const rows = await read();
      return rows.length === 0 ? [defaultBackend(defaultUrl)] : rows.filter(({ enabled }) => enabled);
    },
    BACKENDS,
  );
  return {
    async enabled(hold) {
      try {
        return (await cache.get('', hold))!;
      } catch (error) {
        log('warn', 'backend_registry_unavailable', { reason: reasonOf(error) });
        return [defaultBackend(defaultUrl)];
      }
    },
    async refresh(hold) {
      await cache.refresh('', hold);
    },
  };
}

/* The models, cached in the isolate and refreshed in the background. */

export interface Models {
  /** @throws Error when the backend can't be asked and nothing is known. */
  list(hold: Hold): Promise<readonly ModelEntry[]>;
}

/** `fetchLists` returns the backends' answers to `GET /v1/models`. A model of several backends is one entry. */
export function createModels(fetchLists: () => Promise<readonly unknown[]>): Models {
  const cache = new SwrCache(
    'the model list',
    async () => {
      const entries = (await fetchLists()).flatMap((list) => modelListSchema.parse(list).data);
      return [...new Map(entries.map((entry) => [entry.id, entry])).values()];
    },
    MODELS,
  );
  return { list: async (hold) => (await cache.get('', hold)) ?? [] };
}
