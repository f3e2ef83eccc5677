/**
 * Where recent requests lay: `GET /admin/v1/traffic?tenant=&version=`, the newest first. A sample of them, and of each
 * only the distances to the version's centroids: enough to place it among them, too little to tell what was asked.
 */
import { z } from 'zod';
import { MASK_SET_VERSION_PATTERN, timestamp } from './admin.ts';

/** What is kept of a tenant, and what is shown at once. */
export const TRAFFIC_SAMPLES_MAX = 300;

export const trafficQuerySchema = z.strictObject({
  tenant: z.string().default(''),
  version: z.string().regex(MASK_SET_VERSION_PATTERN, 'expected v_ and 24 hexadecimal digits'),
});

export const trafficSampleSchema = z.object({
  cluster: z.int(),
  /** Euclidean, by cluster. */
  distances: z.array(z.number()),
  created_at: timestamp,
});
export type TrafficSample = z.infer<typeof trafficSampleSchema>;
