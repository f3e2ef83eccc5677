/**
 * Single requests: the events that the edge emits for each, and how the admin API shows them.
 *
 * The edge emits an event for every finished request, and later for its rating and its comparison. Events go to a queue
 * outside the request's path, and from there into usage and outcomes. A message may be delivered twice, so each `id`
 * counts once.
 */
import { z } from 'zod';
import { querySwitch, tenantPageQuerySchema, timestamp } from './admin-wire.ts';

/** Unique for each request and made by the edge; never the client's request id, which it may send twice. */
export const EVENT_ID_PATTERN = /^[0-9a-f]{20}$/;

const REQUEST_SOURCES = ['client', 'playground'] as const;
export type RequestSource = (typeof REQUEST_SOURCES)[number];

const duration_ms = z.number().min(0).nullable();
/** A name to which a newer edge may add others. */
const openName = z.string().max(100);

/**
 * During a gradual deployment an older edge counts the events of a newer one. So fields that it does not know are left
 * out, and names that it does not know are kept: otherwise the event, with its tokens, would not be counted.
 */
export const requestEventSchema = z.object({
  kind: z.literal('request'),
  id: z.string().regex(EVENT_ID_PATTERN),
  tenant: z.string(),
  key_id: z.string(),
  /** `YYYY-MM-DD`, UTC, of `created_at_ms`. */
  day: z.iso.date(),
  created_at_ms: z.int(),
  /** `chat`, `completion`, or a newer edge's. */
  endpoint: openName,
  /** The model's name without `:dense`. */
  model: z.string(),
  /** A mask id, `dense`, or `custom` for a client's own layers that this edge could not name. */
  mask: z.string(),
  /** Null when only the backend knew it and did not report it. */
  sparsity: z.number().nullable(),
  mask_set: z.string().nullable(),
  version: z.string().nullable(),
  cluster: z.int().nullable(),
  similarity: z.number().nullable(),
  experiment: z.string(),
  /** The experiment's tenant; '' if it has none, or without an experiment. */
  experiment_owner: z.string(),
  variant: z.string(),
  region: z.string(),
  /** The backend that answered; null when none did. */
  backend: z.string().nullable(),
  /** A `FallbackReason`, or a newer edge's. */
  fallback: openName.nullable(),
  stream: z.boolean(),
  /** HTTP status of the answer; 499 when the client hung up, or its deadline passed, before there was one. */
  status: z.int(),
  error_code: z.string().nullable(),
  prompt_tokens: z.int().min(0),
  completion_tokens: z.int().min(0),
  /**
   * Whether the tokens are the backend's own count. False when it could not be asked: then they are what the tenant's
   * budget was charged or, without a budget, the tokens that the edge saw pass.
   */
  counted: z.boolean(),
  /** From the request's arrival at the edge to the first bytes of the answer; null when none came. */
  ttft_ms: duration_ms,
  /** Mean time per completion token after the first; null with fewer than two tokens, or without streaming. */
  tpot_ms: duration_ms,
  total_ms: z.number().min(0),
  /** The client's request id; several requests may have the same. */
  request_id: z.string().max(200),
  /** A `RequestSource`, or a newer edge's. `playground`: a trial in the dashboard, not customer traffic. */
  source: openName,
});
export type RequestEvent = z.infer<typeof requestEventSchema>;

const ofRequest = {
  /** The `id` of the request's event, under which this is counted. */
  request: z.string().regex(EVENT_ID_PATTERN),
  tenant: z.string(),
  created_at_ms: z.int(),
};

/** A rating of an answer; one for each key. */
const ratingEventSchema = z.object({
  kind: z.literal('rating'),
  ...ofRequest,
  key_id: z.string(),
  rating: z.union([z.literal(1), z.literal(-1)]),
});
export type RatingEvent = z.infer<typeof ratingEventSchema>;

/** Agreement with the dense model, from running the request again in the background. */
const comparisonEventSchema = z.object({
  kind: z.literal('comparison'),
  ...ofRequest,
  /** The share of the compared tokens before the first that differs, 0 to 1. */
  agreement: z.number().min(0).max(1),
  /** Share of the time per token that the mask saved: 1 − masked / dense. Null when the backend did not time both. */
  saved: z.number().max(1).nullable(),
});
export type ComparisonEvent = z.infer<typeof comparisonEventSchema>;

export const edgeEventSchema = z.discriminatedUnion('kind', [
  requestEventSchema,
  ratingEventSchema,
  comparisonEventSchema,
]);
export type EdgeEvent = z.infer<typeof edgeEventSchema>;

/**
 * A message of the queue: several request events, or a single rating or comparison, since that may need a retry of its
 * own.
 */
export type EdgeMessage = EdgeEvent | readonly RequestEvent[];

/*
 * Requests as the admin API shows them for seven days: `GET /admin/v1/requests` lists them, `GET
 * /admin/v1/requests/{id}` has everything known about one. Prompts and answers are included only if the tenant keeps
 * its texts (`texts_kept_days`).
 */

export const REQUEST_SORTS = ['created_at', 'total_ms', 'ttft_ms', 'tokens'] as const;
export const REQUEST_OUTCOMES = ['all', 'failed', 'dense', 'rated'] as const;

/** `q` is an `x-request-id`, or a completion's id. */
export const requestsQuerySchema = tenantPageQuerySchema
  .extend({
    /** Sort field, in descending order. */
    sort: z.enum(REQUEST_SORTS).default('created_at'),
    outcome: z.enum(REQUEST_OUTCOMES).default('all'),
    from: timestamp.optional(),
  })
  .transform(({ from, ...query }) => ({
    ...query,
    from_ms: from === undefined ? undefined : Date.parse(from),
  }));
export type RequestsQuery = z.output<typeof requestsQuerySchema>;

export const seenRequestSchema = z.object({
  id: z.string(),
  request_id: z.string().nullable(),
  created_at: timestamp,
  tenant: z.string(),
  key_id: z.string(),
  source: z.enum(REQUEST_SOURCES),
  endpoint: z.string(),
  model: z.string(),
  version: z.string().nullable(),
  cluster: z.int().nullable(),
  mask: z.string(),
  sparsity: z.number().nullable(),
  /** Cosine similarity to the nearest centroid. */
  similarity: z.number().nullable(),
  /** Why it ran dense. */
  fallback: z.string().nullable(),
  experiment: z.string(),
  variant: z.string(),
  region: z.string(),
  backend: z.string().nullable(),
  status: z.int(),
  error_code: z.string().nullable(),
  prompt_tokens: z.int(),
  completion_tokens: z.int(),
  ttft_ms: z.number().nullable(),
  tpot_ms: z.number().nullable(),
  total_ms: z.number().nullable(),
  /** The sum of its ratings, 1 and -1; null without any. */
  rating: z.int().nullable(),
  /** Agreement with the dense model, if it was compared. */
  agreement: z.number().nullable(),
});
export type SeenRequest = z.infer<typeof seenRequestSchema>;

export const requestDetailSchema = seenRequestSchema.extend({
  ratings: z.array(z.object({ rating: z.int(), comment: z.string().nullable(), created_at: timestamp })),
  texts: z.object({ prompt: z.string(), answer: z.string(), expires_at: timestamp }).nullable(),
});
export type RequestDetail = z.infer<typeof requestDetailSchema>;

/** `GET /admin/v1/ratings`, the newest first. */
export const ratingsQuerySchema = tenantPageQuerySchema.extend({
  /** Only those with a comment. */
  commented: querySwitch,
});

export const ratedSchema = z.object({
  /** The id of the request. */
  request: z.string(),
  tenant: z.string(),
  rating: z.int(),
  comment: z.string().nullable(),
  created_at: timestamp,
});
export type Rated = z.infer<typeof ratedSchema>;
