/** The models: the backend's list, with the unpruned name of each beside it. */
import { Hono } from 'hono';
import { MaskrouteError } from '../../shared/errors.ts';
import { DENSE_SUFFIX, type ModelEntry, splitModelName } from '../../shared/protocol.ts';
import { type AppContext, type AppEnv, holdOf } from '../context.ts';
import { RETRY_AFTER_s } from '../limits.ts';
import { tenantOnly } from '../middleware/authenticate.ts';
import { methodNotAllowed } from '../middleware/errors.ts';

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
