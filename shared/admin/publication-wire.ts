/**
 * The wire format of mask sets and publications in the admin API: a set is stored once, and a publication says when, in
 * which steps and within which bounds requests see it.
 */
import { z } from 'zod';
import {
  DEFAULT_TENANT,
  ownerId,
  querySwitch,
  tenantPageQuerySchema,
  tenantQuerySchema,
  timestamp,
  version,
} from './admin-wire.ts';

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

/** The query of `POST /admin/v1/mask-sets`. */
export const storeMaskSetQuerySchema = tenantQuerySchema.extend({
  /** Refuses a set that a publication for the tenant would refuse now, instead of storing it. */
  publishable: querySwitch,
});

/** The version that the caller believes is live; null: none; absent: not checked. */
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
 * When the edge rolls a publication back automatically. It looks at requests since the activation that were routed to
 * one of its masks: of the last 15 minutes; if these are fewer than `requests_min`, of the last two hours; and if these
 * are still fewer, of the last day.
 */
export const autoRollbackSchema = z
  .strictObject({
    /** Highest share of failed requests, not counting failures that the client caused or timeouts. */
    error_rate_max: z.number().min(0).lt(1).optional(),
    /** Highest mean time per token, in milliseconds. */
    tpot_ms_max: z.number().gt(0).optional(),
    /** Highest mean time per token, as a multiple of the replaced version's in the same period. */
    tpot_ratio_max: z.number().gt(1).optional(),
    /** With fewer requests than this nothing is decided. */
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
  /** False: only checks whether the set could go live, and changes nothing. */
  activate: z.boolean().default(true),
  /** Until then the version that is live now stays. Absent or past: at once. */
  activate_at: timestamp.optional(),
  /** Steps of a gradual rollout; empty: all conversations see the new version at once. */
  rollout: rolloutSchema.default([]),
  auto_rollback: autoRollbackSchema.optional(),
});
export type PublishBody = z.input<typeof publishSchema>;

/** Rolls the newest publication back, pauses or resumes it. */
export const changeLiveSchema = z.strictObject({
  tenant: ownerId.default(DEFAULT_TENANT),
  expected_version: expectedVersion,
  /** The id of the only publication that may be changed; absent: the newest. The same version may be published again. */
  expected_publication: z.string().max(100).optional(),
});

export const PUBLICATION_ACTIONS = ['activate', 'rollback', 'pause', 'resume'] as const;

export const publicationSchema = z.object({
  id: z.string(),
  tenant: z.string(),
  /** Null: nothing is live any more, because a first publication was cancelled. */
  version: z.string().nullable(),
  /** The version that was live before. */
  replaced_version: z.string().nullable(),
  action: z.enum(PUBLICATION_ACTIONS),
  /** The id of the publishing key, `root`, or {@link AUTO_ROLLBACK}. */
  actor: z.string(),
  created_at: timestamp,
  activate_at: timestamp,
  rollout: rolloutSchema,
  auto_rollback: autoRollbackSchema.nullable(),
  /** Which bound was crossed, for an automatic rollback. */
  reason: z.string().nullable(),
  /**
   * Why this version of the edge cannot read its rollout or its bounds, if it cannot: another version wrote them. No request
   * sees a publication with an unreadable rollout, and unreadable bounds bring nothing back. It can only be rolled back or
   * replaced.
   */
  unreadable: z.string().optional(),
});
export type Publication = z.infer<typeof publicationSchema>;

/** The query of the history. */
export const publicationsQuerySchema = tenantPageQuerySchema.extend({
  version: version
    .optional()
    .meta({ description: 'Only publications that made this version live, or another one in its place' }),
});
export type PublicationsQuery = z.infer<typeof publicationsQuerySchema>;

/** The actor of an automatic rollback. */
export const AUTO_ROLLBACK = 'auto-rollback';

/** The newest publication, with the share of conversations that see it at this moment. */
export const livePublicationSchema = publicationSchema.extend({
  version: z.string(),
  share: z.number().min(0).max(1),
  /** The version that the other conversations see; null when all see this one, or when nothing came before. */
  base_version: z.string().nullable(),
  /** The version that a rollback makes live again; null when nothing came before. */
  previous_version: z.string().nullable(),
  /** Since when its rollout is paused; null: it is not. */
  paused_at: timestamp.nullable(),
  /** When the share changes next; null when the rollout is complete or paused. */
  next_step_at: timestamp.nullable(),
});
export type LivePublication = z.infer<typeof livePublicationSchema>;

/** A version, and the share of a tenant's conversations that see it. */
const servedPartSchema = z.object({
  /** Owner of the publication: the tenant, or empty for the default. */
  tenant: z.string(),
  /** Null: they run dense. */
  version: z.string().nullable(),
  /** Share of the conversations, 0 to 1. */
  share: z.number(),
});
export type ServedPart = z.infer<typeof servedPartSchema>;

/** The version by which a tenant's requests are routed; during a rollout, the version that most of them see. */
export const publicationInUseSchema = z.object({
  /** Owner of the publication: the tenant, or empty for the default. */
  tenant: z.string(),
  version: z.string(),
  activate_at: timestamp,
  /** All versions in use, the largest share first; several during a rollout. */
  parts: z.array(servedPartSchema),
});
export type PublicationInUse = z.infer<typeof publicationInUseSchema>;

/** The answer to a publish request with `activate: false`. */
export const publishCheckSchema = z.object({ activated: z.literal(false), version: z.string() });
