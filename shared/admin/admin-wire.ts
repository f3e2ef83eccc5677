/**
 * The admin API's wire format: what `maskroute publish` and `rollback` send, what the dashboard reads.
 *
 * | method and path (under `/admin/v1`) | body | answer |
 * |---|---|---|
 * | `POST /tenants`                 | {@link createTenantSchema}  | 201 {@link Tenant}; 409 when the id is taken |
 * | `GET /tenants`                  |                             | list of {@link Tenant} |
 * | `GET /tenants/{id}`             |                             | {@link Tenant} |
 * | `PATCH /tenants/{id}`           | {@link updateTenantSchema}  | {@link Tenant}; holds everywhere within 5 s |
 * | `GET /tenants/{id}/budget`      |                             | list of {@link BudgetUse}: what is used right now |
 * | `POST /keys`                    | {@link createKeySchema}     | 201 {@link CreatedKey}: the only time the key is shown |
 * | `GET /keys?tenant=&state=`      |                             | list of {@link ApiKey}; `state=working`: neither revoked nor expired |
 * | `DELETE /keys/{id}`             |                             | {@link ApiKey} with `revoked_at`, its sessions end; again is the same |
 * | `DELETE /keys/{id}/sessions`    |                             | {@link EndedSessions}: all sessions of the dashboard that the key opened end, within 5 s |
 * | `DELETE /sessions`              |                             | the same of the key that asks, `ADMIN_KEY` included |
 * | `POST /keys/{id}/rotate`        | {@link rotateKeySchema}     | 201 {@link CreatedKey}: the key in its place, the old one's sessions end; 409 when it is over |
 * | `GET /usage?tenant=&from=&to=&group=` |                       | list of {@link UsageRow} |
 * | `POST /mask-sets?tenant=`       | a mask set                  | 201 {@link MaskSetSummary}; 200 for content already there |
 * | `GET /mask-sets?tenant=`        |                             | list of {@link MaskSetSummary} |
 * | `GET /mask-sets/{version}?tenant=` |                          | the mask set itself |
 * | `PUT /mask-sets/{version}/evaluation?tenant=` | see `evaluation.ts` | list of what is kept of its rows, in place of what was |
 * | `GET /mask-sets/{version}/evaluation?tenant=` |             | the same; empty when there is none |
 * | `POST /publications`            | {@link publishSchema}       | 201 {@link Publication}; 409 when another publisher won |
 * | `POST /publications/rollback`   | {@link rollbackSchema}      | 201 {@link Publication}; calls a first one off that not everyone sees yet; 409 when nothing came before |
 * | `GET /publications?tenant=`     |                             | list of {@link Publication}, newest first |
 * | `GET /traffic?tenant=&version=`  |                            | see `admin-traffic.ts` |
 * | `GET /publications/live?tenant=` |                            | {@link LivePublication}; 404 when nothing was published |
 * | `GET /publications/in-use?tenant=` |                          | {@link PublicationInUse}: the tenant's own or the default one; 404 when every request runs dense |
 * | `/experiments`, `/stats`        |                             | see `admin-experiments.ts` |
 *
 * Lists have pages, see `admin-pages.ts`. `tenant` is a tenant id; absent or empty it means the default that every tenant without its own uses.
 * A tenant's own admin key needs no `tenant`: it means its own, and every other is refused with 403.
 */
import { z } from 'zod';
import { ROUTING_POLICIES } from '../embedding/route-text.ts';

/** The owner of what no tenant owns. */
export const DEFAULT_TENANT = '';
export const TENANT_ID_PATTERN = /^[a-z0-9][a-z0-9-]{0,62}$/;
export const MASK_SET_VERSION_PATTERN = /^v_[0-9a-f]{24}$/;
const LIST_COUNT_MAX = 200;

export const API_KEY_KINDS = ['tenant', 'tenant_admin', 'admin'] as const;
export type ApiKeyKind = (typeof API_KEY_KINDS)[number];

export const tenantId = z
  .string()
  .regex(TENANT_ID_PATTERN, 'expected lower-case letters, digits and dashes, at most 63');
export const ownerId = z.union([z.literal(DEFAULT_TENANT), tenantId]);
export const version = z.string().regex(MASK_SET_VERSION_PATTERN, 'expected v_ and 24 hexadecimal digits');
export const timestamp = z.iso.datetime();

/** Null: no limit. Counted over any sixty seconds, and by the day of UTC. */
const budget = z.int().min(1).max(1e12).nullable();
const tenantFields = {
  name: z.string().min(1).max(200),
  /** Which text of a conversation's opening is embedded. */
  routing_policy: z.enum(ROUTING_POLICIES),
  /** A disabled tenant's keys are refused. */
  enabled: z.boolean(),
  /** Without `:dense`; null: every model. */
  models: z.array(z.string().min(1).max(300)).min(1).max(64).nullable(),
  /** No mask of a request skips a larger share of blocks; null: any may. */
  sparsity_max: z.number().min(0).max(1).nullable(),
  /** The least agreement with dense of a set that goes live, and of one that requests are routed by; null: any. */
  agreement_min: z.number().min(0).max(1).nullable(),
  requests_per_minute: budget,
  tokens_per_minute: budget,
  requests_per_day: budget,
  tokens_per_day: budget,
};

export const createTenantSchema = z.strictObject({
  id: tenantId,
  ...tenantFields,
  routing_policy: tenantFields.routing_policy.default('first_user'),
  enabled: tenantFields.enabled.default(true),
  models: tenantFields.models.default(null),
  sparsity_max: tenantFields.sparsity_max.default(null),
  agreement_min: tenantFields.agreement_min.default(null),
  requests_per_minute: budget.default(null),
  tokens_per_minute: budget.default(null),
  requests_per_day: budget.default(null),
  tokens_per_day: budget.default(null),
});
export type NewTenant = z.infer<typeof createTenantSchema>;

/** A tenant's own admin key changes {@link OWN_TENANT_FIELDS} only. */
export const updateTenantSchema = z
  .strictObject(tenantFields)
  .partial()
  .refine((change) => Object.keys(change).length > 0, 'names nothing to change');
export type TenantChange = z.infer<typeof updateTenantSchema>;
export const OWN_TENANT_FIELDS: readonly string[] = ['name', 'routing_policy'];

/** What of the live mask set the tenant's terms forbid, with the code that publishing it now would be refused with. */
const TENANT_WARNINGS = ['quality_below_floor', 'sparsity_over_ceiling', 'model_not_allowed'] as const;

export const tenantSchema = z.object({
  id: z.string(),
  ...tenantFields,
  created_at: timestamp,
  /** Of one tenant only, not in lists; absent, too, while the live set cannot be read. */
  warnings: z.array(z.object({ code: z.enum(TENANT_WARNINGS), message: z.string() })).optional(),
});
export type Tenant = z.infer<typeof tenantSchema>;
export type TenantWarning = NonNullable<Tenant['warnings']>[number];

export const budgetUseSchema = z.object({
  unit: z.enum(['requests', 'tokens']),
  window: z.enum(['minute', 'day']),
  limit: z.int(),
  /** Settled and reserved. */
  used: z.int(),
  /** When nothing of it is used any more, if nothing is asked until then. */
  resets_at: timestamp,
});
export type BudgetUse = z.infer<typeof budgetUseSchema>;

/** A key that is over when it is made opens nothing, and in a rotation it would take the place of one that does. */
const keyEnd = timestamp.refine((time) => Date.parse(time) > Date.now(), 'is over already').optional();

export const createKeySchema = z
  .strictObject({
    /** `tenant` sends completions, `tenant_admin` manages one tenant, `admin` manages all. */
    kind: z.enum(API_KEY_KINDS).default('tenant'),
    tenant: ownerId.default(DEFAULT_TENANT),
    name: z.string().min(1).max(200),
    expires_at: keyEnd,
  })
  .refine((key) => (key.kind === 'admin') === (key.tenant === DEFAULT_TENANT), {
    message: 'a key of kind admin has no tenant, every other kind has one',
    path: ['tenant'],
  });

export const apiKeySchema = z.object({
  id: z.string(),
  kind: z.enum(API_KEY_KINDS),
  tenant: z.string(),
  name: z.string(),
  /** The first characters of the key, to tell keys apart. */
  prefix: z.string(),
  created_at: timestamp,
  expires_at: timestamp.nullable(),
  revoked_at: timestamp.nullable(),
  /** The id of the key that a rotation made in its place. */
  replaced_by: z.string().nullable(),
});
export type ApiKey = z.infer<typeof apiKeySchema>;

export const createdKeySchema = apiKeySchema.extend({ key: z.string() });
export type CreatedKey = z.infer<typeof createdKeySchema>;

export const ROTATION_OVERLAP_MAX_s = 30 * 86_400;
export const rotateKeySchema = z.strictObject({
  /** How long the old key works beside the new one. */
  overlap_s: z.int().min(0).max(ROTATION_OVERLAP_MAX_s).default(3600),
  /** Of the new key; absent: never. */
  expires_at: keyEnd,
});

const endedSessionsSchema = z.object({
  /** The id of the key that opened them, or `root`. */
  actor: z.string(),
  /** Those that were opened later go on. */
  ended_before: timestamp,
});
export type EndedSessions = z.infer<typeof endedSessionsSchema>;

export const USAGE_GROUPS = ['tenant', 'day', 'model', 'mask'] as const;
export type UsageGroup = (typeof USAGE_GROUPS)[number];
const USAGE_ROWS_MAX = 1000;
const USAGE_DAYS = 30;
const AFTER_CHARS_MAX = 1000;
const day = z.iso.date();
const daysAgo = (days: number): string => new Date(Date.now() - days * 86_400_000).toISOString().slice(0, 10);

function jsonOrNull(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Days are of UTC, both included. */
export const usageQuerySchema = z
  .strictObject({
    tenant: z.string().optional(),
    from: day.default(() => daysAgo(USAGE_DAYS - 1)),
    to: day.default(() => daysAgo(0)),
    /** One, or several with commas. */
    group: z
      .string()
      .default('day')
      .transform((text) => text.split(','))
      .pipe(z.array(z.enum(USAGE_GROUPS)).max(USAGE_GROUPS.length)),
    limit: z.coerce.number().pipe(z.int().min(1).max(USAGE_ROWS_MAX)).default(USAGE_ROWS_MAX),
    /** The `next` of an answer to the same question: what the last row of that page is grouped by. */
    after: z.string().max(AFTER_CHARS_MAX).transform(jsonOrNull).pipe(z.array(z.string())).optional(),
  })
  .refine(({ from, to }) => from <= to, { message: 'from is after to', path: ['from'] })
  .refine(({ after, group }) => after === undefined || after.length === group.length, {
    message: 'expected the next of an earlier answer to the same question',
    path: ['after'],
  });
export type UsageQuery = z.infer<typeof usageQuerySchema>;

/** What is not grouped by is null. */
export const usageRowSchema = z.object({
  tenant: z.string().nullable(),
  day: z.string().nullable(),
  model: z.string().nullable(),
  mask: z.string().nullable(),
  requests: z.int(),
  errors: z.int(),
  prompt_tokens: z.int(),
  completion_tokens: z.int(),
});
export type UsageRow = z.infer<typeof usageRowSchema>;

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

/** The version that the caller believes is live; null = nothing is live; absent = whatever is. */
const expectedVersion = version.nullable().optional();

const ROLLOUT_STEPS_MAX = 20;

const rolloutSchema = z
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
const autoRollbackSchema = z
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

export const rollbackSchema = z.strictObject({
  tenant: ownerId.default(DEFAULT_TENANT),
  expected_version: expectedVersion,
});

export const publicationSchema = z.object({
  id: z.string(),
  tenant: z.string(),
  /** Null: nothing is live any more, since a first publication was called off. */
  version: z.string().nullable(),
  /** The version that was live before. */
  replaced_version: z.string().nullable(),
  action: z.enum(['activate', 'rollback']),
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
  /** What a rollback brings back; null when nothing came before. An edge of the release before does not say. */
  previous_version: z.string().nullable().default(null),
});
export type LivePublication = z.infer<typeof livePublicationSchema>;

/** What a tenant's requests are routed by. While a publication takes hold, the newest that any of them sees. */
export const publicationInUseSchema = z.object({
  /** Whose it is: the tenant itself, or empty for the default one. */
  tenant: z.string(),
  version: z.string(),
  activate_at: timestamp,
});
export type PublicationInUse = z.infer<typeof publicationInUseSchema>;

/** The answer to a publish request with `activate: false`. */
export const publishCheckSchema = z.object({ activated: z.literal(false), version: z.string() });

export const listSchema = <T extends z.ZodType>(item: T) =>
  z.object({
    object: z.literal('list'),
    data: z.array(item),
    /** Whether there are more, and where they begin; of lists that have pages, see `admin-pages.ts`. */
    has_more: z.boolean().optional(),
    next: z.string().nullable().optional(),
  });

export const feedbackSchema = z.strictObject({
  /** The `id` of the completion, of the last six days. */
  id: z.string().regex(/^[A-Za-z0-9_.:-]{1,200}$/),
  rating: z.union([z.literal(1), z.literal(-1)]),
  comment: z.string().max(2000).optional(),
});

/*
 * Pages of the admin API's lists. Keys, tenants, mask sets, publications and experiments are listed newest first:
 * `?limit=` says how many an answer has, and `?before=` takes the `next` of the answer before. Usage is listed in the
 * order of what it is grouped by, and takes its `next` as `?after=`. Without them an answer is the first page.
 */

/** Where a page ended: what its last item is sorted by, and what tells it from others that are sorted alike. */
export type Cursor = { readonly at: number; readonly id: string };

const CURSOR = /^(\d{1,15})~([A-Za-z0-9._-]{1,200})$/;
export const writeCursor = ({ at, id }: Cursor): string => `${at}~${id}`;

export const pageQuerySchema = z.object({
  limit: z.coerce.number().pipe(z.int().min(1).max(LIST_COUNT_MAX)).default(LIST_COUNT_MAX),
  before: z
    .string()
    .regex(CURSOR, 'expected the next of an earlier answer')
    .transform((text): Cursor => {
      const [, at, id] = CURSOR.exec(text)!;
      return { at: Number(at), id: id! };
    })
    .optional(),
});
export type PageQuery = z.infer<typeof pageQuerySchema>;

export const keysQuerySchema = pageQuerySchema.extend({
  /** `working`: neither revoked nor expired. Absent: all. */
  state: z.enum(['working']).optional(),
});

/*
 * What the dashboard's page and the edge say to each other beside the admin API: the session.
 *
 * | method and path | body | answer |
 * |---|---|---|
 * | `POST /dashboard/session`   | {@link loginSchema} | {@link sessionSchema}, and the session's cookie |
 * | `GET /dashboard/session`    |                     | {@link sessionSchema}; 204 when nobody is logged in, 401 when a session has ended |
 * | `DELETE /dashboard/session` |                     | 204; the cookie is gone and the session has ended, copies of it within 5 s everywhere |
 * | `DELETE /dashboard/session?everywhere=true` |     | the same of all sessions that the key has opened |
 *
 * With the cookie, the admin API takes requests without a key. Those that change something, logging out
 * included, must come from the page's own origin and carry the session's token in {@link CSRF_HEADER}.
 */

export const CSRF_HEADER = 'x-maskroute-csrf';

export const loginSchema = z.strictObject({ key: z.string().min(1).max(512) });

export const sessionSchema = z.object({
  /** The id of the key that logged in, or `root`. */
  actor: z.string(),
  /** The only tenant that the session sees; null for one that manages all. */
  tenant: z.string().nullable(),
  csrf: z.string(),
  expires_at: z.iso.datetime(),
});
export type Session = z.infer<typeof sessionSchema>;
