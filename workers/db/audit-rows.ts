/**
 * The audit log in D1. An entry is inserted before its change is made and completed after it, so that no change is
 * missing. Otherwise entries never change.
 */
import { and, desc, eq, isNull, lt } from 'drizzle-orm';
import type { AuditEntry, PageQuery } from '../../shared/admin/admin-wire.ts';
import { type Database, firstOf, holds, isIfGiven, isoTime, type Page, storedJson, toPage } from './d1.ts';
import { auditLog } from './schema.ts';

type NewAudit = Pick<
  typeof auditLog.$inferInsert,
  'createdAt_ms' | 'tenant' | 'actor' | 'address' | 'action' | 'target' | 'requestId'
>;

/** Inserts an entry and returns its number. */
export async function beginAudit(db: Database, entry: NewAudit): Promise<number> {
  const [row] = await db.insert(auditLog).values(entry).returning({ sequence: auditLog.sequence });
  return row!.sequence;
}

/** `tenant`: the tenant that was changed, as far as it is known only now. */
export async function completeAudit(
  db: Database,
  sequence: number,
  outcome: { readonly tenant: string; readonly before: unknown; readonly after: unknown },
): Promise<void> {
  await db
    .update(auditLog)
    .set({ tenant: outcome.tenant, before: written(outcome.before), after: written(outcome.after) })
    .where(and(eq(auditLog.sequence, sequence), isNull(auditLog.after)));
}

/** Deletes the entry of a refused change, which changed nothing. */
export async function dropAudit(db: Database, sequence: number): Promise<void> {
  await db.delete(auditLog).where(and(eq(auditLog.sequence, sequence), isNull(auditLog.after)));
}

/** Newest first. `tenant`: undefined for everything. */
export async function listAudit(
  db: Database,
  tenant: string | undefined,
  { before, limit, q }: PageQuery,
): Promise<Page<AuditEntry>> {
  const { sequence, requestId, actor, action, target, address } = auditLog;
  const rows = await db
    .select()
    .from(auditLog)
    .where(
      and(
        isIfGiven(auditLog.tenant, tenant),
        holds(q, actor, action, target, address, requestId),
        before === undefined ? undefined : lt(sequence, before.at),
      ),
    )
    .orderBy(desc(sequence))
    .limit(limit + 1);
  return toPage(rows, limit, (row) => ({ at: row.sequence, id: String(row.sequence) }), toEntry);
}

/** Null if there is none, or it belongs to another tenant. `tenant` undefined: any tenant. */
export function findAudit(db: Database, tenant: string | undefined, id: number): Promise<AuditEntry | null> {
  const owned = and(eq(auditLog.sequence, id), isIfGiven(auditLog.tenant, tenant));
  return firstOf(db.select().from(auditLog).where(owned), toEntry);
}

/** Longest stored state; a larger one is replaced by its size. */
const STATE_CHARS_MAX = 20_000;

function written(state: unknown): string {
  const text = JSON.stringify(state ?? null);
  return text.length <= STATE_CHARS_MAX ? text : JSON.stringify({ omitted_chars: text.length });
}

/** `null` is a state, too: nothing was there, or is left. */
const stateIn = (text: string | null): unknown => (text === 'null' ? null : storedJson(text));

const toEntry = (row: typeof auditLog.$inferSelect): AuditEntry => ({
  id: row.sequence,
  created_at: isoTime(row.createdAt_ms),
  tenant: row.tenant,
  actor: row.actor,
  address: row.address === '' ? null : row.address,
  action: row.action,
  target: row.target,
  before: stateIn(row.before),
  after: stateIn(row.after),
  is_known: row.after !== null,
  request_id: row.requestId,
});
