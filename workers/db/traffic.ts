/** Samples of where requests lay, in D1: the newest of each tenant, and no more than those. */
import { and, desc, eq, notInArray } from 'drizzle-orm';
import { TRAFFIC_SAMPLES_MAX, type TrafficSample } from '../../shared/admin-traffic.ts';
import { type Database, isoTime } from './client.ts';
import { trafficSamples } from './schema.ts';

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
    .where(
      and(
        eq(trafficSamples.version, version),
        tenant === undefined ? undefined : eq(trafficSamples.tenant, tenant),
      ),
    )
    .orderBy(desc(trafficSamples.id))
    .limit(TRAFFIC_SAMPLES_MAX);
  return rows.map(({ cluster, distances, createdAt_ms }) => ({
    cluster,
    distances: JSON.parse(distances) as number[],
    created_at: isoTime(createdAt_ms),
  }));
}
