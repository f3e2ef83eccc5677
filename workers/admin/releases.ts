/** Mask sets, which are immutable and named by their content; and publications, which make them live. */
import { Hono } from 'hono';
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import {
  changeLiveSchema,
  type LivePublication,
  type PublicationInUse,
  publicationsQuerySchema,
  publishSchema,
  storeMaskSetQuerySchema,
} from '../../shared/admin/publication-wire.ts';
import { evaluationFiguresSchema, hasRowOf, type ReleaseComparison } from '../../shared/admin/stats-wire.ts';
import { maskSetSchema } from '../../shared/mask/mask-set.ts';
import { nextStepAt_ms, shareAt } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { compareReleases } from '../counting/side-by-side.ts';
import { type Database, d1, existing, isoTimeOrNull } from '../db/d1.ts';
import {
  findEvaluation,
  findMaskSet,
  findMaskSetSummary,
  listMaskSets,
  putEvaluation,
  type StoredMaskSet,
  writeEvaluation,
  writeMaskSet,
} from '../db/mask-set-rows.ts';
import {
  findLive,
  findPublication,
  type LiveState,
  listPublications,
  type PublicationState,
} from '../db/publication-rows.ts';
import { type AppContext, type AppEnv, holdOf } from '../http/context.ts';
import { readJson, readQuery } from '../http/request-body.ts';
import {
  checkPublishable,
  checkSet,
  pauseOrResume,
  publish,
  rollback,
  storeMaskSet,
} from '../releases/publishing.ts';
import { decodeMaskSet } from '../routing/live-sets.ts';
import { listed, namedTenant, requireRoom, scopedTenant, tenantPageQuery } from './scope.ts';

export const maskSets = new Hono<AppEnv>()
  .post('/', async (c) => {
    const { tenant: named, publishable } = readQuery(c, storeMaskSetQuerySchema);
    const tenant = await scopedTenant(c, named);
    const { db } = c.var.services;
    const written = writeMaskSet(parse(maskSetSchema, await readJson(c.req.raw), 'invalid_mask_set'));
    if (publishable) await checkSet(c.var.services, { tenant, hold: holdOf(c) }, decodeMaskSet(written));
    // A set that is already stored needs no more room.
    const known = await d1(findMaskSetSummary(db, tenant, written.version));
    if (known !== null) return c.json(known);
    await requireRoom(db, c.var.admin.tenant, 'maskSets_bytes', written.content_bytes);
    const { created, summary } = await storeMaskSet(db, tenant, written);
    return c.json(summary, created ? 201 : 200);
  })
  .get('/', async (c) => {
    const { tenant: named, ...page } = tenantPageQuery(c);
    const tenant = await scopedTenant(c, named);
    return c.json(listed(await d1(listMaskSets(c.var.services.db, tenant, page))));
  })
  .get('/:version', async (c) => {
    const { content } = await find(c);
    return c.body(content, 200, { 'content-type': 'application/json' });
  })
  .put('/:version/evaluation', async (c) => {
    const set = await find(c);
    if (c.var.admin.tenant !== undefined && c.var.admin.tenant !== set.owner) {
      throw new MaskrouteError(
        'forbidden',
        'Only the owner of the set, or an administrator of the edge, may store its evaluation.',
      );
    }
    const figures = parse(evaluationFiguresSchema, await readJson(c.req.raw));
    const rows = [...figures.rows, ...figures.equalTime];
    if (!hasRowOf(figures, set.version)) {
      throw new MaskrouteError('invalid_request', `No row is of ${set.version}.`, { param: 'rows' });
    }
    const { db } = c.var.services;
    const before = await d1(findEvaluation(db, set));
    c.set('before', before.rows);
    c.set('changedTenant', set.owner);
    const written = writeEvaluation(rows);
    const more_bytes = written.content_bytes - before.content_bytes;
    await requireRoom(db, c.var.admin.tenant, 'maskSets_bytes', more_bytes);
    await d1(putEvaluation(db, set, written, Date.now()));
    return c.json({ object: 'list', data: rows });
  })
  .get('/:version/evaluation', async (c) => {
    const set = await find(c);
    const { rows, unreadable } = await d1(findEvaluation(c.var.services.db, set));
    if (unreadable !== null) {
      const message = `This version of the edge cannot read the evaluation of ${set.version}: ${unreadable}.`;
      throw new MaskrouteError('conflict', message);
    }
    return c.json({ object: 'list', data: rows });
  });

/** @throws MaskrouteError `not_found` for a set that is neither the tenant's nor the default owner's. */
async function find(c: AppContext): Promise<StoredMaskSet> {
  const tenant = await scopedTenant(c, namedTenant(c));
  const stored = findMaskSet(c.var.services.db, tenant, c.req.param('version') ?? '');
  return await existing(stored, 'There is no such mask set.');
}

/* Publications: what is live, its history, and how to change it. */

export const publications = new Hono<AppEnv>()
  .post('/', async (c) => {
    const body = parse(publishSchema, await readJson(c.req.raw));
    const { version, expected_version: expected } = body;
    const tenant = await scopedTenant(c, body.tenant);
    const request = {
      tenant,
      version,
      expected,
      actor: c.var.admin.actor,
      hold: holdOf(c),
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
  .post('/rollback', (c) => changeLive(c, rollback))
  .post('/pause', (c) => changeLive(c, (services, request) => pauseOrResume(services, request, 'pause')))
  .post('/resume', (c) => changeLive(c, (services, request) => pauseOrResume(services, request, 'resume')))
  .get('/', async (c) => {
    const { tenant: named, ...wanted } = readQuery(c, publicationsQuerySchema);
    const tenant = await scopedTenant(c, named);
    return c.json(listed(await d1(listPublications(c.var.services.db, tenant, wanted))));
  })
  .get('/live', async (c) => {
    const tenant = await scopedTenant(c, namedTenant(c));
    const state = await existing(findLive(c.var.services.db, tenant), NO_PUBLICATION);
    return c.json(livePublication(state, Date.now()));
  })
  .get('/in-use', async (c) => {
    const tenant = await scopedTenant(c, namedTenant(c));
    const seen = await findSeen(c.var.services.db, tenant, Date.now());
    const main = seen.find(({ publication }) => publication !== null)?.publication;
    if (main == null) throw new MaskrouteError('not_found', NO_PUBLICATION);
    // About the default publication a tenant's administrator sees only what its requests show anyway, not who published
    // it.
    const { version, activate_at } = main;
    const parts = seen.map(({ publication, share }) => ({
      tenant: publication?.tenant ?? tenant,
      version: publication?.version ?? null,
      share,
    }));
    return c.json({ tenant: main.tenant, version, activate_at, parts } satisfies PublicationInUse);
  })
  .get('/comparison', async (c) => {
    const tenant = await scopedTenant(c, namedTenant(c));
    const { db } = c.var.services;
    const state = await existing(findLive(db, tenant), NO_PUBLICATION);
    return c.json((await d1(compareReleases(db, state, Date.now()))) satisfies ReleaseComparison);
  });

const NO_PUBLICATION = 'Nothing is live.';

type SeenPart = {
  /** Null: these run dense. */
  readonly publication: PublicationState | null;
  /** Share of the tenant's conversations. */
  readonly share: number;
};

/**
 * The publications that a tenant's conversations see: the newest one and, for those that do not see it, its base or the
 * default.
 */
async function findSeen(db: Database, tenant: string, now_ms: number): Promise<SeenPart[]> {
  const newest = await d1(findLive(db, tenant));
  const share = newest === null ? 0 : shareAt(newest.schedule, now_ms);
  const parts: SeenPart[] = share === 0 ? [] : [{ publication: newest, share }];
  if (share < 1) {
    const before = newest?.previousId == null ? null : await d1(findPublication(db, newest.previousId));
    const rest =
      before !== null || tenant === DEFAULT_TENANT
        ? [{ publication: before, share: 1 }]
        : await findSeen(db, DEFAULT_TENANT, now_ms);
    parts.push(...rest.map((part) => ({ ...part, share: part.share * (1 - share) })));
  }
  return parts.sort((a, b) => b.share - a.share);
}

async function changeLive(c: AppContext, change: typeof rollback): Promise<Response> {
  const body = parse(changeLiveSchema, await readJson(c.req.raw));
  const { services, admin } = c.var;
  const tenant = await scopedTenant(c, body.tenant);
  const request = {
    tenant,
    expected: body.expected_version,
    publication: body.expected_publication,
    actor: admin.actor,
    hold: holdOf(c),
  };
  await noteBefore(c, tenant);
  return c.json(await change(services, request), 201);
}

async function noteBefore(c: AppContext, tenant: string): Promise<void> {
  const state = await d1(findLive(c.var.services.db, tenant));
  c.set('before', state === null ? null : livePublication(state, Date.now()));
}

/** A state in the wire format, without the set's owner and the row that a rollback would return to. */
function livePublication(state: LiveState, now_ms: number): LivePublication {
  const { owner: _owner, previousId: _previousId, schedule, base, ...publication } = state;
  const share = shareAt(schedule, now_ms);
  const previous_version = base?.version ?? null;
  return {
    ...publication,
    share,
    base_version: share === 1 ? null : previous_version,
    previous_version,
    paused_at: isoTimeOrNull(schedule.pausedAt_ms),
    next_step_at: isoTimeOrNull(nextStepAt_ms(schedule, now_ms)),
  };
}
