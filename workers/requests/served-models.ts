/** The models: the backend's list, with the unpruned name of each beside it. */
import { Hono } from 'hono';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import {
  DENSE_SUFFIX,
  type ModelEntry,
  modelListSchema,
  splitModelName,
} from '../../shared/wire/protocol.ts';
import { tenantOnly } from '../http/authentication.ts';
import { type AppContext, type AppEnv, holdOf } from '../http/context.ts';
import { methodNotAllowed } from '../http/error-answers.ts';
import type { Hold } from '../http/waiting.ts';
import { MODELS, RETRY_AFTER_s } from '../limits.ts';
import { createSwrCache } from '../routing/swr-cache.ts';

export const models = new Hono<AppEnv>()
  .get('/models', tenantOnly, async (c) => c.json({ object: 'list', data: withDense(await list(c)) }))
  .get('/models/:id{.+}', tenantOnly, async (c) => {
    const id = c.req.param('id');
    const entry = withDense(await list(c)).find((candidate) => candidate.id === id);
    if (entry === undefined) throw new MaskrouteError('model_not_found', `There is no model ${id}.`);
    return c.json(entry);
  })
  .all('/models', methodNotAllowed('GET'));

async function list(c: AppContext): Promise<readonly ModelEntry[]> {
  try {
    const { models } = c.var.caller.policy;
    const served = await c.var.services.models.list(holdOf(c));
    return served.filter(({ id }) => models === null || models.includes(splitModelName(id).model));
  } catch (error) {
    throw new MaskrouteError('backend_unreachable', 'The models cannot be listed right now.', {
      retryAfter_s: RETRY_AFTER_s,
      cause: error,
    });
  }
}

function withDense(entries: readonly ModelEntry[]): ModelEntry[] {
  return entries
    .filter((entry) => !splitModelName(entry.id).dense)
    .flatMap((entry) => [
      entry,
      {
        ...entry,
        id: entry.id + DENSE_SUFFIX,
        ...(entry.maskroute === undefined ? {} : { maskroute: { ...entry.maskroute, dense: true } }),
      },
    ]);
}

/* The models that the backends serve, kept in the isolate and refreshed behind requests. */

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
