/**
 * Mask sets and their publications on the wire of the admin API, whose table of endpoints stands in `admin-wire.ts`: a
 * set is stored once, and a publication says from when on, in what steps and within which bounds requests see it.
 */
import { z } from 'zod';
import { DEFAULT_TENANT, ownerId, timestamp, version } from './admin-wire.ts';

export const maskSetSummarySchema = z.object({
  version: z.string(),
  tenant: z.string(),
  name: z.string(),
  model: z.object({ name: z.string(), hash: z.string() }),
  encoder: z.string(),
  clusters: z.int(),
  reached_sparsity: z.number(),
  bytes: z.int(),
  created_at: timestamp,
});
export type MaskSetSummary = z.infer<typeof maskSetSummarySchema>;

/** Of `POST /admin/v1/mask-sets`. */
export const storeMaskSetQuerySchema = z.strictObject({
  tenant: z.string().optional(),
  /** Stores only what could go live for the tenant now: what a publication would refuse is refused, and not stored. */
  publishable: z.stringbool().default(false),
});

/** The version that the caller believes is live; null = nothing is live; absent = whatever is. */
const expectedVersion = version.nullable().optional();

const ROLLOUT_STEPS_MAX = 20;

export const rolloutSchema = z
  .array(
    z.strictObject({
      /** The share of conversations that see the new version during this step. */
      share: z.number().gt(0).lt(1),
      duration_s: z
        .int()
        .min(1)
        .max(30 * 86_400),
    }),
  )
  .max(ROLLOUT_STEPS_MAX)
  .refine((steps) => steps.every(({ share }, i) => i === 0 || share > steps[i - 1]!.share), {
    message: 'shares must rise from step to step',
  });

/**
 * When the edge takes a publication back by itself. Compared are the requests since the activation that were routed to
 * one of its masks: those of the last 15 minutes; where these are fewer than `requests_min`, of the last two hours, and
 * where these are, of the last day.
 */
export const autoRollbackSchema = z
  .strictObject({
    /** Highest share of requests that fail, and neither for the client's doing nor because nobody answered in time. */
    error_rate_max: z.number().min(0).lt(1).optional(),
    /** Highest mean time per token, in milliseconds. */
    tpot_ms_max: z.number().gt(0).optional(),
    /** Highest mean time per token, as a multiple of the replaced version's in the same time. */
    tpot_ratio_max: z.number().gt(1).optional(),
    /** Nothing is decided on fewer requests than this. */
    requests_min: z.int().min(1).max(1_000_000).default(100),
  })
  .refine(({ requests_min: _, ...bounds }) => Object.values(bounds).some((bound) => bound !== undefined), {
    message: 'name at least one of error_rate_max, tpot_ms_max and tpot_ratio_max',
  });
export type AutoRollback = z.infer<typeof autoRollbackSchema>;

export const publishSchema = z.strictObject({
  version,
  tenant: ownerId.default(DEFAULT_TENANT),
  expected_version: expectedVersion,
  /** False checks that the set could go live, and changes nothing. */
  activate: z.boolean().default(true),
  /** Until then the version that is live now stays. Absent or past: at once. */
  activate_at: timestamp.optional(),
  /** The steps on the way to everyone; without them everyone sees the new version at once. */
  rollout: rolloutSchema.default([]),
  auto_rollback: autoRollbackSchema.optional(),
});
export type PublishBody = z.input<typeof publishSchema>;

/** Of the newest publication: it stays where it is, or goes on. */
export const holdSchema = z.strictObject({
  tenant: ownerId.default(DEFAULT_TENANT),
  expected_version: expectedVersion,
});

export const rollbackSchema = z.strictObject({
  tenant: ownerId.default(DEFAULT_TENANT),
  expected_version: expectedVersion,
});

export const PUBLICATION_ACTIONS = ['activate', 'rollback', 'pause', 'resume'] as const;

export const publicationSchema = z.object({
  id: z.string(),
  tenant: z.string(),
  /** Null: nothing is live any more, since a first publication was called off. */
  version: z.string().nullable(),
  /** The version that was live before. */
  replaced_version: z.string().nullable(),
  action: z.enum(PUBLICATION_ACTIONS),
  /** The id of the key that did it, `root`, or {@link AUTO_ROLLBACK}. */
  actor: z.string(),
  created_at: timestamp,
  activate_at: timestamp,
  rollout: rolloutSchema,
  auto_rollback: autoRollbackSchema.nullable(),
  /** Which bound was crossed, when the edge took a version back by itself. */
  reason: z.string().nullable(),
});
export type Publication = z.infer<typeof publicationSchema>;

/** The actor of a rollback that no person asked for. */
export const AUTO_ROLLBACK = 'auto-rollback';

/** The newest publication, with the share of conversations that see it at this moment. */
export const livePublicationSchema = publicationSchema.extend({
  version: z.string(),
  share: z.number().min(0).max(1),
  /** What the others see; null when this is everyone's, or when nothing came before. */
  base_version: z.string().nullable(),
  /** What a rollback brings back; null when nothing came before. */
  previous_version: z.string().nullable(),
  /** Since when its steps wait for somebody to let them go on; null: they go on by themselves. */
  paused_at: timestamp.nullable(),
  /** When the share changes next; null when everyone sees it, and while it is paused. */
  next_step_at: timestamp.nullable(),
});
export type LivePublication = z.infer<typeof livePublicationSchema>;

/** What a part of a tenant's conversations sees. */
const servedPartSchema = z.object({
  /** Whose it is: the tenant itself, or empty for the default one. */
  tenant: z.string(),
  /** Null: they run dense. */
  version: z.string().nullable(),
  /** Of the conversations, 0 to 1. */
  share: z.number(),
});
export type ServedPart = z.infer<typeof servedPartSchema>;

/** What a tenant's requests are routed by. While a publication takes hold, what most of them see. */
export const publicationInUseSchema = z.object({
  /** Whose it is: the tenant itself, or empty for the default one. */
  tenant: z.string(),
  version: z.string(),
  activate_at: timestamp,
  /** All that is seen, the largest part first; more than one while a publication takes hold. */
  parts: z.array(servedPartSchema).default([]),
});
export type PublicationInUse = z.infer<typeof publicationInUseSchema>;

/** The answer to a publish request with `activate: false`. */
export const publishCheckSchema = z.object({ activated: z.literal(false), version: z.string() });
