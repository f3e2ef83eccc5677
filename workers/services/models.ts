/** The models that the backend serves, kept in the isolate and refreshed behind requests. */
import { type ModelEntry, modelListSchema } from '../../shared/protocol.ts';
import { MODELS } from '../limits.ts';
import type { Hold } from './deadline.ts';
import { createSwrCache } from './swr-cache.ts';

export interface Models {
  /** @throws Error when the backend can't be asked and nothing is known. */
  list(hold: Hold): Promise<readonly ModelEntry[]>;
}

/** `fetchList` gives the body of the backend's `GET /v1/models`. */
export function createModels(fetchList: () => Promise<unknown>): Models {
  const cache = createSwrCache(
    'the model list',
    async () => modelListSchema.parse(await fetchList()).data,
    MODELS,
  );
  return {
    list: async (hold) => (await cache.get('', hold)) ?? [],
  };
}
