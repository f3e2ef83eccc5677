/** What is served here, and how busy it is: `GET /v1/models` and `GET /v1/load`, for whoever chooses between backends. */
import { Hono } from 'hono';
import { BACKEND_HEADERS, formatLoad, type Load, type LoadReport } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { DENSE_SUFFIX, type ModelEntry } from '../../shared/wire/protocol.ts';
import type { Engine } from '../engine/engine.ts';
import type { ApiEnv, ApiParts, ServedModel } from './parts.ts';

/** The served model, and `<model>:dense` for the same without a mask. */
export function modelRoutes(model: ServedModel): Hono<ApiEnv> {
  const entries = [modelEntry(model, false), modelEntry(model, true)];
  return new Hono<ApiEnv>()
    .get('/v1/models', (c) => c.json({ object: 'list', data: entries }))
    .get('/v1/models/:id{.+}', (c) => {
      const entry = entries.find(({ id }) => id === c.req.param('id'));
      if (entry !== undefined) return c.json(entry);
      throw new MaskrouteError('model_not_found', 'This model is not served here.', { param: 'model' });
    });
}

function modelEntry(model: ServedModel, dense: boolean): ModelEntry {
  const { hash, blockCount, contextTokens, surrogates = null } = model.engine.model;
  return {
    id: dense ? model.name + DENSE_SUFFIX : model.name,
    object: 'model',
    created: model.created_s,
    owned_by: 'maskroute',
    maskroute: { hash, block_count: blockCount, context_tokens: contextTokens, dense, surrogates },
  };
}

const loadOf = (engine: Engine): Load => {
  const { requestsRunning, requestsWaiting, queueCapacity } = engine.stats();
  return { running: requestsRunning, waiting: requestsWaiting, capacity: queueCapacity };
};

/** The load in short, for a header of every answer: who sends requests need not ask. */
export const loadHeader = (engine: Engine): [name: string, value: string] => [
  BACKEND_HEADERS.load,
  formatLoad(loadOf(engine)),
];

export const loadRoutes = ({ model, lifecycle, recentMasks }: ApiParts): Hono<ApiEnv> =>
  new Hono<ApiEnv>().get('/v1/load', (c) =>
    c.json({
      object: 'maskroute.load',
      model: model.name,
      ...loadOf(model.engine),
      draining: lifecycle.draining || model.engine.failure !== undefined,
      hot_masks: [...recentMasks.keys()],
    } satisfies LoadReport),
  );
