/** Mask sets and masks in D1: immutable, so every write is an insert that may find its row already there. */
import { utf8ToBytes } from '@noble/hashes/utils.js';
import { and, desc, eq, getTableColumns, inArray, sql } from 'drizzle-orm';
import { DEFAULT_TENANT, type PageQuery } from '../../shared/admin/admin-wire.ts';
import type { MaskSetSummary } from '../../shared/admin/publication-wire.ts';
import { type EvaluatedRow, evaluatedRowSchema } from '../../shared/admin/stats-wire.ts';
import { maskFromBits, sparsity } from '../../shared/mask/mask.ts';
import { canonicalJson, type MaskSet, versionOfJson } from '../../shared/mask/mask-set.ts';
import { check } from '../../shared/wire/parse-body.ts';
import type { MaskRecord } from '../../shared/wire/protocol.ts';
import { type Database, firstOf, holds, isoTime, type Page, pastCursor, storedJson, toPage } from './d1.ts';
import { evaluations, maskSets, masks } from './schema.ts';

/** D1 takes 100 bound parameters a statement; a mask binds five. */
const MASKS_A_STATEMENT = 20;

const { content: _, ...summaryColumns } = getTableColumns(maskSets);
type SummaryRow = Omit<typeof maskSets.$inferSelect, 'content'>;

/** A set with its JSON text, which can have 2 MB, so it is serialized and measured once. */
export type WrittenMaskSet = Measured & { readonly set: MaskSet; readonly version: string };

/** A text with its size in UTF-8: D1 stores at most 2 MB in a row. */
type Measured = { readonly content: string; readonly content_bytes: number };
const measured = (content: string): Measured => ({ content, content_bytes: utf8ToBytes(content).length });

export function writeMaskSet(set: MaskSet): WrittenMaskSet {
  const content = canonicalJson(set);
  return { set, version: versionOfJson(content), ...measured(content) };
}

/** Stores the set and its masks in one batch. `created` is false when the same content was already stored. */
export async function insertMaskSet(
  db: Database,
  owner: string,
  { set, version, content, content_bytes }: WrittenMaskSet,
  now_ms: number,
): Promise<{ created: boolean; summary: MaskSetSummary }> {
  const insertSet = db
    .insert(maskSets)
    .values({
      owner,
      version,
      name: set.name,
      modelName: set.model.name,
      modelHash: set.model.hash,
      encoder: set.encoder.id,
      clusterCount: set.clusters.length,
      reachedSparsity: set.reachedSparsity,
      content,
      content_bytes,
      createdAt_ms: now_ms,
    })
    .onConflictDoNothing()
    .returning({ version: maskSets.version });
  const insertMasks = chunks(maskRecords(set), MASKS_A_STATEMENT).map((rows) =>
    db.insert(masks).values(rows).onConflictDoNothing(),
  );
  const [inserted] = await db.batch([insertSet, ...insertMasks]);
  const summary = (await findMaskSetSummary(db, owner, version))!;
  return { created: inserted.length > 0, summary };
}

/** The summary of a set of exactly this owner; null if there is none. */
export function findMaskSetSummary(
  db: Database,
  owner: string,
  version: string,
): Promise<MaskSetSummary | null> {
  const isNamed = and(eq(maskSets.owner, owner), eq(maskSets.version, version));
  return firstOf(db.select(summaryColumns).from(maskSets).where(isNamed), toSummary);
}

/** Of one owner, newest first, without their content. */
export async function listMaskSets(
  db: Database,
  owner: string,
  { before, limit, q }: PageQuery,
): Promise<Page<MaskSetSummary>> {
  const { version, createdAt_ms, name, modelName } = maskSets;
  const rows = await db
    .select(summaryColumns)
    .from(maskSets)
    .where(
      and(
        eq(maskSets.owner, owner),
        holds(q, version, name, modelName),
        pastCursor(createdAt_ms, version, before),
      ),
    )
    .orderBy(desc(createdAt_ms), version)
    .limit(limit + 1);
  return toPage(rows, limit, (row) => ({ at: row.createdAt_ms, id: row.version }), toSummary);
}

export type StoredMaskSet = { readonly owner: string; readonly version: string; readonly content: string };

/** The JSON text of a set that `tenant` may use: its own, or the default owner's. */
export async function findMaskSet(
  db: Database,
  tenant: string,
  version: string,
): Promise<StoredMaskSet | null> {
  const [row] = await db
    .select({ owner: maskSets.owner, version: maskSets.version, content: maskSets.content })
    .from(maskSets)
    .where(and(inArray(maskSets.owner, [tenant, DEFAULT_TENANT]), eq(maskSets.version, version)))
    .orderBy(desc(maskSets.owner))
    .limit(1);
  return row ?? null;
}

/** The number of clusters of each version; it does not depend on the owner. */
export async function findClusterCounts(
  db: Database,
  versions: readonly string[],
): Promise<Map<string, number>> {
  const rows = await db
    .selectDistinct({ version: maskSets.version, clusters: maskSets.clusterCount })
    .from(maskSets)
    .where(sql`${maskSets.version} in (select value from json_each(${JSON.stringify(versions)}))`);
  return new Map(rows.map(({ version, clusters }) => [version, clusters]));
}

export async function findMask(db: Database, id: string): Promise<MaskRecord | null> {
  const [row] = await db.select().from(masks).where(eq(masks.id, id));
  return row ?? null;
}

/** Null for a mask that no set ever had. */
export async function findMaskSparsity(db: Database, id: string): Promise<number | null> {
  const record = await findMask(db, id);
  return record === null ? null : sparsity(maskFromBits(record.blockCount, record.bits));
}

/** One record for each distinct mask. The dense mask has the same id for every model and needs no record. */
function maskRecords(set: MaskSet): MaskRecord[] {
  const records = new Map<string, MaskRecord>();
  for (const { mask, bits } of set.clusters) {
    if (mask === 'dense') continue;
    const { hash: modelHash, blockCount } = set.model;
    records.set(mask, { id: mask, modelHash, blockCount, bits, surrogates: set.surrogates ?? null });
  }
  return [...records.values()];
}

const toSummary = (row: SummaryRow): MaskSetSummary => ({
  version: row.version,
  tenant: row.owner,
  name: row.name,
  model: { name: row.modelName, hash: row.modelHash },
  encoder: row.encoder,
  clusters: row.clusterCount,
  reached_sparsity: row.reachedSparsity,
  bytes: row.content_bytes,
  created_at: isoTime(row.createdAt_ms),
});

function chunks<T>(items: readonly T[], size: number): T[][] {
  const parts: T[][] = [];
  for (let start = 0; start < items.length; start += size) parts.push(items.slice(start, start + size));
  return parts;
}

/* Evaluations of mask sets in D1: at most one for each set; a new evaluation replaces it. */

export const writeEvaluation = (rows: readonly EvaluatedRow[]): Measured => measured(JSON.stringify(rows));

export async function putEvaluation(
  db: Database,
  set: { readonly owner: string; readonly version: string },
  written: Measured,
  now_ms: number,
): Promise<void> {
  const kept = { ...written, updatedAt_ms: now_ms };
  await db
    .insert(evaluations)
    .values({ owner: set.owner, version: set.version, ...kept })
    .onConflictDoUpdate({ target: [evaluations.owner, evaluations.version], set: kept });
}

export type StoredEvaluation = {
  /** Empty if they cannot be read. */
  readonly rows: readonly EvaluatedRow[];
  /** Why this version of the edge cannot read them; null: it can. */
  readonly unreadable: string | null;
  /** 0 when none is stored. */
  readonly content_bytes: number;
};

/** Without rows when there is none. */
export async function findEvaluation(
  db: Database,
  set: { readonly owner: string; readonly version: string },
): Promise<StoredEvaluation> {
  const [row] = await db
    .select({ content: evaluations.content, content_bytes: evaluations.content_bytes })
    .from(evaluations)
    .where(and(eq(evaluations.owner, set.owner), eq(evaluations.version, set.version)));
  if (row === undefined) return { rows: [], unreadable: null, content_bytes: 0 };
  const { content, content_bytes } = row;
  const checked = check(evaluatedRowSchema.array(), storedJson(content), 'the evaluation');
  return checked.kind === 'good'
    ? { rows: checked.value, unreadable: null, content_bytes }
    : { rows: [], unreadable: checked.message, content_bytes };
}
