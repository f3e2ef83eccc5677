/**
 * Single requests, for as long as their events are kept: the newest, slowest or failed ones, with their ratings and
 * texts. Also usage, samples of positions, and feedback.
 */
import {
  and,
  asc,
  between,
  type Column,
  desc,
  eq,
  gt,
  gte,
  isNotNull,
  notInArray,
  or,
  type SQL,
  sql,
} from 'drizzle-orm';
import type { PageQuery, UsageGroup, UsageQuery, UsageRow } from '../../shared/admin/admin-wire.ts';
import type {
  Rated,
  RatingEvent,
  RequestDetail,
  RequestsQuery,
  SeenRequest,
} from '../../shared/admin/requests-wire.ts';
import {
  TRAFFIC_SAMPLES_MAX,
  type TrafficSample,
  trafficSampleSchema,
} from '../../shared/admin/stats-wire.ts';
import {
  type Database,
  isIfGiven,
  isoTime,
  orConflict,
  type Page,
  pastCursor,
  storedJson,
  toPage,
} from './d1.ts';
import { events, feedback, texts, trafficSamples, usage } from './schema.ts';

export async function insertTexts(db: Database, row: typeof texts.$inferInsert): Promise<void> {
  await db.insert(texts).values(row).onConflictDoNothing();
}

/**
 * A note's id begins with its request's id and a colon. Column names are written out, since drizzle would omit the
 * table's name in a query of one table.
 */
const noteOf = (column: 'rating' | 'agreement'): SQL<number | null> =>
  sql<number | null>`(select ${sql.raw(column === 'rating' ? 'sum' : 'max')}(note.${sql.raw(column)})
    from events as note where note.id > events.id || ':' and note.id < events.id || ';')`;

const RATING = noteOf('rating');
const columns = { row: events, rating: RATING, agreement: noteOf('agreement') };

/** Sort keys are integers, since cursors hold nothing else. */
const SORTED_BY = {
  created_at: sql<number>`${events.createdAt_ms}`,
  total_ms: sql<number>`cast(round(coalesce(${events.total_ms}, 0)) as integer)`,
  ttft_ms: sql<number>`cast(round(coalesce(${events.ttft_ms}, 0)) as integer)`,
  tokens: sql<number>`${events.prompt_tokens} + ${events.completion_tokens}`,
} as const;

const OUTCOMES = {
  all: undefined,
  failed: eq(events.failures, 1),
  dense: sql`${events.fallback} <> ''`,
  rated: isNotNull(RATING),
} as const;

/** In descending order of the sort key. `tenant` undefined: all tenants. */
export async function listRequests(
  db: Database,
  tenant: string | undefined,
  { limit, before, q, sort, outcome, from_ms }: RequestsQuery,
): Promise<Page<SeenRequest>> {
  const by = SORTED_BY[sort];
  const rows = await db
    .select({ ...columns, at: by })
    .from(events)
    .where(
      and(
        eq(events.requests, 1),
        isIfGiven(events.tenant, tenant),
        from_ms === undefined ? undefined : gte(events.createdAt_ms, from_ms),
        q === undefined ? undefined : or(eq(events.requestId, q), eq(events.id, eventIn(q))),
        OUTCOMES[outcome],
        pastCursor(by, events.id, before),
      ),
    )
    .orderBy(desc(by), events.id)
    .limit(limit + 1);
  return toPage(rows, limit, ({ at, row }) => ({ at, id: row.id }), toRequest);
}

/** The event's id in a completion's id. */
const eventIn = (text: string): string => /^(?:chatcmpl-|cmpl-|resp_)?([0-9a-f]{20})/.exec(text)?.[1] ?? text;

export async function findRequest(
  db: Database,
  tenant: string | undefined,
  id: string,
  now_ms: number,
): Promise<RequestDetail | null> {
  const owned = and(eq(events.id, id), eq(events.requests, 1), isIfGiven(events.tenant, tenant));
  const [found, ratings, kept] = await db.batch([
    db.select(columns).from(events).where(owned).limit(1),
    db
      .select({ rating: feedback.rating, comment: feedback.comment, created: feedback.createdAt_ms })
      .from(feedback)
      .innerJoin(
        events,
        and(owned, eq(feedback.tenantId, events.tenant), eq(feedback.completionId, events.id)),
      )
      .limit(RATINGS_MAX),
    db
      .select({ prompt: texts.prompt, answer: texts.answer, expires: texts.expiresAt_ms })
      .from(texts)
      .innerJoin(events, and(owned, eq(texts.event, events.id), eq(texts.tenant, events.tenant)))
      .where(gt(texts.expiresAt_ms, now_ms))
      .limit(1),
  ]);
  const [row] = found;
  if (row === undefined) return null;
  const [text] = kept;
  return {
    ...toRequest(row),
    ratings: ratings.map(({ rating, comment, created }) => ({
      rating,
      comment,
      created_at: isoTime(created),
    })),
    texts:
      text === undefined
        ? null
        : { prompt: text.prompt, answer: text.answer, expires_at: isoTime(text.expires) },
  };
}

const RATINGS_MAX = 100;

/** Ratings with their comments, the newest first. */
export async function listRatings(
  db: Database,
  tenant: string | undefined,
  { limit, before, commented }: Pick<PageQuery, 'limit' | 'before'> & { readonly commented: boolean },
): Promise<Page<Rated>> {
  const name = sql<string>`${feedback.completionId} || '.' || ${feedback.apiKeyId}`;
  const { createdAt_ms } = feedback;
  const rows = await db
    .select({ rated: feedback, name })
    .from(feedback)
    .where(
      and(
        isIfGiven(feedback.tenantId, tenant),
        commented ? isNotNull(feedback.comment) : undefined,
        pastCursor(createdAt_ms, name, before),
      ),
    )
    .orderBy(desc(createdAt_ms), name)
    .limit(limit + 1);
  return toPage(
    rows,
    limit,
    (row) => ({ at: row.rated.createdAt_ms, id: row.name }),
    ({ rated }) => ({
      request: rated.completionId,
      tenant: rated.tenantId,
      rating: rated.rating,
      comment: rated.comment,
      created_at: isoTime(rated.createdAt_ms),
    }),
  );
}

type Row = { row: typeof events.$inferSelect; rating: number | null; agreement: number | null };

const orNull = (text: string): string | null => (text === '' ? null : text);

const toRequest = ({ row, rating, agreement }: Row): SeenRequest => ({
  id: row.id,
  request_id: orNull(row.requestId),
  created_at: isoTime(row.createdAt_ms),
  tenant: row.tenant,
  key_id: row.keyId,
  source: row.source === 'playground' ? 'playground' : 'client',
  endpoint: row.endpoint,
  model: row.model,
  version: orNull(row.version),
  cluster: row.cluster < 0 ? null : row.cluster,
  mask: row.mask,
  sparsity: row.sparsity < 0 ? null : row.sparsity,
  similarity: row.similarity,
  fallback: orNull(row.fallback),
  experiment: row.experiment,
  variant: row.variant,
  region: row.region,
  backend: orNull(row.backend),
  status: row.status,
  error_code: orNull(row.errorCode),
  prompt_tokens: row.prompt_tokens,
  completion_tokens: row.completion_tokens,
  ttft_ms: row.ttft_ms,
  tpot_ms: row.tpot_ms,
  total_ms: row.total_ms,
  rating,
  agreement,
});

/* What tenants used; count-events.ts counts it. */

/** Without a tenant: all of them. */
type UsageQuestion = Omit<UsageQuery, 'tenant'> & { readonly tenant: string | undefined };

type UsagePage = {
  readonly data: UsageRow[];
  /** The group of the last row if there are more; else null. */
  readonly next: readonly string[] | null;
};

const COLUMNS = { tenant: usage.tenantId, day: usage.day, model: usage.model, mask: usage.mask };

/** Ordered by group; starts after the group `after`. */
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

/* Samples of requests' positions in D1: only the newest of each tenant are kept. */

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

/** Of one tenant when `tenant` is given, else of all. A sample that cannot be read is left out: it is one of many. */
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
  return rows.flatMap(({ cluster, distances, createdAt_ms }) => {
    const stored = { cluster, distances: storedJson(distances), created_at: isoTime(createdAt_ms) };
    return trafficSampleSchema.safeParse(stored).data ?? [];
  });
}

/* Feedback in D1: the primary key allows each caller one rating of a completion. */

/**
 * The completion has its request's id, whatever prefix its endpoint adds to that.
 * @throws MaskrouteError `conflict` when this caller has rated this completion before.
 */
export async function insertFeedback(
  db: Database,
  { tenant, key_id, request, rating, created_at_ms }: RatingEvent,
  comment: string | null,
): Promise<void> {
  const row = { tenantId: tenant, apiKeyId: key_id, completionId: request, rating, comment };
  const inserting = db.insert(feedback).values({ ...row, createdAt_ms: created_at_ms });
  await orConflict(inserting, 'You have rated this completion already.');
}
