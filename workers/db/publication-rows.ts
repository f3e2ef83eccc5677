/**
 * Publications: what is live, and the history. Activating appends to the history and flips the tenant's pointer in one
 * batch, which does nothing when the pointer has changed since the publisher read it.
 *
 * The pointer names the newest publication. Until its schedule is complete, readers compute from the schedule and the
 * clock which requests see it and which still see its base: the last publication that everyone saw.
 */
import { and, desc, eq, or, type SQL, sql } from 'drizzle-orm';
import { alias } from 'drizzle-orm/sqlite-core';
import {
  type AutoRollback,
  autoRollbackSchema,
  type Publication,
  type PublicationsQuery,
  rolloutSchema,
} from '../../shared/admin/publication-wire.ts';
import { completesAt_ms, type Rollout, type RolloutStep } from '../../shared/mask/sticky.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { type Database, firstOf, holds, isoTime, type Page, pastCursor, storedJson, toPage } from './d1.ts';
import { live, publications } from './schema.ts';

type PublicationRow = typeof publications.$inferSelect;
type VersionOf = { readonly owner: string; readonly version: string };

/** A publication with the fields that readers and rollbacks need. */
export type PublicationState = Publication & {
  readonly owner: string;
  readonly version: string;
  readonly schedule: Rollout;
  /** The publication to which a rollback returns: the one that everyone saw when this was made. */
  readonly previousId: string | null;
};
/** A tenant's newest publication, and its base: what requests see that do not see it yet. */
export type LiveState = PublicationState & { readonly base: VersionOf | null };

/** A new publication. */
export type Flip = Readonly<Omit<PublicationRow, 'sequence' | 'rollout' | 'autoRollback'>> & {
  readonly rollout: readonly RolloutStep[];
  readonly autoRollback: AutoRollback | null;
};

const bases = alias(publications, 'bases');

/** Reads one row, to check that the database can be read. */
export async function askForTables(db: Database): Promise<void> {
  await db.select({ tenant: live.tenant }).from(live).limit(1);
}

/** The newest publication of exactly this tenant (no falling back to the default one). */
export async function findLive(db: Database, tenant: string): Promise<LiveState | null> {
  const [state] = await liveStates(db, eq(live.tenant, tenant));
  return state ?? null;
}

/** Newest publications of these versions that have bounds for automatic rollback. */
export function listGuarded(db: Database, versions: readonly string[]): Promise<LiveState[]> {
  const isOfThese = sql`${publications.version} in (select value from json_each(${JSON.stringify(versions)}))`;
  return liveStates(db, and(sql`${publications.autoRollback} is not null`, isOfThese));
}

async function liveStates(db: Database, condition: SQL | undefined): Promise<LiveState[]> {
  const rows = await db
    .select({ publication: publications, base: { owner: bases.owner, version: bases.version } })
    .from(live)
    .innerJoin(publications, eq(publications.id, live.publicationId))
    .leftJoin(bases, eq(bases.id, publications.previousId))
    .where(condition);
  return rows.map(({ publication, base }) => ({ ...toState(publication), base }));
}

export const findPublication = (db: Database, id: string): Promise<PublicationState | null> =>
  firstOf(db.select().from(publications).where(eq(publications.id, id)), toState);

/** Newest first. */
export async function listPublications(
  db: Database,
  tenant: string,
  { before, limit, q, version: about }: Omit<PublicationsQuery, 'tenant'>,
): Promise<Page<Publication>> {
  const { id, sequence, version, replacedVersion, actor, reason } = publications;
  const rows = await db
    .select()
    .from(publications)
    .where(
      and(
        eq(publications.tenant, tenant),
        about === undefined ? undefined : or(eq(version, about), eq(replacedVersion, about)),
        holds(q, version, actor, reason),
        pastCursor(sequence, id, before),
      ),
    )
    .orderBy(desc(sequence))
    .limit(limit + 1);
  return toPage(rows, limit, (row) => ({ at: row.sequence, id: row.id }), toPublication);
}

/** Leaves a tenant without a publication of its own; the columns cannot be null. */
export const NOTHING_LIVE = { owner: '', version: '', previousId: null } as const;

/** The schedule of a publication that everyone sees at once. */
export const AT_ONCE = { activateAt_ms: null, rollout: [], rolloutId: null, pausedAt_ms: null } as const;

/**
 * Makes `flip` live if `seenId` (null: none) is still the newest publication; otherwise returns null and writes
 * nothing. The second statement finds a row only if the first one wrote it.
 */
export async function flipLive(db: Database, flip: Flip, seenId: string | null): Promise<Publication | null> {
  const liveNow = sql`(select ${live.publicationId} from ${live} where ${live.tenant} = ${flip.tenant})`;
  const rollout = flip.rollout.length === 0 ? null : JSON.stringify(flip.rollout);
  const autoRollback = flip.autoRollback === null ? null : JSON.stringify(flip.autoRollback);
  const point =
    flip.version === NOTHING_LIVE.version
      ? db.delete(live).where(sql`${live.tenant} = ${flip.tenant} and exists
          (select 1 from ${publications} where ${publications.id} = ${flip.id})`)
      : db
          .insert(live)
          .select(sql`select tenant, id from ${publications} where id = ${flip.id}`)
          .onConflictDoUpdate({ target: live.tenant, set: { publicationId: sql`excluded.publication_id` } });
  const [, , written] = await db.batch([
    // The columns are those of the table, in its order; a null sequence is given the next number.
    db
      .insert(publications)
      .select(sql`select null, ${flip.id}, ${flip.tenant}, ${flip.owner}, ${flip.version},
      ${flip.replacedVersion}, ${flip.previousId}, ${flip.action}, ${flip.actor}, ${flip.createdAt_ms},
      ${flip.activateAt_ms}, ${rollout}, ${autoRollback}, ${flip.reason}, ${flip.rolloutId}, ${flip.pausedAt_ms}
      where ${liveNow} is ${seenId}`),
    point,
    db.select().from(publications).where(eq(publications.id, flip.id)),
  ]);
  return written[0] === undefined ? null : toPublication(written[0]);
}

/** Id of the last publication that everyone sees at `now_ms`: this one if its rollout is complete, else its base. */
export const settledId = (state: PublicationState | null, now_ms: number): string | null =>
  state === null || completesAt_ms(state.schedule) <= now_ms ? (state?.id ?? null) : state.previousId;

const rolloutOf = (row: PublicationRow) => check(rolloutSchema, storedJson(row.rollout) ?? [], 'the rollout');

const activationOf = (row: PublicationRow): number => row.activateAt_ms ?? row.createdAt_ms;

/**
 * A rollout or bounds that another version of the edge wrote are left out: the page that shows them, and rolls them back, must
 * not fail with them.
 */
function toPublication(row: PublicationRow): Publication {
  const rollout = rolloutOf(row);
  const autoRollback = check(autoRollbackSchema.nullable(), storedJson(row.autoRollback), 'the bounds');
  const unreadable = [rollout, autoRollback].find(({ kind }) => kind === 'bad');
  return {
    id: row.id,
    tenant: row.tenant,
    version: row.version === NOTHING_LIVE.version ? null : row.version,
    replaced_version: row.replacedVersion,
    action: row.action,
    actor: row.actor,
    created_at: isoTime(row.createdAt_ms),
    activate_at: isoTime(activationOf(row)),
    rollout: rollout.kind === 'good' ? rollout.value : [],
    auto_rollback: autoRollback.kind === 'good' ? autoRollback.value : null,
    reason: row.reason,
    ...(unreadable?.kind === 'bad' ? { unreadable: unreadable.message } : {}),
  };
}

/** A publication whose rollout cannot be read is paused before its beginning: who sees it is not known here. */
function toState(row: PublicationRow): PublicationState {
  const rollout = rolloutOf(row);
  const isReadable = rollout.kind === 'good';
  return {
    ...toPublication(row),
    owner: row.owner,
    version: row.version,
    schedule: {
      id: row.rolloutId ?? row.id,
      activateAt_ms: isReadable ? activationOf(row) : Number.POSITIVE_INFINITY,
      steps: isReadable ? rollout.value : [],
      pausedAt_ms: isReadable ? row.pausedAt_ms : row.createdAt_ms,
    },
    previousId: row.previousId,
  };
}
