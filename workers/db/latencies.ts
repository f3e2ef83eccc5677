/** Latencies of requests, in buckets: counted with a delivery of events, read as histograms. */
import { and, getTableColumns, gte, lt, type SQL, sql } from 'drizzle-orm';
import type { SQLiteColumn } from 'drizzle-orm/sqlite-core';
import { LATENCY_MEASURES, type Latencies, type LatencyMeasure } from '../../shared/admin/experiment-wire.ts';
import type { Database } from './d1.ts';
import { type ExperimentKey, isOf, isWithin, type SeriesRequest, within } from './outcomes.ts';
import { backendLatencies, events, latencies, NO_EXPERIMENT, variantLatencies } from './schema.ts';

/** Backends' times are counted in slots of this many minutes, named by their first minute. */
const SLOT_minutes = 10;
const SLOT = `created_at_ms / ${60_000 * SLOT_minutes} * ${SLOT_minutes}`;

/**
 * The statements that count a batch of `events`, for the transaction that inserts it. They select rows by batch name,
 * so an event that is delivered again counts once, as in the other tables.
 */
export const countLatencies = (db: Database, batch: string) =>
  [
    add(db, latencies, timesOf(batch, 'created_at_ms / 60000, tenant, version, sparsity')),
    add(
      db,
      variantLatencies,
      timesOf(batch, 'experiment_owner, experiment, variant, region', `and experiment <> '${NO_EXPERIMENT}'`),
    ),
    add(db, backendLatencies, timesOf(batch, `${SLOT}, backend`, "and backend <> ''")),
  ] as const;

/** `times`: the columns of the table, in its order. */
function add<T extends typeof latencies | typeof variantLatencies | typeof backendLatencies>(
  db: Database,
  table: T,
  times: SQL,
) {
  const { count, ...keys } = getTableColumns(table);
  return db
    .insert(table)
    .select(times)
    .onConflictDoUpdate({
      target: Object.values(keys) as SQLiteColumn[],
      set: { count: sql`${count} + excluded.count` },
    });
}

/**
 * Counts of both measures of a batch, one row for each group and bucket. All expressions are constants of this file.
 */
function timesOf(batch: string, keys: string, condition = ''): SQL {
  const [ttft, tpot] = LATENCY_MEASURES.map(
    (
      measure,
    ) => sql`select ${sql.raw(keys)}, ${sql.raw(`'${measure}' as measure, ${measure}_bucket as bucket`)}, count(*)
    from ${events} where batch = ${batch} and ${sql.raw(`${measure}_bucket`)} is not null ${sql.raw(condition)}
    group by ${sql.raw(keys)}, bucket`,
  );
  return sql`${ttft} union all ${tpot}`;
}

/** By version and sparsity, under {@link versionKey}. */
export async function versionLatencies(
  db: Database,
  request: SeriesRequest,
): Promise<Map<string, Latencies>> {
  const { version, sparsity, measure, bucket } = latencies;
  const rows = await db
    .select({ version, sparsity, measure, bucket, count: sql<number>`total(${latencies.count})` })
    .from(latencies)
    .where(within(latencies, request))
    .groupBy(version, sparsity, measure, bucket);
  return histograms(rows.map((row) => ({ ...row, key: versionKey(row) })));
}

export const versionKey = ({ version, sparsity }: { version: string; sparsity: number }): string =>
  `${version} ${sparsity}`;

/** By variant, over all regions or in those whose name begins with `region`. */
export async function latenciesOfVariants(
  db: Database,
  experiment: ExperimentKey,
  region: string,
): Promise<Map<string, Latencies>> {
  const { variant, measure, bucket } = variantLatencies;
  const rows = await db
    .select({ key: variant, measure, bucket, count: sql<number>`total(${variantLatencies.count})` })
    .from(variantLatencies)
    .where(and(isOf(variantLatencies, experiment), isWithin(variantLatencies.region, region)))
    .groupBy(variant, measure, bucket);
  return histograms(rows);
}

/** By backend, over all tenants, in the slots that overlap the requested period. */
export async function latenciesOfBackends(
  db: Database,
  { from_ms, to_ms }: Pick<SeriesRequest, 'from_ms' | 'to_ms'>,
): Promise<Map<string, Latencies>> {
  const { minute, backend, measure, bucket } = backendLatencies;
  const first = Math.floor(from_ms / (60_000 * SLOT_minutes)) * SLOT_minutes;
  const rows = await db
    .select({ key: backend, measure, bucket, count: sql<number>`total(${backendLatencies.count})` })
    .from(backendLatencies)
    .where(and(gte(minute, first), lt(minute, Math.ceil(to_ms / 60_000))))
    .groupBy(backend, measure, bucket)
    .orderBy(backend);
  return histograms(rows);
}

type BucketRow = {
  readonly key: string;
  readonly measure: LatencyMeasure;
  readonly bucket: number;
  readonly count: number;
};

function histograms(rows: readonly BucketRow[]): Map<string, Latencies> {
  const found = new Map<string, Record<LatencyMeasure, Map<number, number>>>();
  for (const { key, measure, bucket, count } of rows) {
    const of = found.get(key) ?? { ttft: new Map(), tpot: new Map() };
    of[measure].set(bucket, count);
    found.set(key, of);
  }
  return found;
}
