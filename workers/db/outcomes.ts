/** Reads counted figures: sums of requests by version, by variant, and by minute. */
import { and, desc, eq, gte, lt, ne, or, type SQL, sql } from 'drizzle-orm';
import type { SQLiteColumn } from 'drizzle-orm/sqlite-core';
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import type { Sums } from '../../shared/admin/experiment-wire.ts';
import type { Moments } from '../../shared/admin/statistics.ts';
import { type Database, isIfGiven, minuteOf } from './d1.ts';
import {
  type latencies,
  NO_EXPERIMENT,
  outcomeSums,
  outcomes,
  PLAYGROUND,
  type variantLatencies,
  variantOutcomes,
} from './schema.ts';

type SumName = keyof typeof outcomeSums;

/** The sums of a group of rows, under the names of their columns. */
const sumsOf = (table: typeof outcomes | typeof variantOutcomes) =>
  Object.fromEntries(
    Object.keys(outcomeSums).map((name) => [name, sql`total(${table[name as SumName]})`]),
  ) as Record<SumName, SQL<number>>;

const toSums = (row: Record<SumName, number>): Sums => ({
  requests: row.requests,
  errors: row.errors,
  ttft_ms: { count: row.ttft_count, sum: row.ttft_sum, sq: row.ttft_sq },
  tpot_ms: { count: row.tpot_count, sum: row.tpot_sum, sq: row.tpot_sq },
  prompt_tokens: row.prompt_tokens,
  completion_tokens: {
    count: row.requests,
    sum: row.completion_tokens,
    sq: row.completion_tokens_sq,
  },
  ratings: row.ratings,
  ratings_up: row.ratings_up,
  agreement: { count: row.agreement_count, sum: row.agreement_sum, sq: row.agreement_sq },
});

/** A version's rows from the minute of `since_ms` on; of all tenants when `tenant` is the default. */
const ofVersion = (version: string, tenant: string, since_ms: number): SQL | undefined =>
  and(
    eq(outcomes.version, version),
    gte(outcomes.minute, minuteOf(since_ms)),
    isIfGiven(outcomes.tenant, tenant === DEFAULT_TENANT ? undefined : tenant),
  );

/**
 * Leaves out what does not judge a version: requests that have its name but none of its masks (dense ones, and those
 * with a client's own mask), and the playground's.
 */
const judging = (
  rows: Record<'cluster' | 'fallback' | 'experiment' | 'variant', SQLiteColumn>,
): SQL | undefined => and(gte(rows.cluster, 0), eq(rows.fallback, ''), isOfClients(rows));

/** An experiment's variant may be called `playground`, too. */
const isOfClients = (rows: Record<'experiment' | 'variant', SQLiteColumn>): SQL | undefined =>
  or(ne(rows.experiment, NO_EXPERIMENT), ne(rows.variant, PLAYGROUND));

/** The figures by which a version is judged: customers' requests that its masks answered or failed to answer. */
export type Judged = Pick<Sums, 'requests' | 'errors' | 'tpot_ms'>;

/** Sums of at most `rowsMax` of the newest rows, without outages. */
export async function judgedOfVersion(
  db: Database,
  version: string,
  tenant: string,
  since_ms: number,
  rowsMax: number,
): Promise<Judged> {
  const newest = db
    .select()
    .from(outcomes)
    .where(ofVersion(version, tenant, since_ms))
    .orderBy(desc(outcomes.minute))
    .limit(rowsMax)
    .as('newest');
  const rows = await db
    .select({
      requests: sql<number>`total(${newest.requests} - ${newest.outages})`,
      errors: sql<number>`total(${newest.errors} - ${newest.outages})`,
      tpot_count: sql<number>`total(${newest.tpot_count})`,
      tpot_sum: sql<number>`total(${newest.tpot_sum})`,
      tpot_sq: sql<number>`total(${newest.tpot_sq})`,
    })
    .from(newest)
    .where(judging(newest));
  const { requests, errors, tpot_count: count, tpot_sum, tpot_sq: sq } = rows[0]!;
  return { requests, errors, tpot_ms: { count, sum: tpot_sum, sq } };
}

export type MinuteSums = Record<
  'requests' | 'errors' | 'ttft_count' | 'ttft_sum' | 'tpot_count' | 'tpot_sum',
  number
>;

/** The same figures by minute, with the same exclusions. */
export async function minuteSumsOfVersion(
  db: Database,
  version: string,
  tenant: string,
  since_ms: number,
): Promise<Map<number, MinuteSums>> {
  const sum = (column: SQLiteColumn) => sql<number>`total(${column})`;
  const rows = await db
    .select({
      minute: outcomes.minute,
      requests: sql<number>`total(${outcomes.requests} - ${outcomes.outages})`,
      errors: sql<number>`total(${outcomes.errors} - ${outcomes.outages})`,
      ttft_count: sum(outcomes.ttft_count),
      ttft_sum: sum(outcomes.ttft_sum),
      tpot_count: sum(outcomes.tpot_count),
      tpot_sum: sum(outcomes.tpot_sum),
    })
    .from(outcomes)
    .where(and(ofVersion(version, tenant, since_ms), judging(outcomes)))
    .groupBy(outcomes.minute);
  return new Map(rows.map(({ minute, ...sums }) => [minute, sums]));
}

/** Whether a column's region is `region` or within it, ignoring case; an empty `region` contains all. */
export const isWithin = (column: SQLiteColumn, region: string): SQL | undefined =>
  region === ''
    ? undefined
    : sql`substr(lower(${column}) || '/', 1, ${region.length + 1}) = ${`${region.toLowerCase()}/`}`;

/** The key of an experiment: ids are unique only within an owner. */
export type ExperimentKey = { readonly owner: string; readonly id: string };

export const isOf = (
  table: typeof variantOutcomes | typeof variantLatencies,
  { owner, id }: ExperimentKey,
): SQL | undefined => and(eq(table.experimentOwner, owner), eq(table.experiment, id));

/** By variant, over all regions or in those whose name begins with `region`. */
export async function sumsOfVariants(
  db: Database,
  experiment: ExperimentKey,
  region: string,
): Promise<Map<string, Sums>> {
  const rows = await db
    .select({ variant: variantOutcomes.variant, ...sumsOf(variantOutcomes) })
    .from(variantOutcomes)
    .where(and(isOf(variantOutcomes, experiment), isWithin(variantOutcomes.region, region)))
    .groupBy(variantOutcomes.variant);
  return new Map(rows.map((row) => [row.variant, toSums(row)]));
}

export type SeriesRequest = {
  /** Undefined: all tenants. */
  readonly tenant: string | undefined;
  readonly from_ms: number;
  readonly to_ms: number;
  /** Whole minutes. */
  readonly step_ms: number;
};

export const within = (
  table: typeof outcomes | typeof latencies,
  { tenant, from_ms, to_ms }: SeriesRequest,
): SQL | undefined =>
  and(
    gte(table.minute, minuteOf(from_ms)),
    lt(table.minute, Math.ceil(to_ms / 60_000)),
    isIfGiven(table.tenant, tenant),
  );

/**
 * Requests by step, version and cluster; a version is '' and a cluster -1 where there was none. `client_requests`: those
 * that are not the playground's.
 */
export async function clusterSeries(db: Database, request: SeriesRequest) {
  const start = sql<number>`${outcomes.minute} - ${outcomes.minute} % ${minuteOf(request.step_ms)}`;
  const rows = await db
    .select({
      start_minute: start.as('start_minute'),
      version: outcomes.version,
      cluster: outcomes.cluster,
      requests: sql<number>`total(${outcomes.requests})`,
      client_requests: sql<number>`total(case when ${isOfClients(outcomes)} then ${outcomes.requests} end)`,
      errors: sql<number>`total(${outcomes.errors})`,
    })
    .from(outcomes)
    .where(within(outcomes, request))
    .groupBy(sql`start_minute`, outcomes.version, outcomes.cluster)
    .orderBy(sql`start_minute`, outcomes.version, outcomes.cluster);
  return rows.map(({ start_minute, ...row }) => ({ start_ms: start_minute * 60_000, ...row }));
}

/** Agreement of a version's masked answers with dense ones, by cluster: before `since_ms`, and from then on. */
export async function agreementByCluster(
  db: Database,
  version: string,
  tenant: string | undefined,
  since_ms: number,
): Promise<Map<number, { before: Moments; recent: Moments }>> {
  const isRecent = sql`${outcomes.minute} >= ${minuteOf(since_ms)}`;
  const total = (column: SQLiteColumn, when: SQL) =>
    sql<number>`total(case when ${when} then ${column} else 0 end)`;
  const sums = (when: SQL) => ({
    count: total(outcomes.agreement_count, when),
    sum: total(outcomes.agreement_sum, when),
    sq: total(outcomes.agreement_sq, when),
  });
  const rows = await db
    .select({ cluster: outcomes.cluster, before: sums(sql`not ${isRecent}`), recent: sums(isRecent) })
    .from(outcomes)
    .where(and(eq(outcomes.version, version), isIfGiven(outcomes.tenant, tenant), gte(outcomes.cluster, 0)))
    .groupBy(outcomes.cluster)
    .orderBy(outcomes.cluster);
  return new Map(rows.map(({ cluster, before, recent }) => [cluster, { before, recent }]));
}

/** Sums by version and sparsity. */
export async function versionSums(db: Database, request: SeriesRequest) {
  const rows = await db
    .select({ version: outcomes.version, sparsity: outcomes.sparsity, ...sumsOf(outcomes) })
    .from(outcomes)
    .where(within(outcomes, request))
    .groupBy(outcomes.version, outcomes.sparsity)
    .orderBy(outcomes.version, outcomes.sparsity);
  return rows.map(({ version, sparsity, ...sums }) => ({ version, sparsity, sums: toSums(sums) }));
}

/** Totals, and the time that masks save by the comparisons with the dense model. */
export async function totalSums(
  db: Database,
  request: SeriesRequest,
): Promise<{ sums: Sums; saved: Moments }> {
  const [row] = await db
    .select({
      ...sumsOf(outcomes),
      saved_count: sql<number>`total(${outcomes.saved_count})`,
      saved_sum: sql<number>`total(${outcomes.saved_sum})`,
      saved_sq: sql<number>`total(${outcomes.saved_sq})`,
    })
    .from(outcomes)
    .where(within(outcomes, request));
  const { saved_count: count, saved_sum: sum, saved_sq: sq, ...sums } = row!;
  return { sums: toSums(sums), saved: { count, sum, sq } };
}

/** The most common first. */
export async function maskCounts(db: Database, request: SeriesRequest) {
  const requests = sql<number>`total(${outcomes.requests})`;
  return await db
    .select({ mask: outcomes.mask, sparsity: sql<number>`max(${outcomes.sparsity})`, requests })
    .from(outcomes)
    .where(within(outcomes, request))
    .groupBy(outcomes.mask)
    .orderBy(desc(requests), outcomes.mask)
    .limit(MASKS_SHOWN_MAX);
}

/** Most masks that are listed: a client can make up a mask for every request. */
const MASKS_SHOWN_MAX = 50;

/** Requests that went dense, by reason. */
export async function fallbackCounts(db: Database, request: SeriesRequest) {
  return await db
    .select({ fallback: outcomes.fallback, requests: sql<number>`total(${outcomes.requests})` })
    .from(outcomes)
    .where(and(within(outcomes, request), sql`${outcomes.fallback} <> ''`))
    .groupBy(outcomes.fallback)
    .orderBy(outcomes.fallback);
}
