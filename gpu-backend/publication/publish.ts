/**
 * Publishing a mask set. The files (a set and its evaluation) are read and checked before anything is sent. Then the
 * set is stored under its content address, and the edge flips one pointer. Every step may be repeated. Of two
 * concurrent publications one gets a `conflict`; the live version is always one of the two.
 */
import { dirname } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { z } from 'zod';
import { listSchema } from '../../shared/admin/admin-wire.ts';
import {
  autoRollbackSchema,
  type LivePublication,
  livePublicationSchema,
  maskSetSummarySchema,
  type Publication,
  type PublishBody,
  publicationSchema,
  publishCheckSchema,
} from '../../shared/admin/publication-wire.ts';
import {
  type EvaluationFigures,
  evaluatedRowSchema,
  evaluationFiguresSchema,
  hasRowOf,
} from '../../shared/admin/stats-wire.ts';
import { type MaskSet, maskSetSchema, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { makeFolder, readJson, readOwnJson, sizeOf, unreadable, writeWhole } from '../files.ts';
import { type AdminClient, itemsOf, listAll } from './admin-client.ts';

/** Well above what a D1 row holds (2 MB), so that the edge's own limit is what people meet. */
const FILE_BYTES_MAX = 16 * 1024 * 1024;

/** @throws MaskrouteError `invalid_mask_set` with file and reason; `invalid_argument` when it is unreadable. */
export const readMaskSet = (file: string): Promise<MaskSet> =>
  readArtefact(file, maskSetSchema, 'the set', 'invalid_mask_set');

/**
 * The figures of an evaluation that the edge stores. @throws MaskrouteError `invalid_argument` with file and reason.
 */
export const readEvaluation = (file: string): Promise<EvaluationFigures> =>
  readArtefact(file, evaluationFiguresSchema, 'the evaluation', 'invalid_argument');

async function readArtefact<T>(
  file: string,
  schema: z.ZodType<T>,
  what: string,
  code: 'invalid_mask_set' | 'invalid_argument',
): Promise<T> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError(code, `${file}: ${reason}`, { cause });
  const json = await readJson(file, FILE_BYTES_MAX, invalid).catch((error: unknown) => {
    throw unreadable(file, error);
  });
  const checked = check(schema, json, what);
  if (checked.kind === 'good') return checked.value;
  throw invalid(checked.message);
}

/* Requests to the edge. */

/** When and for whom a set goes live, and what rolls it back. */
export type PublishSchedule = Pick<PublishBody, 'activate_at' | 'rollout' | 'auto_rollback'>;

type PublishOutcome = {
  readonly version: string;
  /**
   * `stored`: not live; `activated`: live from now on; `scheduled`: not everyone sees it yet; `already_scheduled` and
   * `already_live`: nothing changed; `bounds_changed`: everyone saw the version before, and only its bounds changed;
   * `published_before`: with `since`, nothing changed; `rolled_back`: with `unlessRolledBack`, nothing changed.
   */
  readonly state:
    | 'stored'
    | 'activated'
    | 'scheduled'
    | 'already_scheduled'
    | 'already_live'
    | 'bounds_changed'
    | 'published_before'
    | 'rolled_back';
  readonly replacedVersion: string | null;
};

/**
 * Stores the set and its evaluation (`figures`), and with `activate` makes the set live. A set that could not go live is
 * refused and not stored, except when another publisher comes in between.
 * @throws MaskrouteError the edge's own: another model or encoder, `conflict`, `forbidden`; `invalid_argument` for figures
 * of another set.
 */
export async function publishMaskSet(
  client: AdminClient,
  set: MaskSet,
  options: {
    readonly tenant: string;
    readonly activate: boolean;
    /** With `activate`: changes nothing if the version was published after this one; see {@link firstTry}. */
    readonly since?: Newest | undefined;
    /** With `activate`: changes nothing if the version is live in any way, or was rolled back. */
    readonly unlessRolledBack?: boolean;
    readonly schedule?: PublishSchedule;
    readonly figures?: EvaluationFigures | undefined;
  },
): Promise<PublishOutcome> {
  const { tenant, activate, since, unlessRolledBack = false, schedule, figures } = options;
  const version = maskSetVersion(set);
  if (figures !== undefined && !hasRowOf(figures, version)) throw invalid(`No row is of ${version}`);
  const unchanged = (state: PublishOutcome['state']) => ({ version, state, replacedVersion: null });
  // Before the history: who publishes or rolls back from now on makes this a conflict.
  const live = await livePublication(client, tenant);
  if (activate && since !== undefined && (await wasPublished(client, tenant, version, since)))
    return unchanged('published_before');
  if (activate && unlessRolledBack && (await isRolledBack(client, tenant, version)))
    return unchanged('rolled_back');
  // A version in a partial rollout may be activated again: for everyone, or with another schedule.
  const isEveryones = live?.version === version && live.share === 1;
  if (!isEveryones) await storeMaskSet(client, set, tenant, 'publishable');
  if (figures !== undefined) await storeEvaluation(client, version, figures, tenant);
  const publish = (more: PublishSchedule | undefined) => {
    const body = { version, tenant, expected_version: live?.version ?? null, ...more };
    return client.request({ method: 'POST', path: '/publications', body }, publicationSchema);
  };
  if (isEveryones) {
    const bounds = schedule?.auto_rollback;
    // Whoever changed them since meant it.
    if (!activate || bounds === undefined || unlessRolledBack) return unchanged('already_live');
    await publish({ auto_rollback: bounds });
    return unchanged('bounds_changed');
  }
  if (!activate) return unchanged('stored');
  // The rollout goes on, and does not begin again.
  if (live?.version === version && (unlessRolledBack || isScheduledSo(live, schedule)))
    return unchanged('already_scheduled');
  const publication = await publish(schedule);
  const isGradual = publication.rollout.length > 0 || publication.activate_at > publication.created_at;
  const state = isGradual ? 'scheduled' : 'activated';
  return { version, state, replacedVersion: publication.replaced_version };
}

/** Whether `live` was published with this schedule. */
function isScheduledSo(
  live: LivePublication,
  { activate_at, rollout = [], auto_rollback }: PublishSchedule = {},
) {
  const bounds = auto_rollback === undefined ? null : autoRollbackSchema.parse(auto_rollback);
  const isAtOnce = live.activate_at <= live.created_at;
  return (
    (activate_at === undefined ? isAtOnce : activate_at === live.activate_at) &&
    isDeepStrictEqual([live.rollout, live.auto_rollback], [rollout, bounds])
  );
}

/**
 * Stores the set without making it live; storing it again changes nothing. `publishable`: refuses a set that could not go
 * live. @throws MaskrouteError the edge's own.
 */
export async function storeMaskSet(
  client: AdminClient,
  set: MaskSet,
  tenant: string,
  which: 'any' | 'publishable' = 'any',
): Promise<void> {
  const query = new URLSearchParams({ tenant, publishable: String(which === 'publishable') });
  await client.request({ method: 'POST', path: `/mask-sets?${query}`, body: set }, maskSetSummarySchema);
}

/** Stores the evaluation of a stored set; replaces an earlier one. @throws MaskrouteError the edge's own. */
export async function storeEvaluation(
  client: AdminClient,
  version: string,
  figures: EvaluationFigures,
  tenant: string,
): Promise<void> {
  const path = `/mask-sets/${version}/evaluation${tenantQuery(tenant)}`;
  await client.request({ method: 'PUT', path, body: figures }, listSchema(evaluatedRowSchema));
}

/**
 * Makes the version live again that was live before `live`.
 * @throws MaskrouteError `conflict` when there is none, or when anything was published after `live`.
 */
export async function rollBack(
  client: AdminClient,
  tenant: string,
  live: LivePublication | undefined,
): Promise<Publication> {
  const body = { tenant, expected_version: live?.version ?? null, expected_publication: live?.id };
  return client.request({ method: 'POST', path: '/publications/rollback', body }, publicationSchema);
}

/** `undefined` when nothing was published. @throws MaskrouteError `not_found` when there is no such tenant. */
export async function livePublication(
  client: AdminClient,
  tenant: string,
): Promise<LivePublication | undefined> {
  try {
    return await client.request(
      { method: 'GET', path: `/publications/live${tenantQuery(tenant)}` },
      livePublicationSchema,
    );
  } catch (error) {
    if (error instanceof MaskrouteError && error.code === 'not_found' && error.param === null)
      return undefined;
    throw error;
  }
}

/** The version of no set. */
const NO_VERSION = `v_${'0'.repeat(24)}`;

/**
 * Checks that the client's key may publish for the tenant: asks whether a version could go live that no set has. `signal`:
 * ends the question.
 * @throws MaskrouteError the edge's own: `invalid_api_key`, `forbidden`, `not_found` for an unknown tenant.
 */
export async function requireMayPublish(
  client: AdminClient,
  tenant: string,
  signal?: AbortSignal,
): Promise<void> {
  const body = { version: NO_VERSION, tenant, activate: false };
  try {
    await client.request(
      { method: 'POST', path: '/publications', body, isDryRun: true, signal },
      publishCheckSchema,
    );
  } catch (error) {
    if (error instanceof MaskrouteError && error.code === 'not_found' && error.param === 'version') return;
    throw error;
  }
}

/** A tenant's publications, newest first. */
const publicationsOf = (client: AdminClient, tenant: string) =>
  itemsOf(client, `/publications${tenantQuery(tenant)}`, publicationSchema);

/**
 * Those that made this version live, or another one in its place; newest first. An edge that is older than this filter
 * refuses it: the answer is in the whole history, too.
 */
async function* publicationsAbout(
  client: AdminClient,
  tenant: string,
  version: string,
): AsyncGenerator<Publication, void> {
  const query = new URLSearchParams({ tenant, version });
  try {
    yield* itemsOf(client, `/publications?${query}`, publicationSchema);
  } catch (error) {
    const isUnknown =
      error instanceof MaskrouteError && error.code === 'invalid_request' && error.param === 'version';
    if (!isUnknown) throw error;
    yield* publicationsOf(client, tenant);
  }
}

/** Id of a tenant's newest publication at some time; null: there was none. */
type Newest = string | null;

const firstTrySchema = z.strictObject({ newest: z.string().nullable() });

/**
 * What was the tenant's newest publication when this was first called with `file`, which remembers it. Whoever publishes
 * with that as `since` may be killed and try again. @throws MaskrouteError the edge's own; `invalid_argument` for a file
 * of something else; `storage_failed` where its folder cannot be made. Rejects with the disk's error of writing it.
 */
export async function firstTry(client: AdminClient, tenant: string, file: string): Promise<Newest> {
  const known = await readOwnJson(file, firstTrySchema).catch((error: unknown) => {
    throw unreadable(file, error);
  });
  if (known !== undefined) return known.newest;
  if ((await sizeOf(file)) !== undefined)
    throw invalid(`${file} was not written by --once: name a file that is not there yet`);
  const [newest] = await publicationHistory(client, tenant, 1);
  const first = { newest: newest?.id ?? null };
  await makeFolder(dirname(file));
  await writeWhole(file, `${JSON.stringify(first)}\n`);
  return first.newest;
}

/**
 * Whether the version was published for the tenant after `since`. Where the history does not have that, as after the edge's
 * database was restored from a backup, whether it was ever published: to change nothing is the safer mistake.
 */
export async function wasPublished(
  client: AdminClient,
  tenant: string,
  version: string,
  since: Newest = null,
): Promise<boolean> {
  const entries =
    since === null ? publicationsAbout(client, tenant, version) : publicationsOf(client, tenant);
  for await (const entry of entries) {
    if (entry.id === since) return false;
    if (entry.version === version && entry.action === 'activate') return true;
  }
  return false;
}

/** Whether the last that happened to the version was that somebody, or a bound, rolled it back. */
async function isRolledBack(client: AdminClient, tenant: string, version: string): Promise<boolean> {
  for await (const entry of publicationsAbout(client, tenant, version)) {
    if (entry.version === version) return false;
    if (entry.replaced_version === version && entry.action === 'rollback') return true;
  }
  return false;
}

/** The newest `countMax`, or all; newest first. */
export const publicationHistory = (
  client: AdminClient,
  tenant: string,
  countMax?: number,
): Promise<Publication[]> =>
  listAll(client, `/publications${tenantQuery(tenant)}`, publicationSchema, countMax);

/**
 * Names of mask sets by version. The newest are in one list; older ones, and those that the tenant inherits from the default
 * tenant, are asked for one by one.
 */
export async function namesOfVersions(
  client: AdminClient,
  tenant: string,
  versions: readonly string[],
): Promise<ReadonlyMap<string, string>> {
  const query = tenantQuery(tenant);
  const names = new Map<string, string>();
  const unnamed = new Set(versions);
  if (unnamed.size === 0) return names;
  const newest = { method: 'GET', path: `/mask-sets${query}` } as const;
  const { data } = await client.request(newest, listSchema(maskSetSummarySchema));
  for (const { version, name } of data) if (unnamed.delete(version)) names.set(version, name);
  for (const version of unnamed) {
    const path = `/mask-sets/${version}${query}`;
    names.set(version, (await client.request({ method: 'GET', path }, namedSchema)).name);
  }
  return names;
}

const namedSchema = z.object({ name: z.string() });

const tenantQuery = (tenant: string): string =>
  tenant === '' ? '' : `?tenant=${encodeURIComponent(tenant)}`;

const invalid = (message: string) => new MaskrouteError('invalid_argument', `${message}.`);
