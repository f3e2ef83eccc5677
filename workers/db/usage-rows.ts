/** What tenants used (count-events.ts counts it), where their requests lay, and what they thought of the answers. */
import { and, asc, between, type Column, desc, eq, notInArray, sql } from 'drizzle-orm';
import type { UsageGroup, UsageQuery, UsageRow } from '../../shared/admin/admin-wire.ts';
import { TRAFFIC_SAMPLES_MAX, type TrafficSample } from '../../shared/admin/stats-wire.ts';
import { type Database, isIfGiven, isoTime, orConflict } from './d1.ts';
import { feedback, trafficSamples, usage } from './schema.ts';

/** Without a tenant: all of them. */
type UsageQuestion = Omit<UsageQuery, 'tenant'> & { readonly tenant: string | undefined };

type UsagePage = {
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
        isIfGiven(usage.tenantId, tenant),
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

/* Samples of where requests lay, in D1: the newest of each tenant, and no more than those. */

export type NewTrafficSample = {
  readonly tenant: string;
  readonly version: string;
  readonly cluster: number;
  readonly distances: readonly number[];
  readonly createdAt_ms: number;
};

export async function insertTrafficSample(db: Database, sample: NewTrafficSample): Promise<void> {
  const ofTenant = eq(trafficSamples.tenant, sample.tenant);
  const newest = db
    .select({ id: trafficSamples.id })
    .from(trafficSamples)
    .where(ofTenant)
    .orderBy(desc(trafficSamples.id))
    .limit(TRAFFIC_SAMPLES_MAX);
  await db.batch([
    db.insert(trafficSamples).values({ ...sample, distances: JSON.stringify(sample.distances) }),
    db.delete(trafficSamples).where(and(ofTenant, notInArray(trafficSamples.id, newest))),
  ]);
}

/** Of one tenant when `tenant` is given, else of all. */
export async function listTrafficSamples(
  db: Database,
  version: string,
  tenant: string | undefined,
): Promise<TrafficSample[]> {
  const rows = await db
    .select()
    .from(trafficSamples)
    .where(and(eq(trafficSamples.version, version), isIfGiven(trafficSamples.tenant, tenant)))
    .orderBy(desc(trafficSamples.id))
    .limit(TRAFFIC_SAMPLES_MAX);
  return rows.map(({ cluster, distances, createdAt_ms }) => ({
    cluster,
    distances: JSON.parse(distances) as number[],
    created_at: isoTime(createdAt_ms),
  }));
}

/* Feedback in D1: the primary key holds each caller to one opinion a completion. */

type Feedback = typeof feedback.$inferInsert;

/** @throws MaskrouteError `conflict` when this caller has rated this completion before. */
export async function insertFeedback(db: Database, row: Feedback): Promise<void> {
  await orConflict(db.insert(feedback).values(row), 'You have rated this completion already.');
}
