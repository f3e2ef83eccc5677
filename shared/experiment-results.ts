/** What came of an experiment: `GET /admin/v1/experiments/{id}/results?region=`. */
import { z } from 'zod';
import type { Histogram } from './histogram.ts';
import type { Moments } from './sequential-test.ts';

/** What was counted of a group of requests. `errors` are those that are not the client's doing. */
export type Sums = {
  readonly requests: number;
  readonly errors: number;
  readonly ttft_ms: Moments;
  readonly tpot_ms: Moments;
  readonly prompt_tokens: number;
  readonly completion_tokens: Moments;
  readonly ratings: number;
  readonly ratings_up: number;
  readonly agreement: Moments;
};

/** What there are quantiles of: time to the first token, and time a token after it. */
export const LATENCY_MEASURES = ['ttft', 'tpot'] as const;
export type LatencyMeasure = (typeof LATENCY_MEASURES)[number];
export type Latencies = Readonly<Record<LatencyMeasure, Histogram>>;

const mean = z.number().nullable();
/** Milliseconds, each at most 9 % off; null without values. Counted since the release that began to. */
export const quantilesSchema = z.object({ p50: z.number(), p95: z.number(), p99: z.number() }).nullable();

export const figuresSchema = z.object({
  requests: z.int(),
  errors: z.int(),
  /** Share of the requests. */
  error_rate: mean,
  /** Mean milliseconds from the request's arrival to the first token. */
  ttft_ms: mean,
  /** Mean milliseconds a token after the first. */
  tpot_ms: mean,
  ttft_quantiles_ms: quantilesSchema,
  tpot_quantiles_ms: quantilesSchema,
  prompt_tokens: z.int(),
  completion_tokens: z.int(),
  /** Mean a request. */
  completion_tokens_mean: mean,
  ratings: z.int(),
  /** Share of the ratings that are good. */
  rating_up: mean,
  /** Requests that were run again, dense, in the background. */
  compared: z.int(),
  /** Mean share of their tokens before the first that differs from dense. */
  agreement: mean,
});
export type Figures = z.infer<typeof figuresSchema>;

export const METRICS = [
  'error_rate',
  'ttft_ms',
  'tpot_ms',
  'completion_tokens',
  'rating_up',
  'agreement',
] as const;
export type Metric = (typeof METRICS)[number];

export const comparisonSchema = z.object({
  variant: z.string(),
  metric: z.enum(METRICS),
  control_mean: mean,
  mean,
  /** The variant's mean minus the control's. Null with the rest while there are too few values. */
  difference: z.number().nullable(),
  low: z.number().nullable(),
  high: z.number().nullable(),
  p_value: z.number().nullable(),
  /** `differs`: neither is better as such (longer answers). */
  verdict: z.enum(['better', 'worse', 'differs', 'undecided', 'too_few']),
});
export type Comparison = z.infer<typeof comparisonSchema>;

export const experimentResultsSchema = z.object({
  experiment: z.string(),
  /** The name of the variant that the others are compared with. */
  control: z.string(),
  /** Empty: everywhere. */
  region: z.string(),
  /** The chance that any interval of one metric misses, at any time of looking: variants share it. */
  alpha: z.number(),
  variants: z.array(
    z.object({ name: z.string(), mask_set: z.string(), weight: z.number(), figures: figuresSchema }),
  ),
  comparisons: z.array(comparisonSchema),
});
export type ExperimentResults = z.infer<typeof experimentResultsSchema>;
