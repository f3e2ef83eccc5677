/**
 * Figures of the admin API: what is going on, where recent requests lay, and how well a mask set did when it was
 * evaluated.
 */
import { z } from 'zod';
import { timestamp, version } from './admin-wire.ts';
import { figuresSchema, quantilesSchema } from './experiment-wire.ts';

/*
 * What is going on, by the minute, hour or day: `GET /admin/v1/stats?tenant=&from=&to=&step=`. It is counted behind the
 * requests, so it lags by some seconds; minutes are kept for 35 days.
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
 * Whether masks save time. A figure is only compared with what was measured at the same time: the speed of a machine
 * changes from one minute to the next more than a mask changes it.
 */

const savedSchema = z.object({
  /** How many answers were run again, masked and dense, one right after the other. */
  pairs: z.int(),
  /** So many are needed before there is an interval. */
  pairs_min: z.int(),
  /** The mean share of a token's time that the mask saved: 0.2 is a fifth less. Null: not comparable yet. */
  mean: z.number().nullable(),
  /** At 95 %, whenever and however often one looks. */
  low: z.number().nullable(),
  high: z.number().nullable(),
});
export type Saved = z.infer<typeof savedSchema>;

/**
 * The newest publication beside what it replaces: `GET /admin/v1/publications/comparison?tenant=`. Counted are answers
 * under their masks in minutes in which both had some, since the newest activation or in the last day.
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

/** How evenly a version's requests fall on its clusters, over the whole time asked for. */
const balanceSchema = z.object({
  version: z.string(),
  /** Requests that fell into a cluster. */
  requests: z.int(),
  clusters: z.int(),
  largest_share: z.number(),
  /** Bits; log2 of the number of clusters when all are equally common. */
  entropy_bits: z.number(),
  /** Nearly everything goes to one cluster: see {@link COLLAPSE}. */
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
   * By backend, over all tenants; empty in a question about one tenant. Times are from the request's arrival at
   * the edge, what it lost at other backends included, and by whole ten minutes.
   */
  backends: z.array(
    z.object({
      backend: z.string(),
      /** Those whose time to the first token is known. */
      answers: z.int(),
      ttft_quantiles_ms: quantilesSchema,
      tpot_quantiles_ms: quantilesSchema,
    }),
  ),
  fallbacks: z.array(z.object({ reason: z.string(), requests: z.int() })),
  /** All of it together; an edge of the release before does not say. */
  total: figuresSchema.optional(),
  masks: z
    .array(z.object({ mask: z.string(), sparsity: z.number().nullable(), requests: z.int() }))
    .default([]),
  saved: savedSchema.optional(),
});
export type Stats = z.infer<typeof statsSchema>;

/** Routing has collapsed when a single one of several clusters gets this share of at least so many requests. */
export const COLLAPSE = { share: 0.9, requests_min: 100 } as const;

/*
 * Where recent requests lay: `GET /admin/v1/traffic?tenant=&version=`, the newest first. It is a sample, with the distances
 * to the version's centroids only: enough to place a request among them, too little to tell what was asked.
 */

/** As many are kept of a tenant, and as many are shown at once. */
export const TRAFFIC_SAMPLES_MAX = 300;

export const trafficQuerySchema = z.strictObject({
  tenant: z.string().default(''),
  version,
});

export const trafficSampleSchema = z.object({
  cluster: z.int(),
  /** Euclidean, by cluster. */
  distances: z.array(z.number()),
  created_at: timestamp,
});
export type TrafficSample = z.infer<typeof trafficSampleSchema>;

/*
 * Whether a version's prompts and answers are still as they were: `GET /admin/v1/drift?tenant=&version=&since=`. How far
 * recent requests lay from their centroids, against the prompts that the set holds out; and by cluster how far masked
 * answers go with dense ones since `since`, against the time before. All at 95 %, however often one looks and whatever the
 * number of clusters.
 */

export const driftQuerySchema = z.strictObject({
  tenant: z.string().default(''),
  version,
  since: timestamp.default(() => new Date(Date.now() - STEP_ms.day).toISOString()),
});

/** More than so many requests far off, of at least so many, are drift: the set's own prompts have half of it. */
export const DRIFT = { farShare: 0.1, samples_min: 50 } as const;

const meanSchema = z.object({
  pairs: z.int(),
  /** Share of an answer's tokens before the first that differs from the dense one; null for too few pairs. */
  mean: z.number().nullable(),
  low: z.number().nullable(),
  high: z.number().nullable(),
});

export const driftSchema = z.object({
  version: z.string(),
  since: timestamp,
  /** Null: the set does not say how far its own prompts lay. */
  distance: z
    .object({
      samples: z.int(),
      samples_min: z.int(),
      /** Euclidean: what one of twenty of the set's own prompts exceeds. */
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
  /** What is to be done about it; null where nothing shows. */
  proposal: z.string().nullable(),
});
export type Drift = z.infer<typeof driftSchema>;

/*
 * What an edge keeps of an evaluation: of the `evaluation.json` that `maskroute evaluate` writes, the figures that the
 * dashboard draws. The whole file may be sent; what is not named here is dropped.
 */

export const EVALUATED_ROWS_MAX = 500;

const share = z.number().min(0).max(1);

/** One method at one sparsity, measured on text that it was not made on. */
export const evaluatedRowSchema = z.object({
  /** `dense`, `learned`, `one-mask`, or a static method. */
  method: z.string().min(1).max(64),
  /** Whether as many blocks are out as in the learned set, or so many that a token takes as long. */
  matched: z.enum(['count', 'time']),
  /** The set that the masks belong to, or whose time is matched; null where there is none. */
  maskSet: version.nullable(),
  /** Of blocks. */
  sparsity: share,
  surrogate: z.boolean(),
  /** To dense, nats. */
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
