/**
 * Requests one by one, for as long as their events are kept: the latest, those that took longest, those that failed; each
 * with what was thought and kept of it.
 */
import { and, desc, eq, gt, gte, isNotNull, lt, or, type SQL, sql } from 'drizzle-orm';
import type { Rated, RequestDetail, RequestsQuery, SeenRequest } from '../../shared/admin/requests-wire.ts';
import { type Database, isoTime, type Page, toPage } from './d1.ts';
import { events, feedback, texts } from './schema.ts';

export async function insertTexts(db: Database, row: typeof texts.$inferInsert): Promise<void> {
  await db.insert(texts).values(row).onConflictDoNothing();
}

/** A note's id begins with its request's, and a colon. Columns are written out: of one table they would lose its name. */
const noteOf = (column: 'rating' | 'agreement'): SQL<number | null> =>
  sql<number | null>`(select ${sql.raw(column === 'rating' ? 'sum' : 'max')}(note.${sql.raw(column)})
    from events as note where note.id > events.id || ':' and note.id < events.id || ';')`;

const RATING = noteOf('rating');
const columns = { row: events, rating: RATING, agreement: noteOf('agreement') };

/** Whole numbers, since cursors hold nothing else. */
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

/** Falling by what they are sorted by. `tenant`: undefined for all. */
export async function listRequests(
  db: Database,
  tenant: string | undefined,
  { limit, before, q, sort, outcome, from_ms }: RequestsQuery,
): Promise<Page<SeenRequest>> {
  const by = SORTED_BY[sort];
  const past =
    before === undefined
      ? undefined
      : or(lt(by, before.at), and(eq(by, before.at), gt(events.id, before.id)));
  const rows = await db
    .select({ ...columns, at: by })
    .from(events)
    .where(
      and(
        eq(events.requests, 1),
        tenant === undefined ? undefined : eq(events.tenant, tenant),
        from_ms === undefined ? undefined : gte(events.createdAt_ms, from_ms),
        q === undefined ? undefined : or(eq(events.requestId, q), eq(events.id, eventIn(q))),
        OUTCOMES[outcome],
        past,
      ),
    )
    .orderBy(desc(by), events.id)
    .limit(limit + 1);
  return toPage(rows, limit, ({ at, row }) => ({ at, id: row.id }), toRequest);
}

/** A completion's id holds its event's. */
const eventIn = (text: string): string => /^(?:chatcmpl-|cmpl-)?([0-9a-f]{20})/.exec(text)?.[1] ?? text;

export async function findRequest(
  db: Database,
  tenant: string | undefined,
  id: string,
  now_ms: number,
): Promise<RequestDetail | null> {
  const owned = and(
    eq(events.id, id),
    eq(events.requests, 1),
    tenant === undefined ? undefined : eq(events.tenant, tenant),
  );
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
  {
    limit,
    before,
    commented,
  }: { limit: number; before?: { at: number; id: string } | undefined; commented: boolean },
): Promise<Page<Rated>> {
  const name = sql<string>`${feedback.completionId} || '.' || ${feedback.apiKeyId}`;
  const { createdAt_ms } = feedback;
  const rows = await db
    .select({ rated: feedback, name })
    .from(feedback)
    .where(
      and(
        tenant === undefined ? undefined : eq(feedback.tenantId, tenant),
        commented ? isNotNull(feedback.comment) : undefined,
        before === undefined
          ? undefined
          : or(lt(createdAt_ms, before.at), and(eq(createdAt_ms, before.at), gt(name, before.id))),
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
