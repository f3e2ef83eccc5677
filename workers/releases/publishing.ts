/**
 * Publishing a mask set, and rolling back. The set is checked against the edge's encoder and the backends' models; then
 * the pointer is flipped in one batch, in which only one of two concurrent publishers succeeds.
 */
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import type { AutoRollback, MaskSetSummary, Publication } from '../../shared/admin/publication-wire.ts';
import { type EncoderSpec, sameEncoder } from '../../shared/mask/mask-set.ts';
import type { RolloutStep } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { ModelEntry } from '../../shared/wire/protocol.ts';
import type { Models } from '../backends/registry.ts';
import { type Hold, notNow } from '../base/waiting.ts';
import { type Database, d1, existing } from '../db/d1.ts';
import { findMaskSet, insertMaskSet, type WrittenMaskSet } from '../db/mask-set-rows.ts';
import {
  AT_ONCE,
  type Flip,
  findLive,
  findPublication,
  flipLive,
  type LiveState,
  NOTHING_LIVE,
  type PublicationState,
  settledId,
} from '../db/publication-rows.ts';
import { findTenant } from '../db/tenant-rows.ts';
import { MASK_SET_BYTES_MAX } from '../limits.ts';
import { isOverCeiling, meetsFloor, percent } from '../routing/decision.ts';
import type { Embedder } from '../routing/embed.ts';
import { decodeMaskSet, type LiveSet, type RoutingTable } from '../routing/live-sets.ts';

export type PublishDependencies = {
  readonly db: Database;
  readonly table: RoutingTable;
  readonly embedder: Embedder;
  readonly models: Models;
};

type PublishRequest = {
  readonly tenant: string;
  readonly version: string;
  /** The version that the publisher believes is live; undefined: not checked. */
  readonly expected: string | null | undefined;
  readonly actor: string;
  readonly hold: Hold;
};
type ChangeRequest = Omit<PublishRequest, 'version'> & {
  /** The id of the only publication that may be changed; undefined: the newest. */
  readonly publication?: string | undefined;
};
type RollbackRequest = ChangeRequest & {
  /** Which bound was crossed, for an automatic rollback. */
  readonly reason?: string;
};
type Schedule = {
  /** Undefined or past: at once. */
  readonly activateAt_ms: number | undefined;
  readonly rollout: readonly RolloutStep[];
  readonly autoRollback: AutoRollback | undefined;
};

/**
 * @throws MaskrouteError `not_found`, `encoder_mismatch`, `mask_model_mismatch`, `surrogates_mismatch`,
 * `quality_unknown`, `quality_below_floor`, `sparsity_over_ceiling`, or why it can't be checked.
 */
export async function checkPublishable(
  dependencies: PublishDependencies,
  request: Pick<PublishRequest, 'tenant' | 'version' | 'hold'>,
): Promise<{ owner: string }> {
  const found = findMaskSet(dependencies.db, request.tenant, request.version);
  const stored = await existing(found, `There is no mask set ${request.version}.`, 'version');
  await checkSet(dependencies, request, decodeMaskSet(stored));
  return { owner: stored.owner };
}

/** The same for a set that may not be stored yet. @throws MaskrouteError as `checkPublishable`, except `not_found`. */
export async function checkSet(
  { db, embedder, models }: PublishDependencies,
  { tenant, hold }: Pick<PublishRequest, 'tenant' | 'hold'>,
  set: LiveSet,
): Promise<void> {
  await checkTenantsTerms(db, tenant, set);
  await checkEncoder(set, embedder, hold);
  await checkModel(set, models, hold);
}

/** @throws MaskrouteError as `checkPublishable`, and `conflict` when another publisher was faster. */
export async function publish(
  dependencies: PublishDependencies,
  request: PublishRequest & Schedule,
): Promise<Publication> {
  const { owner } = await checkPublishable(dependencies, request);
  const seen = await seenLive(dependencies.db, request);
  const basics = flipBasics(request, seen);
  const { activateAt_ms = 0, rollout, autoRollback } = request;
  const isLater = activateAt_ms > basics.createdAt_ms;
  if (isLater || rollout.length > 0) requireNews(seen, request.version, basics.createdAt_ms);
  // A publication whose rollout is not complete is skipped: this one has the same base. So is a publication of the same
  // version with other bounds: rolling back to it would change nothing.
  const settledBefore = settledId(seen, basics.createdAt_ms);
  const isAtOnce = !isLater && rollout.length === 0;
  // Other steps for a version whose rollout is under way, or a repeated request: conversations that see it keep it.
  const isContinued = seen !== null && seen.version === request.version && settledBefore !== seen.id;
  return await flip(dependencies, request.hold, seen, {
    ...basics,
    owner,
    version: request.version,
    previousId: isAtOnce && seen?.version === request.version ? seen.previousId : settledBefore,
    action: 'activate',
    activateAt_ms: isLater ? activateAt_ms : null,
    rollout,
    rolloutId: isContinued ? seen.schedule.id : null,
    pausedAt_ms: null,
    autoRollback: autoRollback ?? null,
  });
}

/**
 * Refuses a rollout or a later start of a version that everyone already sees.
 * @throws MaskrouteError `conflict`.
 */
function requireNews(seen: LiveState | null, version: string, now_ms: number): void {
  const isSettled = seen !== null && settledId(seen, now_ms) === seen.id;
  const everyones = isSettled ? seen.version : seen?.base?.version;
  if (everyones !== version) return;
  const instead = isSettled
    ? 'publish it at once to change its bounds'
    : 'roll back to call the newer one off';
  const message = `${version} is what everyone sees already, so it cannot begin step by step or later: ${instead}.`;
  throw new MaskrouteError('conflict', message, { param: 'version' });
}

/**
 * Pauses or resumes the rollout of the newest publication; the same conversations see it. A pause lasts until it is
 * resumed. @throws MaskrouteError `conflict` when there is nothing to pause or resume, or another publisher was faster.
 */
export async function pauseOrResume(
  dependencies: Pick<PublishDependencies, 'db' | 'table'>,
  request: ChangeRequest,
  what: 'pause' | 'resume',
): Promise<Publication> {
  const seen = await seenLive(dependencies.db, request);
  const basics = flipBasics(request, seen);
  const now_ms = basics.createdAt_ms;
  const paused_ms = seen?.schedule.pausedAt_ms ?? null;
  if (seen === null || settledId(seen, now_ms) === seen.id) {
    throw new MaskrouteError('conflict', 'Everyone sees the live version: there is no rollout.');
  }
  if (seen.unreadable !== undefined) {
    const message = `Another version of the edge wrote it, and this one cannot read it: ${seen.unreadable}.`;
    throw new MaskrouteError('conflict', message);
  }
  if ((paused_ms !== null) === (what === 'pause')) {
    throw new MaskrouteError('conflict', paused_ms === null ? 'It is not paused.' : 'It is paused already.');
  }
  return await flip(dependencies, request.hold, seen, {
    ...basics,
    owner: seen.owner,
    version: seen.version,
    previousId: seen.previousId,
    action: what,
    // The time of the pause is added to the schedule.
    activateAt_ms: seen.schedule.activateAt_ms + (paused_ms === null ? 0 : now_ms - paused_ms),
    rollout: seen.rollout,
    rolloutId: seen.schedule.id,
    pausedAt_ms: what === 'pause' ? now_ms : null,
    autoRollback: seen.auto_rollback,
  });
}

/**
 * Returns at once to what everyone saw before the newest publication; repeated, to the one before that. A scheduled or
 * partial rollout is cancelled. Before a tenant's first publication there is nothing: a person can cancel it only until
 * everyone sees it, so that a second click does not leave the tenant without a set; automatic rollback (with a `reason`)
 * always can.
 * @throws MaskrouteError `conflict` when nothing came before, or another publisher was faster.
 */
export async function rollback(
  dependencies: Pick<PublishDependencies, 'db' | 'table'>,
  request: RollbackRequest,
): Promise<Publication> {
  const seen = await seenLive(dependencies.db, request);
  const basics = flipBasics(request, seen);
  const target =
    seen?.previousId == null ? null : await d1(findPublication(dependencies.db, seen.previousId));
  if (target === null) requireWithdrawable(seen, basics.createdAt_ms, request.reason !== undefined);
  const { owner, version, previousId } = target ?? NOTHING_LIVE;
  return await flip(dependencies, request.hold, seen, {
    ...basics,
    owner,
    version,
    previousId,
    ...AT_ONCE,
    action: 'rollback',
    autoRollback: null,
    reason: request.reason ?? null,
  });
}

/** Refuses to take back what was never published, or by hand what everyone sees. @throws MaskrouteError `conflict`. */
function requireWithdrawable(seen: PublicationState | null, now_ms: number, isAutomatic: boolean): void {
  const isEveryones = seen !== null && settledId(seen, now_ms) === seen.id;
  if (seen === null || (isEveryones && !isAutomatic)) {
    throw new MaskrouteError('conflict', 'Nothing was live before.');
  }
}

async function seenLive(
  db: Database,
  { tenant, expected, publication }: ChangeRequest,
): Promise<LiveState | null> {
  const seen = await d1(findLive(db, tenant));
  if (expected !== undefined && expected !== (seen?.version ?? null)) {
    throw new MaskrouteError('conflict', `The live version is ${seen?.version ?? 'none'}.`, {
      param: 'expected_version',
    });
  }
  if (publication !== undefined && publication !== seen?.id) throw cameLate();
  return seen;
}

const flipBasics = (request: Omit<PublishRequest, 'version'>, seen: PublicationState | null) => ({
  id: `p_${crypto.randomUUID()}`,
  tenant: request.tenant,
  replacedVersion: seen?.version ?? null,
  actor: request.actor,
  createdAt_ms: Date.now(),
  reason: null,
});

/** @throws MaskrouteError `conflict` when `seen` is no longer the newest publication. */
async function flip(
  { db, table }: Pick<PublishDependencies, 'db' | 'table'>,
  hold: Hold,
  seen: PublicationState | null,
  change: Flip,
): Promise<Publication> {
  const publication = await d1(flipLive(db, change, seen?.id ?? null));
  if (publication === null) throw cameLate();
  // It is live in any case; without the refresh this isolate would serve it a moment later.
  await table.refresh(change.tenant, hold).catch(() => {});
  return publication;
}

const cameLate = (): MaskrouteError =>
  new MaskrouteError('conflict', 'Another publication came first; look at what is live now.');

/** Checks the tenant's limits: the largest sparsity, and the least agreement with the dense model. */
async function checkTenantsTerms(db: Database, id: string, set: LiveSet): Promise<void> {
  if (set.agreement === null) {
    const advice = 'learn it with more prompts, so that some are held out';
    throw new MaskrouteError('quality_unknown', `The set has no held-out figures: ${advice}.`, {
      param: 'version',
    });
  }
  const tenant = id === DEFAULT_TENANT ? null : await d1(findTenant(db, id));
  if (tenant?.unreadable !== undefined) {
    const message = `This version of the edge cannot read the limits of ${id}, so no set can be checked: ${tenant.unreadable}.`;
    throw new MaskrouteError('conflict', message, { param: 'tenant' });
  }
  const sparsest = Math.max(...set.clusters.map(({ sparsity }) => sparsity));
  if (tenant?.sparsity_max != null && isOverCeiling(sparsest, tenant.sparsity_max)) {
    throw new MaskrouteError(
      'sparsity_over_ceiling',
      `A mask of the set skips ${percent(sparsest)} of the blocks; ${id} allows ${percent(tenant.sparsity_max)}.`,
      { param: 'version' },
    );
  }
  if (tenant?.agreement_min != null && !meetsFloor(set, tenant.agreement_min)) {
    throw new MaskrouteError(
      'quality_below_floor',
      `The set agrees with dense on ${percent(set.agreement)} of held-out tokens; ${id} asks for ${percent(tenant.agreement_min)}.`,
      { param: 'version' },
    );
  }
}

async function checkEncoder(set: LiveSet, embedder: Embedder, hold: Hold): Promise<void> {
  const { spec } = await embedder.askAgain(hold).catch((error) => {
    throw new MaskrouteError('not_ready', 'The edge cannot load its encoder, so no set can be checked.', {
      cause: error,
    });
  });
  if (sameEncoder(spec, set.encoder)) return;
  throw new MaskrouteError(
    'encoder_mismatch',
    `The set was made with ${describe(set.encoder)}, the edge embeds with ${describe(spec)}.`,
    { param: 'version' },
  );
}

const describe = ({ id, revision, pooling, dimensions }: EncoderSpec): string =>
  `${id} (revision ${revision}, ${pooling} pooling, ${dimensions} dimensions)`;

async function checkModel(set: LiveSet, models: Models, hold: Hold): Promise<void> {
  const served = await models.askAgain(hold).catch((error) => {
    throw notNow('backend_unreachable', 'No backend can say which models are served.', error);
  });
  const serving = served.filter((entry) => entry.maskroute?.hash === set.model.hash);
  if (serving.length > 0) return checkSurrogates(set, serving);
  throw new MaskrouteError(
    'mask_model_mismatch',
    `The set is for ${set.model.name} (${set.model.hash.slice(0, 12)}…), which no enabled backend serves.`,
    { param: 'version' },
  );
}

function checkSurrogates({ surrogates }: LiveSet, serving: readonly ModelEntry[]): void {
  if (surrogates === undefined) return;
  if (serving.some((entry) => entry.maskroute?.surrogates === surrogates)) return;
  throw new MaskrouteError(
    'surrogates_mismatch',
    `The masks need the surrogates ${surrogates}, which no enabled backend serves.`,
    { param: 'version' },
  );
}

/* Storing a mask set. */

/**
 * `created` is false when the same content was already stored. @throws MaskrouteError `invalid_mask_set` for a set that
 * is too large.
 */
export async function storeMaskSet(
  db: Database,
  tenant: string,
  written: WrittenMaskSet,
): Promise<{ created: boolean; summary: MaskSetSummary }> {
  const bytes = written.content_bytes;
  if (bytes > MASK_SET_BYTES_MAX) {
    const advice = 'use fewer clusters or dimensions, or write centroids with fewer digits';
    throw new MaskrouteError(
      'invalid_mask_set',
      `The set takes ${bytes} bytes, more than the ${MASK_SET_BYTES_MAX} that the database holds: ${advice}.`,
    );
  }
  return await d1(insertMaskSet(db, tenant, written, Date.now()));
}
