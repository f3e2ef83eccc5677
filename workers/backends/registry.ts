/**
 * Which backends there are, and which models they serve. The backends are the enabled ones of the registry in D1,
 * refreshed behind requests, or what `BACKEND_URL` names while the registry is empty or was never reached.
 */
import { ANYWHERE } from '../../shared/wire/backend-load.ts';
import { type ModelEntry, modelListSchema } from '../../shared/wire/protocol.ts';
import { SwrCache } from '../base/swr-cache.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { type Hold, notNow } from '../base/waiting.ts';
import type { BackendRow } from '../db/backend-rows.ts';
import { BACKENDS, MODELS } from '../limits.ts';

/** Id of the entry for `BACKEND_URL`. */
export const DEFAULT_BACKEND = 'default';

export interface Registry {
  /** The enabled backends that can be read; empty when there are none of them. Never rejects. */
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
  unreadable: null,
  createdAt_ms: null,
  updatedAt_ms: null,
});

/** `read` gives all rows. */
export function createRegistry(read: () => Promise<readonly BackendRow[]>, defaultUrl: string): Registry {
  const cache = new SwrCache(
    'the registry of backends',
    async () => {
      const rows = await read();
      return rows.length === 0 ? [defaultBackend(defaultUrl)] : rows.filter(isUsable);
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

function isUsable({ id, enabled, unreadable }: BackendRow): boolean {
  if (enabled && unreadable !== null) log('error', 'backend_unreadable', { backend: id, reason: unreadable });
  return enabled && unreadable === null;
}

/** The JSON that a backend, by its id, answered with success; its form is not checked yet. */
export type Given = { readonly backend: string; readonly answer: unknown };

/* The models, cached in the isolate and refreshed in the background. */

export interface Models {
  /**
   * One entry for each backend and model; a few seconds old, or older while no backend answers. Backends may serve
   * different weights under one name, for example while one after the other gets new ones.
   * @throws Error when the backends can't be asked and nothing is known.
   */
  list(hold: Hold): Promise<readonly ModelEntry[]>;
  /** The same, but backends are asked first, since they may have restarted with other weights. @throws as `list`. */
  askAgain(hold: Hold): Promise<readonly ModelEntry[]>;
}

/**
 * The models by name: of backends' entries with equal names only one.
 * @throws MaskrouteError `backend_unreachable` when the backends can't be asked and nothing is known.
 */
export async function listByName(models: Models, hold: Hold): Promise<ModelEntry[]> {
  const entries = await models.list(hold).catch((error) => {
    throw notNow('backend_unreachable', 'The models cannot be listed right now.', error);
  });
  return [...new Map(entries.map((entry) => [entry.id, entry])).values()];
}

/**
 * `fetchLists` returns the backends' answers to `GET /v1/models`. An answer that is no list (of a backend of another
 * version) is left out, so that it does not hide the models of the others.
 */
export function createModels(fetchLists: () => Promise<readonly Given[]>): Models {
  const cache = new SwrCache<readonly ModelEntry[]>(
    'the model list',
    async () => {
      const lists = (await fetchLists()).map(({ backend, answer }) => {
        const list = modelListSchema.safeParse(answer);
        if (!list.success) log('error', 'model_list_malformed', { backend, reason: reasonOf(list.error) });
        return list;
      });
      const malformed = lists.find(({ success }) => !success);
      if (malformed !== undefined && lists.every(({ success }) => !success)) throw malformed.error!;
      return lists.flatMap(({ data }) => data?.data ?? []);
    },
    MODELS,
  );
  return {
    list: async (hold) => (await cache.get('', hold))!,
    async askAgain(hold) {
      const served = await cache.refresh('', hold).catch((error) => {
        const last = cache.peek('');
        if (last === undefined) throw error;
        return last;
      });
      return served!;
    },
  };
}
