/**
 * The protocol between the edge and a backend.
 *
 * - The edge forwards the client's body with `mask` set to the id that routing chose and `maskroute` set to the routing
 *   decision. The backend adds its own part and returns both under `maskroute` (in the last chunk when streaming), so
 *   the edge can pass the answer on unchanged.
 * - The edge authenticates with a short-lived token signed with the backend key (HMAC-SHA256).
 * - A backend that does not know a mask id asks `GET {edge}/internal/v1/masks/{id}` once and keeps the answer. It
 *   authenticates with a token for that edge that is valid only for masks.
 */
import { z } from 'zod';
import { BLOCK_COUNT_MAX, MASK_ID_PATTERN, MODEL_HASH_PATTERN, SURROGATES_ID_PATTERN } from '../mask/mask.ts';

/** A backend ends an answer when its client reads nothing of it for this long. */
export const UNREAD_MAX_ms = 30_000;

/** The headers of a stream of events. Some proxies buffer one unless told not to. */
export const EVENT_STREAM_HEADERS = {
  'content-type': 'text/event-stream; charset=utf-8',
  'cache-control': 'no-cache, no-transform',
  'x-accel-buffering': 'no',
} as const;

/** Why a request went dense although routing was on. */
export type FallbackReason =
  | 'requested'
  | 'experiment'
  | 'no_mask_set'
  | 'mask_set_unavailable'
  | 'model_mismatch'
  | 'encoder_mismatch'
  | 'encoder_failed'
  | 'encoder_timeout'
  | 'low_similarity'
  | 'empty_prompt'
  | 'token_prompt'
  | 'unknown_mask'
  | 'over_ceiling'
  | 'under_floor';

/** The edge's own completion ids; never the client's request id, which it may send twice. */
const COMPLETION_PATTERN = /^[A-Za-z0-9_.-]{1,100}$/;

/** The edge's routing decision as it travels in the body and in the `x-maskroute-*` headers. */
export const routeEchoSchema = z.looseObject({
  mask_set: z.string().max(200).nullish(),
  version: z.string().max(100).nullish(),
  cluster: z.int().min(0).nullish(),
  similarity: z.number().nullish(),
  experiment: z.string().max(200).nullish(),
  variant: z.string().max(200).nullish(),
  region: z.string().max(100).nullish(),
  /** A {@link FallbackReason}, or a newer edge's: a backend returns it unchecked. */
  fallback: z.string().max(100).nullish(),
  /** The edge's name of the completion, by which it recognises it later; the answer's `id` ends with it. */
  completion: z.string().regex(COMPLETION_PATTERN).nullish(),
});
export type RouteEcho = z.infer<typeof routeEchoSchema>;

/** What the body carries under `maskroute`: the edge's part (absent on direct calls) and the backend's. */
export const maskrouteInfoSchema = routeEchoSchema.extend({
  mask: z.string(),
  sparsity: z.number(),
  queue_ms: z.number(),
  prefill_ms: z.number(),
  decode_ms: z.number(),
  prompt_tokens: z.int(),
  completion_tokens: z.int(),
});
export type MaskrouteInfo = z.infer<typeof maskrouteInfoSchema>;

/** The answer of the backend's `GET /v1/answers/{id}`; 404 with `not_found` for an unknown id. */
export const answerUsageSchema = z.looseObject({
  object: z.literal('maskroute.answer'),
  /** False: the answer is still running, and the counts are not final. */
  finished: z.boolean(),
  prompt_tokens: z.int().min(0),
  completion_tokens: z.int().min(0),
});
export type AnswerUsage = Pick<z.infer<typeof answerUsageSchema>, 'prompt_tokens' | 'completion_tokens'>;
export const answerPath = (completion: string): string => `/v1/answers/${completion}`;

/** OpenAI's `system_fingerprint`: equal for answers of the same weights under the same mask. */
export const systemFingerprint = (modelHash: string, maskId: string): string =>
  `fp_${modelHash.slice(0, 12)}_${maskId}`;
/** The part that answers of the same weights have in common, whatever their masks. */
export const weightsOf = (fingerprint: string): string => fingerprint.split('_', 2).join('_');

/** Response headers on every completion. */
export const HEADERS = {
  requestId: 'x-request-id',
  maskSet: 'x-maskroute-mask-set',
  version: 'x-maskroute-version',
  cluster: 'x-maskroute-cluster',
  mask: 'x-maskroute-mask',
  sparsity: 'x-maskroute-sparsity',
  experiment: 'x-maskroute-experiment',
  variant: 'x-maskroute-variant',
  region: 'x-maskroute-region',
  fallback: 'x-maskroute-fallback',
  /** The ignored fields of the request, if any: `metadata, messages.name`. */
  ignored: 'x-maskroute-ignored',
  serverTiming: 'server-timing',
} as const;

/**
 * Request headers of a trial, such as the dashboard's playground: the request is marked, takes part in no experiment,
 * judges no version, is no sign of drift, and may be routed by any mask set that the tenant could publish.
 */
export const TRIAL_HEADERS = {
  /** `playground`. */
  source: 'x-maskroute-source',
  /** The version of the mask set to route by. */
  version: 'x-maskroute-try-version',
} as const;

/**
 * `ALLOWED_ORIGINS`: whose pages may call `/v1` from a browser: `*`, or origins as browsers write them, with commas or
 * spaces between them.
 */
export const allowedOriginsSchema = z
  .string()
  .transform((text) => text.split(/[\s,]+/).filter((origin) => origin !== ''))
  .refine((origins) => origins.every((origin) => origin === '*' || isOrigin(origin)), {
    message: 'expected "*", or origins like https://app.example.com, without a path',
  });

const isOrigin = (text: string): boolean => /^https?:[^*]+$/.test(text) && URL.parse(text)?.origin === text;

export const REQUEST_ID_PATTERN = /^[A-Za-z0-9_.:-]{1,128}$/;

export const internalMaskPath = (id: string): string => `/internal/v1/masks/${id}`;

/** The answer of `GET /internal/v1/masks/{id}`. */
export const maskRecordSchema = z.strictObject({
  id: z.string().regex(MASK_ID_PATTERN),
  modelHash: z.string().regex(MODEL_HASH_PATTERN),
  blockCount: z.int().min(2).max(BLOCK_COUNT_MAX),
  bits: z.string().max(BLOCK_COUNT_MAX / 4),
  /** The table of surrogates; null for plain skipping. */
  surrogates: z.string().regex(SURROGATES_ID_PATTERN).nullish(),
});
export type MaskRecord = z.infer<typeof maskRecordSchema>;

/** One entry of the backend's `GET /v1/models`, beyond OpenAI's fields. */
const modelEntrySchema = z.looseObject({
  id: z.string(),
  object: z.literal('model'),
  created: z.int(),
  owned_by: z.string(),
  maskroute: z
    .looseObject({
      hash: z.string().regex(MODEL_HASH_PATTERN),
      block_count: z.int(),
      context_tokens: z.int(),
      dense: z.boolean(),
      /** The table of surrogates that this backend serves; null without one. */
      surrogates: z.string().regex(SURROGATES_ID_PATTERN).nullish(),
    })
    .optional(),
});
export const modelListSchema = z.looseObject({ object: z.literal('list'), data: z.array(modelEntrySchema) });
export type ModelEntry = z.infer<typeof modelEntrySchema>;

/** `<model>:dense` names the unpruned model. */
export const DENSE_SUFFIX = ':dense';
export function splitModelName(name: string): { model: string; dense: boolean } {
  return name.endsWith(DENSE_SUFFIX)
    ? { model: name.slice(0, -DENSE_SUFFIX.length), dense: true }
    : { model: name, dense: false };
}
