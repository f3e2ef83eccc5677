/** The models that the backends serve, kept in the isolate and refreshed behind requests. */
import { type ModelEntry, modelListSchema } from '../../shared/wire/protocol.ts';
import { createSwrCache } from '../base/swr-cache.ts';
import type { Hold } from '../base/waiting.ts';
import { MODELS } from '../limits.ts';

export interface Models {
  /** @throws Error when the backend can't be asked and nothing is known. */
  list(hold: Hold): Promise<readonly ModelEntry[]>;
  /** The same at once; undefined when it takes a question, to be asked by `list`. */
  fresh(): readonly ModelEntry[] | undefined;
}

/** `fetchLists` gives what the backends answer to `GET /v1/models`. A model of several backends is one entry. */
export function createModels(fetchLists: () => Promise<readonly unknown[]>): Models {
  const cache = createSwrCache(
    'the model list',
    async () => {
      const entries = (await fetchLists()).flatMap((list) => modelListSchema.parse(list).data);
      return [...new Map(entries.map((entry) => [entry.id, entry])).values()];
    },
    MODELS,
  );
  return {
    fresh: () => cache.fresh(''),
    list: async (hold) => (await cache.get('', hold)) ?? [],
  };
}
