/**
 * What is live, and how it came to be. Activating appends to the history and flips the tenant's pointer in
 * one batch that does nothing when the pointer is no longer where the publisher saw it.
 */
import { and, desc, eq, inArray, sql } from 'drizzle-orm';
import { DEFAULT_TENANT, LIST_COUNT_MAX, type Publication } from '../../shared/admin.ts';
import { type Database, isoTime } from './client.ts';
import { live, publications } from './schema.ts';

type PublicationRow = typeof publications.$inferSelect;
/** A publication with what a rollback needs. */
export type PublicationState = Publication & {
  readonly owner: string;
  readonly previousId: string | null;
};

export type Flip = {
  readonly id: string;
  readonly tenant: string;
  /** Who owns the mask set: the tenant or the default owner. */
  readonly owner: string;
  readonly version: string;
  readonly replaced_version: string | null;
  readonly previousId: string | null;
  readonly action: Publication['action'];
  readonly actor: string;
  readonly createdAt_ms: number;
};

/** The live publication of exactly this tenant (no falling back to the default one). */
export async function findLive(db: Database, tenant: string): Promise<PublicationState | null> {
  const rows = await db
    .select({ publication: publications })
    .from(live)
    .innerJoin(publications, eq(publications.id, live.publicationId))
    .where(eq(live.tenant, tenant))
    .limit(1);
  return rows[0] === undefined ? null : toState(rows[0].publication);
}

/** What the requests of `tenant` use: its own live set, or else the default one. */
export async function findLiveForRequests(
  db: Database,
  tenant: string,
): Promise<{ owner: string; version: string } | null> {
  const rows = await db
    .select({ owner: publications.owner, version: publications.version })
    .from(live)
    .innerJoin(publications, eq(publications.id, live.publicationId))
    .where(inArray(live.tenant, [tenant, DEFAULT_TENANT]))
    .orderBy(desc(live.tenant))
    .limit(1);
  return rows[0] ?? null;
}

export async function findPublication(db: Database, id: string): Promise<PublicationState | null> {
  const rows = await db.select().from(publications).where(eq(publications.id, id)).limit(1);
  return rows[0] === undefined ? null : toState(rows[0]);
}

/** Newest first. */
export async function listPublications(db: Database, tenant: string): Promise<Publication[]> {
  const rows = await db
    .select()
    .from(publications)
    .where(eq(publications.tenant, tenant))
    .orderBy(desc(publications.sequence))
    .limit(LIST_COUNT_MAX);
  return rows.map((row) => toPublication(row));
}

/**
 * Makes `flip` live if `seenId` (null: nothing) is still the live publication; null when it is not, and then
 * nothing was written. The second statement finds a row only if the first one wrote it.
 */
export async function flipLive(db: Database, flip: Flip, seenId: string | null): Promise<Publication | null> {
  const liveNow = sql`(select ${live.publicationId} from ${live} where ${live.tenant} = ${flip.tenant})`;
  const [, , written] = await db.batch([
    // The columns are those of the table, in its order; a null sequence is given the next number.
    db
      .insert(publications)
      .select(sql`select null, ${flip.id}, ${flip.tenant}, ${flip.owner}, ${flip.version},
      ${flip.replaced_version}, ${flip.previousId}, ${flip.action}, ${flip.actor}, ${flip.createdAt_ms}
      where ${liveNow} is ${seenId}`),
    db
      .insert(live)
      .select(sql`select tenant, id from ${publications} where id = ${flip.id}`)
      .onConflictDoUpdate({ target: live.tenant, set: { publicationId: sql`excluded.publication_id` } }),
    db
      .select({ publication: publications })
      .from(live)
      .innerJoin(publications, eq(publications.id, live.publicationId))
      .where(and(eq(live.tenant, flip.tenant), eq(live.publicationId, flip.id))),
  ]);
  return written[0] === undefined ? null : toPublication(written[0].publication);
}

const toPublication = (row: PublicationRow): Publication => ({
  id: row.id,
  tenant: row.tenant,
  version: row.version,
  replaced_version: row.replacedVersion,
  action: row.action,
  actor: row.actor,
  created_at: isoTime(row.createdAt_ms),
});

const toState = (row: PublicationRow): PublicationState => ({
  ...toPublication(row),
  owner: row.owner,
  previousId: row.previousId,
});
