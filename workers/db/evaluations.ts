/** Evaluations of mask sets in D1: at most one a set, and whoever measures again replaces it. */
import { and, eq } from 'drizzle-orm';
import type { EvaluatedRow } from '../../shared/evaluation.ts';
import type { Database } from './client.ts';
import { evaluations } from './schema.ts';

export type WrittenEvaluation = { readonly content: string; readonly content_bytes: number };

export function writeEvaluation(rows: readonly EvaluatedRow[]): WrittenEvaluation {
  const content = JSON.stringify(rows);
  return { content, content_bytes: new TextEncoder().encode(content).length };
}

export async function putEvaluation(
  db: Database,
  set: { readonly owner: string; readonly version: string },
  written: WrittenEvaluation,
  now_ms: number,
): Promise<void> {
  const kept = { ...written, updatedAt_ms: now_ms };
  await db
    .insert(evaluations)
    .values({ owner: set.owner, version: set.version, ...kept })
    .onConflictDoUpdate({ target: [evaluations.owner, evaluations.version], set: kept });
}

/** Empty when there is none. */
export async function findEvaluation(
  db: Database,
  set: { readonly owner: string; readonly version: string },
): Promise<EvaluatedRow[]> {
  const rows = await db
    .select({ content: evaluations.content })
    .from(evaluations)
    .where(and(eq(evaluations.owner, set.owner), eq(evaluations.version, set.version)));
  return rows[0] === undefined ? [] : (JSON.parse(rows[0].content) as EvaluatedRow[]);
}
