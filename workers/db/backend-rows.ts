/** The registry of backends in D1. */
import { eq, sql } from 'drizzle-orm';
import { BACKENDS_MAX } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type Database, holds, orConflict } from './d1.ts';
import { backends } from './schema.ts';

export type BackendRow = {
  readonly id: string;
  readonly url: string;
  readonly regions: readonly string[];
  readonly weight: number;
  readonly enabled: boolean;
  /** Null for an entry that is not stored. */
  readonly createdAt_ms: number | null;
  readonly updatedAt_ms: number | null;
};
type BackendFields = Pick<BackendRow, 'url' | 'regions' | 'weight' | 'enabled'>;

/** `q`: only backends with this text in their id, address or regions. */
export async function listBackends(db: Database, q?: string): Promise<BackendRow[]> {
  const { id, url, regions } = backends;
  return await db
    .select()
    .from(backends)
    .where(holds(q, id, url, regions))
    .orderBy(id)
    .limit(BACKENDS_MAX);
}

export async function findBackend(db: Database, id: string): Promise<BackendRow | null> {
  const rows = await db.select().from(backends).where(eq(backends.id, id)).limit(1);
  return rows[0] ?? null;
}

/** @throws MaskrouteError `conflict` when the id is taken or there are {@link BACKENDS_MAX} already. */
export async function insertBackend(
  db: Database,
  id: string,
  fields: BackendFields,
  now_ms: number,
): Promise<BackendRow> {
  const { url, regions, weight, enabled } = fields;
  // A single statement, so that two concurrent inserts can't exceed the limit.
  const inserting = db
    .insert(backends)
    .select(
      sql`select ${id}, ${url}, ${JSON.stringify(regions)}, ${weight}, ${enabled ? 1 : 0}, ${now_ms}, ${now_ms}
      where (select count(*) from ${backends}) < ${BACKENDS_MAX}`,
    )
    .returning();
  const [inserted] = await orConflict(inserting, `There is a backend ${id} already.`);
  if (inserted !== undefined) return inserted;
  throw new MaskrouteError('conflict', `There are ${BACKENDS_MAX} backends already.`);
}

/** Null when there is no such backend. */
export async function updateBackend(
  db: Database,
  id: string,
  change: { readonly [Field in keyof BackendFields]?: BackendFields[Field] | undefined },
  now_ms: number,
): Promise<BackendRow | null> {
  const { regions, ...rest } = change;
  const rows = await db
    .update(backends)
    .set({ ...rest, ...(regions === undefined ? {} : { regions: [...regions] }), updatedAt_ms: now_ms })
    .where(eq(backends.id, id))
    .returning();
  return rows[0] ?? null;
}

/** Returns whether the backend existed. */
export async function deleteBackend(db: Database, id: string): Promise<boolean> {
  const rows = await db.delete(backends).where(eq(backends.id, id)).returning({ id: backends.id });
  return rows.length > 0;
}
