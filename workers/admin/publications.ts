/** Publications: what is live, how it came to be, and how to change it. */
import { Hono } from 'hono';
import {
  holdSchema,
  type LivePublication,
  type PublicationInUse,
  publishSchema,
  rollbackSchema,
} from '../../shared/admin/publication-wire.ts';
import type { ReleaseComparison } from '../../shared/admin/stats-wire.ts';
import { nextStepAt_ms, shareAt } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { compareReleases } from '../counting/compare-releases.ts';
import { d1, isoTimeOrNull } from '../db/d1.ts';
import { findLive, type LiveState, listPublications } from '../db/publication-rows.ts';
import { type AppContext, type AppEnv, holdOf } from '../http/context.ts';
import { readJson } from '../http/request-body.ts';
import { checkPublishable, hold, publish, rollback } from '../releases/publishing.ts';
import { findSeen } from '../routing/live-sets.ts';
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
    await noteBefore(c, tenant);
    return c.json(await publish(c.var.services, request), 201);
  })
  .post('/rollback', async (c) => {
    const body = parse(rollbackSchema, await readJson(c.req.raw));
    const tenant = await scopedTenant(c, body.tenant);
    const request = { tenant, expected: body.expected_version, actor: c.var.admin.actor, hold: holdOf(c) };
    await noteBefore(c, tenant);
    return c.json(await rollback(c.var.services, request), 201);
  })
  .post('/pause', (c) => held(c, 'pause'))
  .post('/resume', (c) => held(c, 'resume'))
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
    const seen = await findSeen(c.var.services.db, tenant, Date.now());
    const main = seen.find(({ publication }) => publication !== null)?.publication;
    if (main == null) throw new MaskrouteError('not_found', 'Nothing is live.');
    // Of the default one a tenant's administrator learns what its requests show anyway, and not who published it.
    const { version, activate_at } = main;
    const parts = seen.map(({ publication, share }) => ({
      ...{ tenant: publication?.tenant ?? tenant, version: publication?.version ?? null, share },
    }));
    return c.json({ tenant: main.tenant, version, activate_at, parts } satisfies PublicationInUse);
  })
  .get('/comparison', async (c) => {
    const tenant = await scopedTenant(c, c.req.query('tenant'));
    const { db } = c.var.services;
    const state = await d1(findLive(db, tenant));
    if (state === null) throw new MaskrouteError('not_found', 'Nothing is live.');
    return c.json((await d1(compareReleases(db, state, Date.now()))) satisfies ReleaseComparison);
  });

async function held(c: AppContext, what: 'pause' | 'resume'): Promise<Response> {
  const body = parse(holdSchema, await readJson(c.req.raw));
  const { services, admin } = c.var;
  const tenant = await scopedTenant(c, body.tenant);
  const request = { tenant, expected: body.expected_version, actor: admin.actor, hold: holdOf(c) };
  await noteBefore(c, tenant);
  return c.json(await hold(services, request, what), 201);
}

async function noteBefore(c: AppContext, tenant: string): Promise<void> {
  const state = await d1(findLive(c.var.services.db, tenant));
  c.set('before', state === null ? null : livePublication(state, Date.now()));
}

/** What the wire has of a state: not who owns the set, nor which row a rollback would go to. */
function livePublication(state: LiveState, now_ms: number): LivePublication {
  const { owner: _owner, previousId: _previousId, schedule, base, ...publication } = state;
  const share = shareAt(schedule, now_ms);
  const previous_version = base?.version ?? null;
  return {
    ...publication,
    share,
    base_version: share === 1 ? null : previous_version,
    previous_version,
    paused_at: isoTimeOrNull(schedule.pausedAt_ms ?? null),
    next_step_at: isoTimeOrNull(nextStepAt_ms(schedule, now_ms)),
  };
}
