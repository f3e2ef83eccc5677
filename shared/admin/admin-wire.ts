/**
 * The admin API's wire format: what `maskroute publish` and the dashboard send and read.
 * `openapi/endpoints.ts` lists the endpoints, with what each takes and answers.
 *
 * Mask sets and publications are described in `publication-wire.ts`, figures in `stats-wire.ts`, backends in
 * `wire/backend-load.ts`; how lists have pages stands at {@link pageQuerySchema}. `tenant` is a tenant id; absent or empty
 * it means the default that every tenant without its own uses. A tenant's own admin key needs no `tenant`: it means its
 * own, and every other is refused with 403.
 */
import { z } from 'zod';
import { ROUTING_POLICIES } from '../embedding/encoder.ts';
import { parseOrNull } from '../wire/parse-body.ts';

/** The owner of what no tenant owns. */
export const DEFAULT_TENANT = '';

/** The id of a tenant, an experiment or a backend. */
export const slug = z
  .string()
  .regex(/^[a-z0-9][a-z0-9-]{0,62}$/, 'expected lower-case letters, digits and dashes, at most 63');
export const tenantId = slug;
export const ownerId = z.union([z.literal(DEFAULT_TENANT), tenantId]);
export const version = z.string().regex(/^v_[0-9a-f]{24}$/, 'expected v_ and 24 hexadecimal digits');
/** `abort`: text that is no time is compared with nothing. */
export const timestamp = z.iso.datetime({ abort: true });

/*
 * Lists and their pages. Keys, tenants, mask sets, publications and experiments are listed newest first:
 * `?limit=` says how many an answer has, `?before=` takes the `next` of the answer before, and `?q=` looks for a text. Usage is listed in the
 * order of what it is grouped by, and takes its `next` as `?after=`. Without them an answer is the first page.
 */

const LIST_COUNT_MAX = 200;

/** The answer to a DELETE that leaves nothing to show. */
export const deletedSchema = z.object({ id: z.string(), deleted: z.literal(true) });

export const listSchema = <T extends z.ZodType>(item: T) =>
  z.object({
    object: z.literal('list'),
    data: z.array(item),
    /** Whether there are more, and where they begin; of lists that have pages. */
    has_more: z.boolean().optional(),
    next: z.string().nullable().optional(),
  });

/** Where a page ended: what its last item is sorted by, and what tells it from others that are sorted alike. */
export type Cursor = { readonly at: number; readonly id: string };

const CURSOR = /^(\d{1,15})~([A-Za-z0-9._-]{1,200})$/;
export const writeCursor = ({ at, id }: Cursor): string => `${at}~${id}`;

/**
 * Of every list, also of those that are short enough to have no pages. Here and in what extends it, a field that no list
 * knows is refused: a filter that does nothing would show what it should leave out.
 */
export const searchQuerySchema = z.strictObject({
  /** Only what has this text in its id or name, or in what else tells it from others. */
  q: z.string().min(1).max(200).optional(),
});

export const pageQuerySchema = searchQuerySchema.extend({
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

/** `tenant`: absent or empty means those of no tenant, or all, as each list says. */
export const tenantPageQuerySchema = pageQuerySchema.extend({ tenant: z.string().optional() });

/* Tenants. */

export const TEXTS_KEPT_DAYS_MAX = 90;

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
  /** The least agreement with dense of a set that goes live or that requests are routed by; null: any. */
  agreement_min: z.number().min(0).max(1).nullable(),
  requests_per_minute: budget,
  tokens_per_minute: budget,
  requests_per_day: budget,
  tokens_per_day: budget,
  /** For how many days prompts and answers are kept, to be read beside their request; null: not at all. */
  texts_kept_days: z.int().min(1).max(TEXTS_KEPT_DAYS_MAX).nullable(),
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
  texts_kept_days: tenantFields.texts_kept_days.default(null),
});
export type NewTenant = z.infer<typeof createTenantSchema>;

/** A tenant's own admin key changes {@link OWN_TENANT_FIELDS} only. */
export const updateTenantSchema = z
  .strictObject(tenantFields)
  .partial()
  .refine((change) => Object.keys(change).length > 0, 'names nothing to change');
export type TenantChange = z.infer<typeof updateTenantSchema>;
export const OWN_TENANT_FIELDS: readonly string[] = ['name', 'routing_policy', 'texts_kept_days'];

/** What of the live mask set the tenant's terms forbid, with the code that publishing it now would be refused with. */
const TENANT_WARNINGS = ['quality_below_floor', 'sparsity_over_ceiling', 'model_not_allowed'] as const;

export const tenantSchema = z.object({
  id: z.string(),
  ...tenantFields,
  /** An edge of the release before does not say. */
  texts_kept_days: tenantFields.texts_kept_days.default(null),
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

/* API keys. */

export const API_KEY_KINDS = ['tenant', 'viewer', 'tenant_admin', 'admin'] as const;
export type ApiKeyKind = (typeof API_KEY_KINDS)[number];

/** What somebody may do who administrates: a `viewer` reads, of one tenant or of all. */
export const ROLES = ['viewer', 'tenant_admin', 'admin'] as const satisfies ApiKeyKind[];
export type Role = (typeof ROLES)[number];

/** A key that has ended before it is made opens nothing; in a rotation it would replace a key that works. */
const keyEnd = timestamp.refine((time) => Date.parse(time) > Date.now(), 'is over already').optional();

export const createKeySchema = z
  .strictObject({
    /** `tenant` sends completions, `viewer` reads, `tenant_admin` manages one tenant, `admin` manages all. */
    kind: z.enum(API_KEY_KINDS).default('tenant'),
    tenant: ownerId.default(DEFAULT_TENANT),
    name: z.string().min(1).max(200),
    expires_at: keyEnd,
  })
  .refine(({ kind, tenant }) => kind === 'viewer' || (kind === 'admin') === (tenant === DEFAULT_TENANT), {
    message: 'a key of kind admin has no tenant, a viewer may have one, every other kind has one',
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

export const keysQuerySchema = tenantPageQuerySchema.extend({
  /** `working`: neither revoked nor expired. Absent: all. */
  state: z.enum(['working']).optional(),
});

export const endedSessionsSchema = z.object({
  /** The id of the key that opened them, or `root`. */
  actor: z.string(),
  /** Those that were opened later go on. */
  ended_before: timestamp,
});
export type EndedSessions = z.infer<typeof endedSessionsSchema>;

/* Usage. */

export const USAGE_GROUPS = ['tenant', 'day', 'model', 'mask'] as const;
export type UsageGroup = (typeof USAGE_GROUPS)[number];
const USAGE_ROWS_MAX = 1000;
const USAGE_DAYS = 30;
const AFTER_CHARS_MAX = 1000;
const day = z.iso.date({ abort: true });
const daysAgo = (days: number): string => new Date(Date.now() - days * 86_400_000).toISOString().slice(0, 10);

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
    after: z
      .string()
      .max(AFTER_CHARS_MAX)
      .transform(parseOrNull)
      .pipe(z.array(z.string(), 'expected the next of an earlier answer'))
      .optional(),
  })
  .refine(({ from, to }) => from <= to, { message: 'must not be later than to', path: ['from'] })
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

/** Of the 204 of `GET /dashboard/session`: who else says who somebody is, at `GET /dashboard/sign-in` (OpenID Connect). */
export const SIGN_IN_HEADER = 'x-maskroute-sign-in';

export const loginSchema = z.strictObject({ key: z.string().min(1).max(512) });

export const sessionSchema = z.object({
  /** The id of the key that logged in, or `root`. */
  actor: z.string(),
  /** The only tenant that the session sees; null when it manages all tenants. */
  tenant: z.string().nullable(),
  /** An edge of the release before does not say. */
  role: z.enum(ROLES).default('admin'),
  csrf: z.string(),
  expires_at: z.iso.datetime(),
});
export type Session = z.infer<typeof sessionSchema>;

/*
 * The log of what administrators changed: `GET /admin/v1/audit?tenant=&q=` lists it, the newest first,
 * `GET /admin/v1/audit/{id}` shows one entry, and `GET /admin/v1/audit/export?tenant=` is all of it as rows of JSON. A
 * tenant's own administrator sees what was changed of that tenant. It is kept for `AUDIT_KEPT_DAYS` of the edge's configuration.
 */

export const auditEntrySchema = z.object({
  id: z.int(),
  created_at: timestamp,
  /** The tenant that it was about; empty for the whole edge. */
  tenant: z.string(),
  /** The id of the key, `root`, or who signed in. */
  actor: z.string(),
  /** Null where nobody before the edge can be believed, as on one machine. */
  address: z.string().nullable(),
  /** Method and route: `PATCH /tenants/:id`. */
  action: z.string(),
  /** What it was about: `/tenants/acme`. */
  target: z.string(),
  /** Null where there was nothing, or it is not known what. Keys are not in it, only what their lists show. */
  before: z.unknown().nullable(),
  /** Null where nothing is left, and where the edge never heard what became of it: see `is_known`. */
  after: z.unknown().nullable(),
  /** False: the edge ended, or failed, before it could write down what became of it. */
  is_known: z.boolean(),
  request_id: z.string(),
});
export type AuditEntry = z.infer<typeof auditEntrySchema>;
