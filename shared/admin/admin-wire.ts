/**
 * The admin API's wire format: what `maskroute publish` and the dashboard send and read.
 * `openapi/endpoints.ts` lists the endpoints, with what each takes and answers.
 *
 * Mask sets and publications are described in `publication-wire.ts`, figures in `stats-wire.ts`, backends in
 * `wire/backend-load.ts`, pagination at {@link pageQuerySchema}. `tenant` is a tenant id; absent or empty it means the
 * default, which every tenant without mask sets of its own uses. With a tenant's own admin key `tenant` defaults to
 * that tenant, and any other is refused with 403.
 */
import { z } from 'zod';
import { ROUTING_POLICIES } from '../embedding/encoder.ts';
import { parseOrNull } from '../wire/parse-body.ts';

/** The owner of everything that belongs to no tenant. */
export const DEFAULT_TENANT = '';

/** The id of a tenant, an experiment or a backend. */
export const slug = z
  .string()
  .regex(/^[a-z0-9][a-z0-9-]{0,62}$/, 'expected lower-case letters, digits and dashes, at most 63');
export const tenantId = slug;
export const ownerId = z.union([z.literal(DEFAULT_TENANT), tenantId]);
export const version = z.string().regex(/^v_[0-9a-f]{24}$/, 'expected v_ and 24 hexadecimal digits');
/** A key as a header carries it. For another one `fetch` throws an error that may show it. */
export const sentKey = z
  .string()
  .trim()
  .regex(/^[\x21-\x7e]+$/, 'expected a key: ASCII characters without spaces');
/** `abort`: after a malformed time, later checks (such as comparisons) do not run. */
export const timestamp = z.iso.datetime({ abort: true });

/*
 * Lists and pagination. Keys, tenants, mask sets, publications and experiments are listed newest first: `?limit=` is
 * the page size, `?before=` takes the `next` of the previous page, and `?q=` searches. Usage is listed by its groups,
 * and takes its `next` as `?after=`. Without these parameters the answer is the first page.
 */

const LIST_COUNT_MAX = 200;

/** The answer to a DELETE that removes an object. */
export const deletedSchema = z.object({ id: z.string(), deleted: z.literal(true) });

export const listSchema = <T extends z.ZodType>(item: T) =>
  z.object({
    object: z.literal('list'),
    data: z.array(item),
    /** Whether there is another page, and its cursor; only in lists that have pages. */
    has_more: z.boolean().optional(),
    next: z.string().nullable().optional(),
  });

/** The end of a page: the sort key of its last item, and the id that breaks ties. */
export type Cursor = { readonly at: number; readonly id: string };

const CURSOR = /^(\d{1,15})~([A-Za-z0-9._-]{1,200})$/;
export const writeCursor = ({ at, id }: Cursor): string => `${at}~${id}`;

/** A parameter of a query that is on or off. */
export const querySwitch = z
  .enum(['true', 'false'])
  .default('false')
  .transform((text) => text === 'true');

/**
 * The query of what belongs to a tenant. Unknown parameters are refused, here and in all queries: an unknown filter would be
 * ignored and show too much, and a misspelt tenant would be the default.
 */
export const tenantQuerySchema = z.strictObject({
  tenant: z.string().optional().meta({ description: 'The tenant; absent or empty: the default (no tenant)' }),
});

/** The search parameter of every list, including lists without pages. */
export const searchQuerySchema = z.strictObject({
  /** Only items with this text in their id, name or another identifying field. */
  q: z.string().min(1).max(200).optional(),
});

export const pageQuerySchema = searchQuerySchema.extend({
  limit: z.coerce.number().int().min(1).max(LIST_COUNT_MAX).default(LIST_COUNT_MAX),
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
export const tenantPageQuerySchema = pageQuerySchema.extend(tenantQuerySchema.shape);

/* Tenants. */

export const TEXTS_KEPT_DAYS_MAX = 90;

/** A limit over any 60 seconds, or over a UTC day; null: no limit. */
const budget = z.int().min(1).max(1e12).nullable();
const tenantLimits = {
  /** Model names without `:dense`; null: every model. */
  models: z.array(z.string().min(1).max(300)).min(1).max(64).nullable(),
  /** The largest share of blocks that a request's mask may skip; null: no limit. */
  sparsity_max: z.number().min(0).max(1).nullable(),
  /** The least agreement with dense that a mask set must have to go live and to route requests; null: no limit. */
  agreement_min: z.number().min(0).max(1).nullable(),
  requests_per_minute: budget,
  tokens_per_minute: budget,
  requests_per_day: budget,
  tokens_per_day: budget,
  /** Days for which prompts and answers are kept with their requests; null: not kept. */
  texts_kept_days: z.int().min(1).max(TEXTS_KEPT_DAYS_MAX).nullable(),
};
const tenantFields = {
  name: z.string().min(1).max(200),
  /** Which text of a conversation's opening is embedded. */
  routing_policy: z.enum(ROUTING_POLICIES),
  /** A disabled tenant's keys are refused. */
  enabled: z.boolean(),
  ...tenantLimits,
};

/** What a stored tenant's requests must keep to. */
export const tenantLimitsSchema = z.object(tenantLimits);
export type TenantLimits = z.infer<typeof tenantLimitsSchema>;

/** The limits, where this version of the edge cannot read all of them: null stands for those that it cannot read. */
export const readableLimits = (stored: { readonly [Name in keyof TenantLimits]: unknown }): TenantLimits =>
  Object.fromEntries(
    Object.entries(tenantLimits).map(([name, limit]) => [
      name,
      limit.safeParse(stored[name as keyof TenantLimits]).data ?? null,
    ]),
  ) as TenantLimits;

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
  .refine((change) => Object.keys(change).length > 0, 'names nothing to change')
  .meta({ minProperties: 1 });
export type TenantChange = z.infer<typeof updateTenantSchema>;
export const OWN_TENANT_FIELDS: readonly string[] = ['name', 'routing_policy', 'texts_kept_days'];

/**
 * Ways in which the live mask set violates the tenant's limits: the error codes with which publishing it now would be
 * refused.
 */
const TENANT_WARNINGS = ['quality_below_floor', 'sparsity_over_ceiling', 'model_not_allowed'] as const;

export const tenantSchema = z.object({
  id: z.string(),
  ...tenantFields,
  /** As it is stored, which another version or a hand may have done. */
  name: z.string(),
  created_at: timestamp,
  /**
   * The routing policy as it is stored, if this version of the edge does not know it: then it routes by `routing_policy`.
   */
  unknown_policy: z.string().optional(),
  /**
   * Why this version of the edge cannot read its limits, if it cannot: another version or a hand wrote them. Then its
   * requests are refused, and the limits that cannot be read are null here. It can be changed.
   */
  unreadable: z.string().optional(),
  /** Only in the answer for a single tenant, not in lists; also absent while the live set cannot be read. */
  warnings: z.array(z.object({ code: z.enum(TENANT_WARNINGS), message: z.string() })).optional(),
});
export type Tenant = z.infer<typeof tenantSchema>;
export type TenantWarning = NonNullable<Tenant['warnings']>[number];

export const budgetUseSchema = z.object({
  unit: z.enum(['requests', 'tokens']),
  window: z.enum(['minute', 'day']),
  limit: z.int(),
  /** Used tokens or requests, settled and reserved. */
  used: z.int(),
  /** When usage is back to 0 if no further request comes. */
  resets_at: timestamp,
});
export type BudgetUse = z.infer<typeof budgetUseSchema>;

/* API keys. */

export const API_KEY_KINDS = ['tenant', 'viewer', 'tenant_admin', 'admin'] as const;
export type ApiKeyKind = (typeof API_KEY_KINDS)[number];

/** Roles of administrators. A `viewer` only reads, one tenant or all. */
export const ROLES = ['viewer', 'tenant_admin', 'admin'] as const satisfies ApiKeyKind[];
export type Role = (typeof ROLES)[number];

/** A time in the past is refused: such a key would never work, and in a rotation it would replace a working key. */
const keyEnd = timestamp.refine((time) => Date.parse(time) > Date.now(), 'is in the past').optional();

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
  /** The first characters of the key, to recognise it by. */
  prefix: z.string(),
  created_at: timestamp,
  expires_at: timestamp.nullable(),
  revoked_at: timestamp.nullable(),
  /** The id of the key that replaced it in a rotation. */
  replaced_by: z.string().nullable(),
});
export type ApiKey = z.infer<typeof apiKeySchema>;

export const createdKeySchema = apiKeySchema.extend({ key: z.string() });
export type CreatedKey = z.infer<typeof createdKeySchema>;

export const ROTATION_OVERLAP_MAX_s = 30 * 86_400;
export const rotateKeySchema = z.strictObject({
  /** How long the old key keeps working after the rotation. */
  overlap_s: z.int().min(0).max(ROTATION_OVERLAP_MAX_s).default(3600),
  /** When the new key expires; absent: never. */
  expires_at: keyEnd,
});

export const keysQuerySchema = tenantPageQuerySchema.extend({
  /** `working`: neither revoked nor expired. Absent: all. */
  state: z.enum(['working']).optional(),
});

export const endedSessionsSchema = z.object({
  /** The id of the key that opened them, or `root`. */
  actor: z.string(),
  /** Sessions that were opened before this time have ended. */
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

/** `from` and `to` are UTC days, both included. */
export const usageQuerySchema = tenantQuerySchema
  .extend({
    from: day.default(() => daysAgo(USAGE_DAYS - 1)),
    to: day.default(() => daysAgo(0)),
    group: z
      .string()
      .meta({ description: `One of ${USAGE_GROUPS.join(', ')}, or several with commas` })
      .default('day')
      .transform((text) => text.split(','))
      .pipe(z.array(z.enum(USAGE_GROUPS)).max(USAGE_GROUPS.length)),
    limit: z.coerce.number().int().min(1).max(USAGE_ROWS_MAX).default(USAGE_ROWS_MAX),
    /** The group of the previous page's last row. */
    after: z
      .string()
      .max(AFTER_CHARS_MAX)
      .meta({ description: 'The `next` of the previous page of the same query' })
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

/** Fields that the query does not group by are null. */
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
 * The dashboard's session, in addition to the admin API. Its end takes effect everywhere within 5 s.
 *
 * With the cookie the admin API accepts requests without a key. Requests that change something, including logging out,
 * must come from the page's own origin and carry the session's token in {@link CSRF_HEADER}.
 */

export const CSRF_HEADER = 'x-maskroute-csrf';

/**
 * Header of the 204 of `GET /dashboard/session`: the OpenID Connect provider of `GET /dashboard/sign-in`, if one is
 * configured.
 */
export const SIGN_IN_HEADER = 'x-maskroute-sign-in';

export const logoutQuerySchema = z.strictObject({ everywhere: z.enum(['true']).optional() });

export const loginSchema = z.strictObject({ key: z.string().min(1).max(512) });

export const sessionSchema = z.object({
  /** The id of the key that logged in, or `root`. */
  actor: z.string(),
  /** As `actor`; for a key that was made in a rotation the id of the first of them, so that it stays the same. */
  person: z.string(),
  /** The only tenant that the session sees; null when it manages all tenants. */
  tenant: z.string().nullable(),
  role: z.enum(ROLES),
  csrf: z.string(),
  expires_at: z.iso.datetime(),
});
export type Session = z.infer<typeof sessionSchema>;

/*
 * The audit log of administrators' changes. A tenant's own administrator sees only that tenant's changes. Entries are
 * kept for `AUDIT_KEPT_DAYS` of the edge's configuration.
 */

export const auditEntrySchema = z.object({
  id: z.int(),
  created_at: timestamp,
  /** The tenant that was changed; empty for changes to the whole edge. */
  tenant: z.string(),
  /** The id of the key, `root`, or the name of the signed-in person. */
  actor: z.string(),
  /** The client's IP address; null where no trusted proxy reports it, as on one machine. */
  address: z.string().nullable(),
  /** Method and route: `PATCH /tenants/:id`. */
  action: z.string(),
  /** The changed object: `/tenants/acme`. */
  target: z.string(),
  /**
   * State before the change; null if there was none or it is unknown. Never contains keys, only what their lists show.
   */
  before: z.unknown().nullable(),
  /** State after the change; null if nothing is left or the outcome is unknown (see `is_known`). */
  after: z.unknown().nullable(),
  /** False: the edge stopped or failed before it recorded the outcome. */
  is_known: z.boolean(),
  request_id: z.string(),
});
export type AuditEntry = z.infer<typeof auditEntrySchema>;
