/**
 * What is going on, by the minute or hour: `GET /admin/v1/stats?tenant=&from=&to=&step=`. It is counted behind
 * the requests, so it lags by some seconds; minutes are kept for 35 days.
 */
import { z } from 'zod';
import { timestamp } from './admin.ts';
import { figuresSchema, quantilesSchema } from './experiment-results.ts';

export const STEPS_MAX = 1_500;
const STEP_ms = { minute: 60_000, hour: 3_600_000, day: 86_400_000 } as const;

export const statsQuerySchema = z
  .strictObject({
    tenant: z.string().default(''),
    from: timestamp.default(() => new Date(Date.now() - STEP_ms.day).toISOString()),
    to: timestamp.default(() => new Date(Date.now() + STEP_ms.minute).toISOString()),
    step: z.enum(['minute', 'hour', 'day']).default('hour'),
  })
  .transform(({ tenant, from, to, step }) => ({
    tenant,
    from_ms: Date.parse(from),
    to_ms: Date.parse(to),
    step_ms: STEP_ms[step],
  }))
  .refine(({ from_ms, to_ms }) => from_ms < to_ms, { message: 'must be earlier than to', path: ['from'] })
  .refine(({ from_ms, to_ms, step_ms }) => (to_ms - from_ms) / step_ms <= STEPS_MAX, {
    message: `asks for more than ${STEPS_MAX} steps`,
    path: ['step'],
  });

const routingShareSchema = z.object({
  start: timestamp,
  /** Null: no mask set. */
  version: z.string().nullable(),
  /** Null: not routed. */
  cluster: z.int().nullable(),
  requests: z.int(),
  errors: z.int(),
});

/** How evenly a version's requests fall on its clusters, over the whole time asked for. */
const balanceSchema = z.object({
  version: z.string(),
  /** Requests that fell into a cluster. */
  requests: z.int(),
  clusters: z.int(),
  largest_share: z.number(),
  /** Bits; log2 of the number of clusters when all are equally common. */
  entropy_bits: z.number(),
  /** Routing has collapsed: nearly everything goes to one cluster. */
  collapsed: z.boolean(),
});

export const statsSchema = z.object({
  from: timestamp,
  to: timestamp,
  routing: z.array(routingShareSchema),
  balance: z.array(balanceSchema),
  versions: z.array(
    z.object({
      version: z.string().nullable(),
      /** Of blocks; null where only the backend knew it. */
      sparsity: z.number().nullable(),
      figures: figuresSchema,
    }),
  ),
  /**
   * By who answered, over all tenants, and so empty where one is asked about. Times are from the request's arrival at
   * the edge, what it lost at other backends included, and by whole ten minutes.
   */
  backends: z
    .array(
      z.object({
        backend: z.string(),
        /** Of which the time to the first token is known. */
        answers: z.int(),
        ttft_quantiles_ms: quantilesSchema,
        tpot_quantiles_ms: quantilesSchema,
      }),
    )
    // An edge of the release before has none; a page may ask one while a deployment is gradual.
    .default([]),
  fallbacks: z.array(z.object({ reason: z.string(), requests: z.int() })),
});
export type Stats = z.infer<typeof statsSchema>;

/** With more clusters than one, this share of at least so many requests in a single one is a collapse. */
export const COLLAPSE = { share: 0.9, requests_min: 100 } as const;
