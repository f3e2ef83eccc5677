/**
 * Figures of the admin API: statistics over time, the positions of recent requests among clusters, drift, and a mask
 * set's evaluation.
 */
import { z } from 'zod';
import { timestamp, version } from './admin-wire.ts';
import { figuresSchema, quantilesSchema } from './experiment-wire.ts';

/*
 * Statistics by minute, hour or day: `GET /admin/v1/stats?tenant=&from=&to=&step=`. They are counted outside the
 * request's path, so they lag by some seconds; minutes are kept for 35 days.
 */

const STEPS_MAX = 1_500;
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

/*
 * Whether masks save time. Figures are compared only with figures of the same time: a machine's speed varies from
 * minute to minute more than masks change it.
 */

const savedSchema = z.object({
  /** Number of requests that ran again masked and dense, one right after the other. */
  pairs: z.int(),
  /** Number of pairs needed for an interval. */
  pairs_min: z.int(),
  /** Mean share of the time per token that the mask saved: 0.2 is a fifth less. Null: too few pairs. */
  mean: z.number().nullable(),
  /** Bounds of the 95 % interval, valid however often they are looked at. */
  low: z.number().nullable(),
  high: z.number().nullable(),
});
export type Saved = z.infer<typeof savedSchema>;

/**
 * Compares the newest publication with the version that it replaces: `GET /admin/v1/publications/comparison?tenant=`.
 * It counts answers under their masks, in minutes in which both versions had answers, since the newest activation or in
 * the last day.
 */
export const releaseComparisonSchema = z.object({
  from: timestamp,
  /** Minutes in which both had answers. */
  minutes: z.int(),
  sides: z.array(
    z.object({
      version: z.string(),
      requests: z.int(),
      errors: z.int(),
      error_rate: z.number().nullable(),
      ttft_ms: z.number().nullable(),
      tpot_ms: z.number().nullable(),
    }),
  ),
});
export type ReleaseComparison = z.infer<typeof releaseComparisonSchema>;

const routingShareSchema = z.object({
  start: timestamp,
  /** Null: no mask set. */
  version: z.string().nullable(),
  /** Null: not routed. */
  cluster: z.int().nullable(),
  requests: z.int(),
  errors: z.int(),
});

/** How evenly a version's requests are distributed over its clusters, over the whole requested period. */
const balanceSchema = z.object({
  version: z.string(),
  /** Requests that fell into a cluster, without the playground's. */
  requests: z.int(),
  clusters: z.int(),
  largest_share: z.number(),
  /** Entropy in bits; log2 of the number of clusters when all are equally common. */
  entropy_bits: z.number(),
  /** Whether nearly all requests go to one cluster: see {@link COLLAPSE}. */
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
      /** Share of skipped blocks; null where only the backend knew it. */
      sparsity: z.number().nullable(),
      figures: figuresSchema,
    }),
  ),
  /**
   * Figures by backend, over all tenants; empty in a query for one tenant. Times count from the request's arrival at
   * the edge, including time lost at other backends; counted by ten minutes.
   */
  backends: z.array(
    z.object({
      backend: z.string(),
      /** Answers whose time to first token is known. */
      answers: z.int(),
      ttft_quantiles_ms: quantilesSchema,
      tpot_quantiles_ms: quantilesSchema,
    }),
  ),
  fallbacks: z.array(z.object({ reason: z.string(), requests: z.int() })),
  /** All entries together. */
  total: figuresSchema,
  masks: z.array(z.object({ mask: z.string(), sparsity: z.number().nullable(), requests: z.int() })),
  saved: savedSchema,
});
export type Stats = z.infer<typeof statsSchema>;

/** Routing has collapsed when one of several clusters gets this share of the requests, of at least `requests_min`. */
export const COLLAPSE = { share: 0.9, requests_min: 100 } as const;

/*
 * Positions of recent requests: `GET /admin/v1/traffic?tenant=&version=`, newest first. It is a sample of requests with
 * their distances to the version's centroids: enough to place a request on a map, too little to reconstruct its text.
 */

/** Most samples that are kept for a tenant, and shown at once. */
export const TRAFFIC_SAMPLES_MAX = 300;

export const trafficQuerySchema = z.strictObject({
  tenant: z.string().default(''),
  version,
});

export const trafficSampleSchema = z.object({
  cluster: z.int(),
  /** Euclidean distance to each cluster's centroid. */
  distances: z.array(z.number()),
  created_at: timestamp,
});
export type TrafficSample = z.infer<typeof trafficSampleSchema>;

/*
 * Drift of a version's prompts and answers: `GET /admin/v1/drift?tenant=&version=&since=`. Compares recent requests'
 * distances to their centroids with those of the set's held-out prompts and, by cluster, the agreement of masked with
 * dense answers since `since` with the time before. All intervals hold at 95 % together, for all clusters and however
 * often they are looked at.
 */

export const driftQuerySchema = z.strictObject({
  tenant: z.string().default(''),
  version,
  since: timestamp.default(() => new Date(Date.now() - STEP_ms.day).toISOString()),
});

/**
 * Drift: more than `farShare` of at least `samples_min` requests are far from their centroids. Of the set's own prompts
 * half that share is.
 */
export const DRIFT = { farShare: 0.1, samples_min: 50 } as const;

const meanSchema = z.object({
  pairs: z.int(),
  /** Mean share of an answer's tokens before the first that differs from dense; null with too few pairs. */
  mean: z.number().nullable(),
  low: z.number().nullable(),
  high: z.number().nullable(),
});

export const driftSchema = z.object({
  version: z.string(),
  since: timestamp,
  /** Null when the set has no distances of its own prompts. */
  distance: z
    .object({
      samples: z.int(),
      samples_min: z.int(),
      /** Euclidean distance that 5 % of the set's own prompts exceed. */
      limit: z.number(),
      far_share: z.number().nullable(),
      low: z.number().nullable(),
      high: z.number().nullable(),
      drifted: z.boolean(),
    })
    .nullable(),
  clusters: z.array(
    z.object({ cluster: z.int(), before: meanSchema, recent: meanSchema, drifted: z.boolean() }),
  ),
  pairs_min: z.int(),
  /** Advice; null when there is no drift. */
  proposal: z.string().nullable(),
});
export type Drift = z.infer<typeof driftSchema>;

/*
 * The part of `evaluation.json` (written by `maskroute evaluate`) that the edge stores: the figures that the dashboard
 * shows. The whole file may be sent; other fields are dropped.
 */

export const EVALUATED_ROWS_MAX = 500;

const share = z.number().min(0).max(1);

/** One method at one sparsity, measured on text that it was not made on. */
export const evaluatedRowSchema = z.object({
  /** `dense`, `learned`, `one-mask`, or a static method. */
  method: z.string().min(1).max(64),
  /** Whether a static method matches the learned set by its number of skipped blocks, or by its time per token. */
  matched: z.enum(['count', 'time']),
  /** The mask set of the row, or the set whose time is matched; null if there is none. */
  maskSet: version.nullable(),
  /** Share of skipped blocks. */
  sparsity: share,
  surrogate: z.boolean(),
  /** KL to dense, nats. */
  kl: z.number(),
  /** Share of positions with the dense model's top token. */
  agreement: share,
  perplexity: z.number().positive(),
  msPerToken: z.number().positive(),
});
export type EvaluatedRow = z.infer<typeof evaluatedRowSchema>;

export const evaluationFiguresSchema = z.object({
  rows: z.array(evaluatedRowSchema).min(1).max(EVALUATED_ROWS_MAX),
  /** Static methods at the learned sets' measured time. */
  equalTime: z.array(evaluatedRowSchema).max(EVALUATED_ROWS_MAX).default([]),
});
export type EvaluationFigures = z.infer<typeof evaluationFiguresSchema>;

/** Whether anything in them was measured of this version of a set. */
export const hasRowOf = ({ rows, equalTime }: EvaluationFigures, version: string): boolean =>
  [...rows, ...equalTime].some(({ maskSet }) => maskSet === version);
