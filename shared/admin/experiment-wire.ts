/**
 * The wire format of experiments in the admin API.
 *
 * Ids are unique only within a tenant, so every path with an `{id}` takes `?tenant=`. Without it, an administrator of
 * all tenants gets the experiment with an empty `tenant`, or else the only one with that id (409 if there are several).
 * A tenant's own admin key sees and creates only its tenant's experiments. Experiments with an empty `tenant` may span
 * several tenants.
 */
import { z } from 'zod';
import { plainName } from '../mask/mask-set.ts';
import { STICKY_KINDS } from '../mask/sticky.ts';
import {
  DEFAULT_TENANT,
  ownerId,
  slug,
  tenantId,
  tenantQuerySchema,
  timestamp,
  version,
} from './admin-wire.ts';
import type { Histogram, Moments } from './statistics.ts';

/** The variant that runs every block. */
export const DENSE_VARIANT = 'dense';
const VARIANTS_MAX = 10;
const SCOPE_MAX = 50;

const experimentId = slug.refine((id) => id !== 'none', { message: '"none" stands for no experiment' });

const variantSchema = z.strictObject({
  name: plainName,
  /** Relative to the other variants' weights. */
  weight: z.number().gt(0).max(1_000_000),
  /** The version of a stored mask set, or `dense`. */
  mask_set: z.union([z.literal(DENSE_VARIANT), version]),
});

/**
 * Codes as Cloudflare reports them for a request. `NA` is both a continent and a country, so a place names its kind.
 */
const placeSchema = z.union([
  z.strictObject({ continent: z.string().regex(/^[A-Z]{2}$/, 'expected a code such as EU') }),
  z.strictObject({ country: z.string().regex(/^[A-Z0-9]{2}$/, 'expected a code such as DE') }),
  z.strictObject({ colo: z.string().regex(/^[A-Z]{3,4}$/, 'expected a code such as FRA') }),
]);
export type PlaceScope = z.infer<typeof placeSchema>;

const definitionFields = {
  description: z.string().max(2000).default(''),
  /** Which tenants take part; empty: all. An experiment of one tenant is on that tenant. */
  tenants: z.array(tenantId).max(SCOPE_MAX).default([]),
  /** Names of models; empty: all. */
  models: z.array(z.string().min(1).max(300)).max(SCOPE_MAX).default([]),
  /** Where requests come in; empty: everywhere. */
  regions: z.array(placeSchema).max(SCOPE_MAX).default([]),
  /** What is always assigned to the same variant. */
  sticky: z.enum(STICKY_KINDS).default('conversation'),
  /** The first variant is the control. A single one gets all requests, so that a set can be live in one region alone. */
  variants: z
    .array(variantSchema)
    .min(1)
    .max(VARIANTS_MAX)
    .refine((variants) => new Set(variants.map(({ name }) => name)).size === variants.length, {
      message: 'names must differ',
    }),
  /** Absent: from its start on. */
  starts_at: timestamp.optional(),
  /** Absent: until it is stopped. */
  ends_at: timestamp.optional(),
  /** Share of its requests that run again in the background, for comparison with the dense model. */
  shadow_share: z.number().min(0).max(0.2).default(0.01),
  /** Probability of reporting a difference where there is none, however often the results are looked at. */
  alpha: z.number().min(0.001).max(0.2).default(0.05),
};

type Window = { readonly starts_at?: string | undefined; readonly ends_at?: string | undefined };
const endsLater = ({ starts_at, ends_at }: Window) =>
  starts_at === undefined || ends_at === undefined || Date.parse(starts_at) < Date.parse(ends_at);
const ENDS_LATER = { message: 'must be later than starts_at', path: ['ends_at'] };

export const createExperimentSchema = z
  .strictObject({ id: experimentId, tenant: ownerId.default(DEFAULT_TENANT), ...definitionFields })
  .refine(endsLater, ENDS_LATER);

/** An experiment's definition without its id; fixed once it is started. */
export const experimentDefinitionSchema = z.strictObject(definitionFields).refine(endsLater, ENDS_LATER);
export type ExperimentDefinition = z.infer<typeof experimentDefinitionSchema>;

const readablePartSchema = z.object({
  description: definitionFields.description.catch(''),
  tenants: definitionFields.tenants.catch([]),
  models: definitionFields.models.catch([]),
  regions: definitionFields.regions.catch([]),
  sticky: definitionFields.sticky.catch('conversation'),
  variants: definitionFields.variants.catch([]),
  starts_at: definitionFields.starts_at.catch(undefined),
  ends_at: definitionFields.ends_at.catch(undefined),
  shadow_share: definitionFields.shadow_share.catch(0),
  alpha: definitionFields.alpha.catch(0.05),
});

/**
 * What can be read of a definition that another version of the edge wrote, for whatever is stored. An unreadable limit is
 * read as no limit: an experiment that may overlap with it is refused.
 */
export const readablePart = (stored: unknown): ExperimentDefinition =>
  readablePartSchema.safeParse(stored).data ?? readablePartSchema.parse({});

/** Changes to a draft: absent fields stay, null resets a field to its default. */
export const changeExperimentSchema = z.strictObject(
  Object.fromEntries(
    Object.entries(definitionFields).map(([name, field]) => {
      const given: z.ZodType = field instanceof z.ZodDefault ? field.unwrap() : field;
      const hasDefault = field.safeParse(undefined).success;
      return [name, hasDefault ? given.nullable().optional() : given.optional()];
    }),
  ),
);

const EXPERIMENT_STATES = ['draft', 'scheduled', 'running', 'ended', 'stopped'] as const;

export const experimentSchema = z.object({
  id: z.string(),
  tenant: z.string(),
  ...definitionFields,
  /** Empty if it is unreadable. */
  variants: z.array(variantSchema),
  state: z.enum(EXPERIMENT_STATES),
  created_at: timestamp,
  /** When its first request could take part; null for a draft. */
  started_at: timestamp.nullable(),
  /** When it was stopped, before its end or without one. */
  stopped_at: timestamp.nullable(),
  actor: z.string(),
  /**
   * Why this version of the edge cannot read it, if it cannot: another version wrote it. Then none of its requests take part,
   * and the fields of its definition have what could be read. It can be stopped or deleted.
   */
  unreadable: z.string().optional(),
});
export type Experiment = z.infer<typeof experimentSchema>;

/* Results of an experiment. */

export const resultsQuerySchema = tenantQuerySchema.extend({
  region: z.string().optional().meta({ description: 'A region, as requests name it; absent or empty: all' }),
});

/** Counts of a group of requests. `errors`: failed requests, without those that the client caused. */
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

/** Measures with quantiles: time to first token, and time per output token. */
export const LATENCY_MEASURES = ['ttft', 'tpot'] as const;
export type LatencyMeasure = (typeof LATENCY_MEASURES)[number];
export type Latencies = Readonly<Record<LatencyMeasure, Histogram>>;

const mean = z.number().nullable();
/** Quantiles in ms, each at most 9 % off; null without values, or from before quantiles were counted. */
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
  /** Requests that ran again in the background, dense. */
  compared: z.int(),
  /** Mean share of their tokens before the first token that differs from dense. */
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

const comparisonSchema = z.object({
  variant: z.string(),
  metric: z.enum(METRICS),
  control_mean: mean,
  mean,
  /** The variant's mean minus the control's. It and the fields below are null while there are too few values. */
  difference: z.number().nullable(),
  low: z.number().nullable(),
  high: z.number().nullable(),
  p_value: z.number().nullable(),
  /** `differs`: the measure has no better direction (such as the length of answers). */
  verdict: z.enum(['better', 'worse', 'differs', 'undecided', 'too_few']),
});
export type Comparison = z.infer<typeof comparisonSchema>;

export const experimentResultsSchema = z.object({
  experiment: z.string(),
  /** The name of the variant that the others are compared with. */
  control: z.string(),
  /** Empty: everywhere. */
  region: z.string(),
  /** Probability that any variant's interval for one metric ever misses the true difference. */
  alpha: z.number(),
  variants: z.array(
    z.object({ name: z.string(), mask_set: z.string(), weight: z.number(), figures: figuresSchema }),
  ),
  comparisons: z.array(comparisonSchema),
});
export type ExperimentResults = z.infer<typeof experimentResultsSchema>;
