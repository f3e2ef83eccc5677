/** `GET /v1/models`: the served model, and `<model>:dense` for the same without a mask. */
import { Hono } from 'hono';
import { MaskrouteError } from '../../shared/errors.ts';
import type { ModelEntry } from '../../shared/protocol.ts';
import { DENSE_SUFFIX } from '../../shared/protocol.ts';
import type { ApiEnv } from './context.ts';
import type { ServedModel } from './served-model.ts';

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
