/**
 * Requests one by one, as the admin API shows them for seven days: `GET /admin/v1/requests` lists them,
 * `GET /admin/v1/requests/{id}` has all that is known of one. What was asked and answered is only there where the tenant
 * has its texts kept (`texts_kept_days`).
 */
import { z } from 'zod';
import { pageQuerySchema, timestamp } from './admin-wire.ts';
import { REQUEST_SOURCES } from './request-event.ts';

export const REQUEST_SORTS = ['created_at', 'total_ms', 'ttft_ms', 'tokens'] as const;
export const REQUEST_OUTCOMES = ['all', 'failed', 'dense', 'rated'] as const;

/** `q` is an `x-request-id`, or a completion's id. */
export const requestsQuerySchema = pageQuerySchema
  .extend({
    tenant: z.string().optional(),
    /** Falling. */
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
  /** To the nearest centroid, as a cosine. */
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
  /** With the dense model, where it was compared. */
  agreement: z.number().nullable(),
});
export type SeenRequest = z.infer<typeof seenRequestSchema>;

export const requestDetailSchema = seenRequestSchema.extend({
  ratings: z.array(z.object({ rating: z.int(), comment: z.string().nullable(), created_at: timestamp })),
  texts: z.object({ prompt: z.string(), answer: z.string(), expires_at: timestamp }).nullable(),
});
export type RequestDetail = z.infer<typeof requestDetailSchema>;

/** `GET /admin/v1/ratings`, the newest first. */
export const ratingsQuerySchema = pageQuerySchema.extend({
  tenant: z.string().optional(),
  /** Only those with a comment. */
  commented: z.stringbool().default(false),
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
