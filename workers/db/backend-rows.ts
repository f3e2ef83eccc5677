/** The registry of backends in D1. */
import { eq, sql } from 'drizzle-orm';
import { BACKENDS_MAX, readableBackend, storedBackendSchema } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { type Database, firstOf, holds, orConflict, storedJson } from './d1.ts';
import { backends } from './schema.ts';

export type BackendRow = {
  readonly id: string;
  readonly url: string;
  readonly regions: readonly string[];
  readonly weight: number;
  readonly enabled: boolean;
  /** Why this version of the edge cannot read it; null: it can. */
  readonly unreadable: string | null;
  /** Null for an entry that is not stored. */
  readonly createdAt_ms: number | null;
  readonly updatedAt_ms: number | null;
};
type BackendFields = Pick<BackendRow, 'url' | 'regions' | 'weight' | 'enabled'>;

/** `q`: only backends with this text in their id, address or regions. */
export async function listBackends(db: Database, q?: string): Promise<BackendRow[]> {
  const { id, url, regions } = backends;
  const rows = await db
    .select()
    .from(backends)
    .where(holds(q, id, url, regions))
    .orderBy(id)
    .limit(BACKENDS_MAX);
  return rows.map(toBackend);
}

export const findBackend = (db: Database, id: string): Promise<BackendRow | null> =>
  firstOf(db.select().from(backends).where(eq(backends.id, id)), toBackend);

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
  if (inserted !== undefined) return toBackend(inserted);
  throw new MaskrouteError('conflict', `There are ${BACKENDS_MAX} backends already.`);
}

/** Null when there is no such backend. */
export function updateBackend(
  db: Database,
  id: string,
  change: { readonly [Field in keyof BackendFields]?: BackendFields[Field] | undefined },
  now_ms: number,
): Promise<BackendRow | null> {
  const { regions, ...rest } = change;
  const columns = {
    ...rest,
    ...(regions === undefined ? {} : { regions: JSON.stringify(regions) }),
    updatedAt_ms: now_ms,
  };
  return firstOf(db.update(backends).set(columns).where(eq(backends.id, id)).returning(), toBackend);
}

/** Returns whether the backend existed. */
export async function deleteBackend(db: Database, id: string): Promise<boolean> {
  const rows = await db.delete(backends).where(eq(backends.id, id)).returning({ id: backends.id });
  return rows.length > 0;
}

/** A row that another version of the edge, or a hand, wrote must not take the others with it. */
function toBackend({ regions, ...row }: typeof backends.$inferSelect): BackendRow {
  const stored = { ...row, regions: storedJson(regions) };
  const checked = check(storedBackendSchema, stored, 'the backend');
  if (checked.kind === 'good') return { ...row, ...checked.value, unreadable: null };
  return { ...row, ...readableBackend(stored), unreadable: checked.message };
}
