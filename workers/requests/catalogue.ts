/** What there is: the models, for clients; the masks, for backends that meet an id that they do not know. */
import { Hono } from 'hono';
import { MASK_ID_PATTERN } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import {
  DENSE_SUFFIX,
  type MaskRecord,
  type ModelEntry,
  splitModelName,
} from '../../shared/wire/protocol.ts';
import { d1 } from '../db/d1.ts';
import { findMask } from '../db/mask-set-rows.ts';
import { backendOnly, tenantOnly } from '../http/authentication.ts';
import { type AppContext, type AppEnv, holdOf } from '../http/context.ts';
import { methodNotAllowed } from '../http/error-answers.ts';
import { RETRY_AFTER_s } from '../limits.ts';
import type { RoutingTable } from '../routing/live-sets.ts';

/** `GET /v1/models`: the backends' list, with the unpruned name of each beside it. */
export const models = new Hono<AppEnv>()
  .get('/models', tenantOnly, async (c) => c.json({ object: 'list', data: withDense(await list(c)) }))
  .get('/models/:id{.+}', tenantOnly, async (c) => {
    const id = c.req.param('id');
    const entry = withDense(await list(c)).find((candidate) => candidate.id === id);
    if (entry === undefined) {
      throw new MaskrouteError('model_not_found', `There is no model ${id}.`, { param: 'model' });
    }
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

/** The bits of a mask id. Sets that the isolate holds answer without D1. */
export const internal = new Hono<AppEnv>().get('/masks/:id', backendOnly, async (c) => {
  const id = c.req.param('id');
  const { table, db } = c.var.services;
  const record = MASK_ID_PATTERN.test(id) ? (held(table, id) ?? (await d1(findMask(db, id)))) : null;
  if (record === null) throw new MaskrouteError('not_found', 'There is no such mask.');
  // The id is the hash of the content.
  c.header('cache-control', 'private, max-age=31536000, immutable');
  return c.json(record satisfies MaskRecord);
});

function held(table: RoutingTable, id: string): MaskRecord | undefined {
  const found = table.findMask(id);
  if (found === undefined || found.cluster.mask === 'dense') return undefined;
  const { hash, blockCount } = found.set.model;
  const surrogates = found.set.surrogates ?? null;
  return { id, modelHash: hash, blockCount, bits: found.cluster.bits, surrogates };
}
