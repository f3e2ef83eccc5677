/** What tenants used, by day, model and mask; `count-events.ts` counts it. */
import { and, asc, between, type Column, eq, sql } from 'drizzle-orm';
import { USAGE_ROWS_MAX, type UsageGroup, type UsageRow } from '../../shared/admin.ts';
import type { Database } from './client.ts';
import { usage } from './schema.ts';

export type UsageQuestion = {
  /** Undefined: all tenants. */
  readonly tenant: string | undefined;
  /** Days, both included. */
  readonly from: string;
  readonly to: string;
  readonly group: readonly UsageGroup[];
};

const COLUMNS = { tenant: usage.tenantId, day: usage.day, model: usage.model, mask: usage.mask };

/** At most {@link USAGE_ROWS_MAX}, ordered by what is grouped by. */
export async function sumUsage(
  db: Database,
  { tenant, from, to, group }: UsageQuestion,
): Promise<UsageRow[]> {
  const by = group.map((name) => COLUMNS[name]);
  const column = (name: UsageGroup) =>
    group.includes(name) ? sql<string>`${COLUMNS[name]}` : sql<null>`null`;
  const sum = (of: Column) => sql<number>`coalesce(sum(${of}), 0)`;
  return await db
    .select({
      tenant: column('tenant'),
      day: column('day'),
      model: column('model'),
      mask: column('mask'),
      requests: sum(usage.requests),
      errors: sum(usage.errors),
      prompt_tokens: sum(usage.prompt_tokens),
      completion_tokens: sum(usage.completion_tokens),
    })
    .from(usage)
    .where(and(between(usage.day, from, to), tenant === undefined ? undefined : eq(usage.tenantId, tenant)))
    .groupBy(...by)
    .orderBy(...by.map((one) => asc(one)))
    .limit(USAGE_ROWS_MAX);
}
