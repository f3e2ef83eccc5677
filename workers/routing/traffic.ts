/**
 * Keeps where a few requests lay, for the dashboard's map. It costs a request nothing that it waits for: most are
 * passed over by the clock alone, and what goes wrong is told to the log.
 */
import { centroidDistances } from '../../shared/mask/centroids.ts';
import { log, reasonOf } from '../base/log.ts';
import { type Hold, withDeadline } from '../base/waiting.ts';
import type { NewTrafficSample } from '../db/usage-rows.ts';
import { TRAFFIC } from '../limits.ts';
import type { Routed } from './decision.ts';

export interface TrafficSampler {
  /** Does nothing for a request that fell into no cluster. */
  seen(tenant: string, routed: Routed, hold: Hold): void;
}

const DIGITS = 4;

export function createTrafficSampler(insert: (sample: NewTrafficSample) => Promise<void>): TrafficSampler {
  const sampledAt_ms = new Map<string, number>();
  return {
    seen(tenant, { decision, vector }, hold) {
      const { set, cluster } = decision;
      if (set === null || cluster === null || vector === null) return;
      const now_ms = Date.now();
      if (now_ms - (sampledAt_ms.get(tenant) ?? 0) < TRAFFIC.every_ms) return;
      if (sampledAt_ms.size >= TRAFFIC.tenantsMax) sampledAt_ms.clear();
      sampledAt_ms.set(tenant, now_ms);
      const distances = [...centroidDistances(vector, set.centroids)].map((distance) =>
        Number(distance.toFixed(DIGITS)),
      );
      const sample = { tenant, version: set.version, cluster, distances, createdAt_ms: now_ms };
      hold(
        withDeadline(insert(sample), TRAFFIC.write_ms, 'keeping a traffic sample').catch((error) =>
          log('warn', 'traffic_sample_lost', { reason: reasonOf(error) }),
        ),
      );
    },
  };
}
