/**
 * Which backends there are: the enabled ones of the registry in D1, refreshed behind requests, or the one that
 * `BACKEND_URL` names while the registry is empty or was never reached.
 */
import { ANYWHERE } from '../../shared/wire/backend-load.ts';
import { log, reasonOf } from '../base/log.ts';
import { createSwrCache } from '../base/swr-cache.ts';
import type { Hold } from '../base/waiting.ts';
import type { BackendRow } from '../db/backend-rows.ts';
import { BACKENDS } from '../limits.ts';

/** The entry that `BACKEND_URL` stands for. */
export const DEFAULT_BACKEND = 'default';

export interface Registry {
  /** Those that requests go to; none when all are disabled. Never rejects. */
  enabled(hold: Hold): Promise<readonly BackendRow[]>;
  /** The same at once; undefined when it takes a question, to be asked by `enabled`. */
  fresh(): readonly BackendRow[] | undefined;
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
  const cache = createSwrCache(
    'the registry of backends',
    async () => {
      const rows = await read();
      return rows.length === 0 ? [defaultBackend(defaultUrl)] : rows.filter(({ enabled }) => enabled);
    },
    BACKENDS,
  );
  return {
    fresh: () => cache.fresh(''),
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
