/** What tenants used, by day, model and mask; `count-events.ts` counts it. */
import { and, asc, between, type Column, eq, sql } from 'drizzle-orm';
import type { UsageGroup, UsageQuery, UsageRow } from '../../shared/admin.ts';
import type { Database } from './client.ts';
import { usage } from './schema.ts';

/** Without a tenant: all of them. */
export type UsageQuestion = Omit<UsageQuery, 'tenant'> & { readonly tenant: string | undefined };

export type UsagePage = {
  readonly data: UsageRow[];
  /** What the last row is grouped by, when there are more; null when there are none. */
  readonly next: readonly string[] | null;
};

const COLUMNS = { tenant: usage.tenantId, day: usage.day, model: usage.model, mask: usage.mask };

/** Ordered by what is grouped by; from after the row that is grouped by `after` on. */
export async function sumUsage(
  db: Database,
  { tenant, from, to, group, after, limit }: UsageQuestion,
): Promise<UsagePage> {
  const by = group.map((name) => COLUMNS[name]);
  const column = (name: UsageGroup) =>
    group.includes(name) ? sql<string>`${COLUMNS[name]}` : sql<null>`null`;
  const sum = (of: Column) => sql<number>`coalesce(sum(${of}), 0)`;
  const rows: UsageRow[] = await db
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
    .where(
      and(
        between(usage.day, from, to),
        tenant === undefined ? undefined : eq(usage.tenantId, tenant),
        after === undefined ? undefined : sql`(${list(by)}) > (${list(after)})`,
      ),
    )
    .groupBy(...by)
    .orderBy(...by.map((one) => asc(one)))
    .limit(limit + 1);
  const data = rows.slice(0, limit);
  const last = data.at(-1);
  const next = rows.length > limit && last !== undefined ? group.map((name) => last[name]!) : null;
  return { data, next };
}

const list = (values: readonly (Column | string)[]) =>
  sql.join(
    values.map((value) => sql`${value}`),
    sql`, `,
  );
