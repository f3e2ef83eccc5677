/** Publications: what is live, how it came to be, and how to change it. */
import { Hono } from 'hono';
import {
  type LivePublication,
  type PublicationInUse,
  publishSchema,
  rollbackSchema,
} from '../../shared/admin/publication-wire.ts';
import { shareAt } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { d1 } from '../db/d1.ts';
import { findLive, type LiveState, listPublications } from '../db/publication-rows.ts';
import { type AppEnv, holdOf } from '../http/context.ts';
import { readJson } from '../http/request-body.ts';
import { checkPublishable, publish, rollback } from '../releases/publishing.ts';
import { findInUse } from '../routing/live-sets.ts';
import { listed, pageQuery, scopedTenant } from './scope.ts';

export const publications = new Hono<AppEnv>()
  .post('/', async (c) => {
    const body = parse(publishSchema, await readJson(c.req.raw));
    const { version, expected_version: expected } = body;
    const tenant = await scopedTenant(c, body.tenant);
    const request = {
      ...{ tenant, version, expected, actor: c.var.admin.actor, hold: holdOf(c) },
      activateAt_ms: body.activate_at === undefined ? undefined : Date.parse(body.activate_at),
      rollout: body.rollout,
      autoRollback: body.auto_rollback,
    };
    if (!body.activate) {
      await checkPublishable(c.var.services, request);
      return c.json({ activated: false, version });
    }
    return c.json(await publish(c.var.services, request), 201);
  })
  .post('/rollback', async (c) => {
    const body = parse(rollbackSchema, await readJson(c.req.raw));
    const tenant = await scopedTenant(c, body.tenant);
    const request = { tenant, expected: body.expected_version, actor: c.var.admin.actor, hold: holdOf(c) };
    return c.json(await rollback(c.var.services, request), 201);
  })
  .get('/', async (c) => {
    const tenant = await scopedTenant(c, c.req.query('tenant'));
    return c.json(listed(await d1(listPublications(c.var.services.db, tenant, pageQuery(c)))));
  })
  .get('/live', async (c) => {
    const tenant = await scopedTenant(c, c.req.query('tenant'));
    const state = await d1(findLive(c.var.services.db, tenant));
    if (state === null) throw new MaskrouteError('not_found', 'Nothing is live.');
    return c.json(livePublication(state, Date.now()));
  })
  .get('/in-use', async (c) => {
    const tenant = await scopedTenant(c, c.req.query('tenant'));
    const state = await findInUse(c.var.services.db, tenant, Date.now());
    if (state === null) throw new MaskrouteError('not_found', 'Nothing is live.');
    // Of the default one a tenant's administrator learns what its requests show anyway, and not who published it.
    const { version, activate_at } = state;
    return c.json({ tenant: state.tenant, version, activate_at } satisfies PublicationInUse);
  });

/** What the wire has of a state: not who owns the set, nor which row a rollback would go to. */
function livePublication(state: LiveState, now_ms: number): LivePublication {
  const { owner: _owner, previousId: _previousId, schedule, base, ...publication } = state;
  const share = shareAt(schedule, now_ms);
  const previous_version = base?.version ?? null;
  return { ...publication, share, base_version: share === 1 ? null : previous_version, previous_version };
}
