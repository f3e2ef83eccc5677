/** How much a tenant has in the database that all share. */
import { count, eq, sql } from 'drizzle-orm';
import type { Database } from './client.ts';
import { apiKeys, evaluations, experiments, maskSets } from './schema.ts';

export type Stored = {
  /** Revoked and replaced ones, too. */
  readonly keys: number;
  /** Drafts and those that are over, too. */
  readonly experiments: number;
  /** With their evaluations. */
  readonly maskSets_bytes: number;
};

export async function findStored(db: Database, tenant: string): Promise<Stored> {
  const [[keys], [drafts], [sets], [evaluated]] = await db.batch([
    db.select({ count: count() }).from(apiKeys).where(eq(apiKeys.tenantId, tenant)),
    db.select({ count: count() }).from(experiments).where(eq(experiments.owner, tenant)),
    db
      .select({ bytes: sql<number>`coalesce(sum(${maskSets.content_bytes}), 0)` })
      .from(maskSets)
      .where(eq(maskSets.owner, tenant)),
    db
      .select({ bytes: sql<number>`coalesce(sum(${evaluations.content_bytes}), 0)` })
      .from(evaluations)
      .where(eq(evaluations.owner, tenant)),
  ]);
  const maskSets_bytes = sets!.bytes + evaluated!.bytes;
  return { keys: keys!.count, experiments: drafts!.count, maskSets_bytes };
}
