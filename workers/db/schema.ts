/**
 * The tables of D1. Only this folder knows columns; all other code uses the types of `shared/` or of the query files
 * here. Times are milliseconds since the epoch. An empty owner or tenant means the default.
 */
import { index, integer, primaryKey, real, sqliteTable, text } from 'drizzle-orm/sqlite-core';
import { API_KEY_KINDS } from '../../shared/admin/admin-wire.ts';
import { LATENCY_MEASURES } from '../../shared/admin/experiment-wire.ts';
import { PUBLICATION_ACTIONS } from '../../shared/admin/publication-wire.ts';
import type { RequestSource } from '../../shared/admin/requests-wire.ts';
import { ROUTING_POLICIES } from '../../shared/embedding/encoder.ts';

export const tenants = sqliteTable('tenants', {
  id: text('id').primaryKey(),
  name: text('name').notNull(),
  routingPolicy: text('routing_policy', { enum: ROUTING_POLICIES }).notNull(),
  createdAt_ms: integer('created_at_ms').notNull(),
  enabled: integer('enabled', { mode: 'boolean' }).notNull().default(true),
  /** JSON: names of models, without `:dense`; null: all of them. */
  models: text('models'),
  /** The largest sparsity of a mask; null: any. */
  sparsityMax: real('sparsity_max'),
  /** Budgets; null: none. */
  requestsPerMinute: integer('requests_per_minute'),
  tokensPerMinute: integer('tokens_per_minute'),
  requestsPerDay: integer('requests_per_day'),
  tokensPerDay: integer('tokens_per_day'),
  /** The least share of tokens on which a set that goes live must agree with dense; null: any. */
  agreementMin: real('agreement_min'),
  /** For how many days prompts and answers are kept; null: not at all. */
  textsKept_days: integer('texts_kept_days'),
});

/** Prompts and answers of tenants that keep them, by the id of the request's event. */
export const texts = sqliteTable(
  'texts',
  {
    event: text('event').primaryKey(),
    tenant: text('tenant').notNull(),
    expiresAt_ms: integer('expires_at_ms').notNull(),
    prompt: text('prompt').notNull(),
    answer: text('answer').notNull(),
  },
  (table) => [index('texts_expires').on(table.expiresAt_ms), index('texts_tenant').on(table.tenant)],
);

/** Every administrative change: begun before it is made, completed once after it, and never changed again. */
export const auditLog = sqliteTable(
  'audit_log',
  {
    sequence: integer('sequence').primaryKey({ autoIncrement: true }),
    createdAt_ms: integer('created_at_ms').notNull(),
    /** The tenant that was changed; '' for the whole edge. */
    tenant: text('tenant').notNull(),
    actor: text('actor').notNull(),
    /** The client's IP address; '' where it is not known. */
    address: text('address').notNull(),
    action: text('action').notNull(),
    /** What was changed: its kind and its id. */
    target: text('target').notNull(),
    /** JSON; JSON `null`: there was or is nothing. The columns are empty until the entry is completed. */
    before: text('before'),
    after: text('after'),
    requestId: text('request_id').notNull(),
  },
  (table) => [
    index('audit_log_created').on(table.createdAt_ms),
    index('audit_log_tenant').on(table.tenant, table.sequence),
  ],
);

export const apiKeys = sqliteTable(
  'api_keys',
  {
    id: text('id').primaryKey(),
    kind: text('kind', { enum: API_KEY_KINDS }).notNull(),
    tenantId: text('tenant_id').references(() => tenants.id),
    name: text('name').notNull(),
    prefix: text('prefix').notNull(),
    /** Hexadecimal; the key itself is never stored. */
    sha256: text('sha256').notNull().unique(),
    createdAt_ms: integer('created_at_ms').notNull(),
    expiresAt_ms: integer('expires_at_ms'),
    revokedAt_ms: integer('revoked_at_ms'),
    /** The id of the key that replaced it in a rotation. */
    replacedBy: text('replaced_by'),
  },
  (table) => [index('api_keys_tenant').on(table.tenantId)],
);

/** Dashboard sessions that were ended early, kept for as long as they would have lasted. */
export const endedSessions = sqliteTable(
  'ended_sessions',
  {
    /** `session:` and a session's id; or `key:` and a key's id, for all sessions that the key opened until then. */
    subject: text('subject').primaryKey(),
    endedAt_ms: integer('ended_at_ms').notNull(),
  },
  (table) => [index('ended_sessions_time').on(table.endedAt_ms)],
);

/** Immutable: rows are inserted and read, never updated. The version is the hash of the content. */
export const maskSets = sqliteTable(
  'mask_sets',
  {
    owner: text('owner').notNull(),
    version: text('version').notNull(),
    name: text('name').notNull(),
    modelName: text('model_name').notNull(),
    modelHash: text('model_hash').notNull(),
    encoder: text('encoder').notNull(),
    clusterCount: integer('cluster_count').notNull(),
    reachedSparsity: real('reached_sparsity').notNull(),
    content: text('content').notNull(),
    content_bytes: integer('content_bytes').notNull(),
    createdAt_ms: integer('created_at_ms').notNull(),
  },
  (table) => [primaryKey({ columns: [table.owner, table.version] })],
);

/** The newest evaluation of a set. It is measured after the set was made, so it is not part of the set. */
export const evaluations = sqliteTable(
  'evaluations',
  {
    owner: text('owner').notNull(),
    version: text('version').notNull(),
    /** JSON of an `EvaluatedRow[]`. */
    content: text('content').notNull(),
    content_bytes: integer('content_bytes').notNull(),
    updatedAt_ms: integer('updated_at_ms').notNull(),
  },
  (table) => [primaryKey({ columns: [table.owner, table.version] })],
);

/** Content-addressed, so the same mask in many sets is one row. */
export const masks = sqliteTable('masks', {
  id: text('id').primaryKey(),
  modelHash: text('model_hash').notNull(),
  blockCount: integer('block_count').notNull(),
  bits: text('bits').notNull(),
  /** The table of surrogates; null for plain skipping. */
  surrogates: text('surrogates'),
});

/** Every change of what is live, in order. */
export const publications = sqliteTable(
  'publications',
  {
    sequence: integer('sequence').primaryKey({ autoIncrement: true }),
    id: text('id').notNull().unique(),
    tenant: text('tenant').notNull(),
    /** Who owns the mask set: the tenant or the default owner. */
    owner: text('owner').notNull(),
    version: text('version').notNull(),
    replacedVersion: text('replaced_version'),
    /** The publication to which a rollback returns. */
    previousId: text('previous_id'),
    action: text('action', { enum: PUBLICATION_ACTIONS }).notNull(),
    actor: text('actor').notNull(),
    createdAt_ms: integer('created_at_ms').notNull(),
    /** Null: at once. */
    activateAt_ms: integer('activate_at_ms'),
    /** JSON: the steps of the rollout; null: none. */
    rollout: text('rollout'),
    /** JSON of an `AutoRollback`. */
    autoRollback: text('auto_rollback'),
    reason: text('reason'),
    /** The publication whose rollout this one continues; null: its own. */
    rolloutId: text('rollout_id'),
    pausedAt_ms: integer('paused_at_ms'),
  },
  (table) => [index('publications_tenant').on(table.tenant, table.sequence)],
);

/** The pointer that a publication flips: one row a tenant. */
export const live = sqliteTable('live', {
  tenant: text('tenant').primaryKey(),
  publicationId: text('publication_id')
    .notNull()
    .references(() => publications.id),
});

/** One rating for each caller and completion. */
export const feedback = sqliteTable(
  'feedback',
  {
    tenantId: text('tenant_id').notNull(),
    apiKeyId: text('api_key_id').notNull(),
    completionId: text('completion_id').notNull(),
    rating: integer('rating').notNull(),
    comment: text('comment'),
    createdAt_ms: integer('created_at_ms').notNull(),
  },
  (table) => [
    primaryKey({ columns: [table.tenantId, table.completionId, table.apiKeyId] }),
    index('feedback_created').on(table.createdAt_ms),
  ],
);

/** An experiment is a draft until `startsAt_ms` is set; from then on only its end changes. */
export const experiments = sqliteTable(
  'experiments',
  {
    owner: text('owner').notNull(),
    /** Unique within its owner. */
    id: text('id').notNull(),
    /** JSON of an `ExperimentDefinition`. */
    definition: text('definition').notNull(),
    createdAt_ms: integer('created_at_ms').notNull(),
    startsAt_ms: integer('starts_at_ms'),
    /** Null: until it is stopped. */
    endsAt_ms: integer('ends_at_ms'),
    stoppedAt_ms: integer('stopped_at_ms'),
    /** Counts changes over all experiments, so that starting one notices whether another was started meanwhile. */
    revision: integer('revision').notNull(),
    actor: text('actor').notNull(),
  },
  (table) => [primaryKey({ columns: [table.owner, table.id] })],
);

/** What a tenant used, by UTC day. Counted from events, each once. */
export const usage = sqliteTable(
  'usage',
  {
    tenantId: text('tenant_id').notNull(),
    /** `YYYY-MM-DD`. */
    day: text('day').notNull(),
    model: text('model').notNull(),
    mask: text('mask').notNull(),
    requests: integer('requests').notNull(),
    errors: integer('errors').notNull(),
    prompt_tokens: integer('prompt_tokens').notNull(),
    completion_tokens: integer('completion_tokens').notNull(),
  },
  (table) => [primaryKey({ columns: [table.tenantId, table.day, table.model, table.mask] })],
);

/** Where requests may go. Without rows there is one backend, which `BACKEND_URL` names. */
export const backends = sqliteTable('backends', {
  id: text('id').primaryKey(),
  url: text('url').notNull(),
  /** JSON: continents, countries, data centres, or `*`. */
  regions: text('regions').notNull(),
  weight: real('weight').notNull(),
  enabled: integer('enabled', { mode: 'boolean' }).notNull(),
  createdAt_ms: integer('created_at_ms').notNull(),
  updatedAt_ms: integer('updated_at_ms').notNull(),
});

/**
 * Keys under which a request, a rating or a comparison is counted. Absent values are '' and -1, as keys cannot be null.
 */
const outcomeKeys = {
  tenant: text('tenant').notNull(),
  model: text('model').notNull(),
  version: text('version').notNull(),
  cluster: integer('cluster').notNull(),
  mask: text('mask').notNull(),
  sparsity: real('sparsity').notNull(),
  fallback: text('fallback').notNull(),
  experiment: text('experiment').notNull(),
  variant: text('variant').notNull(),
  region: text('region').notNull(),
};

/** The part of `errors` that is independent of masks: no answer, or not in time. */
const outages = () => integer('outages').notNull().default(0);

/**
 * Every counted event, kept for longer than the queue may redeliver it. `batch` names the delivery with which it came
 * first; the rows of a batch are counted, and a row belongs to one batch only.
 */
export const events = sqliteTable(
  'events',
  {
    id: text('id').primaryKey(),
    batch: text('batch').notNull(),
    createdAt_ms: integer('created_at_ms').notNull(),
    day: text('day').notNull(),
    keyId: text('key_id').notNull(),
    ...outcomeKeys,
    /** 1 for a request, 0 for a rating or a comparison. */
    requests: integer('requests').notNull(),
    /** 1 for a request that failed without the client causing it. */
    errors: integer('errors').notNull(),
    /** 1 for a request that got any error. */
    failures: integer('failures').notNull(),
    ttft_ms: real('ttft_ms'),
    tpot_ms: real('tpot_ms'),
    prompt_tokens: integer('prompt_tokens').notNull(),
    completion_tokens: integer('completion_tokens').notNull(),
    /** 1 or -1. */
    rating: integer('rating'),
    /** Share of the compared tokens that agree with the dense model, 0 to 1. */
    agreement: real('agreement'),
    /** Buckets of the times, see `shared/admin/statistics.ts`; null without a time. */
    ttft_bucket: integer('ttft_bucket'),
    tpot_bucket: integer('tpot_bucket'),
    /** The backend that answered; '' when none did. */
    backend: text('backend').notNull().default(''),
    outages: outages(),
    /** The experiment's owner; '' if it has none, or without an experiment. */
    experimentOwner: text('experiment_owner').notNull().default(''),
    /** The client's request id; '' for a rating or a comparison. */
    requestId: text('request_id').notNull().default(''),
    endpoint: text('endpoint').notNull().default(''),
    status: integer('status').notNull().default(0),
    errorCode: text('error_code').notNull().default(''),
    total_ms: real('total_ms'),
    similarity: real('similarity'),
    source: text('source').notNull().default(''),
    /** The share of a token's time that the mask saved in a comparison; null where it was not timed. */
    saved: real('saved'),
  },
  (table) => [
    index('events_batch').on(table.batch),
    index('events_created').on(table.createdAt_ms),
    index('events_tenant').on(table.tenant, table.createdAt_ms),
    index('events_request').on(table.requestId),
  ],
);

/** Sums from which means and variances follow; `_sq` are sums of squares. */
export const outcomeSums = {
  requests: integer('requests').notNull(),
  errors: integer('errors').notNull(),
  ttft_count: integer('ttft_count').notNull(),
  ttft_sum: real('ttft_sum').notNull(),
  ttft_sq: real('ttft_sq').notNull(),
  tpot_count: integer('tpot_count').notNull(),
  tpot_sum: real('tpot_sum').notNull(),
  tpot_sq: real('tpot_sq').notNull(),
  prompt_tokens: integer('prompt_tokens').notNull(),
  completion_tokens: integer('completion_tokens').notNull(),
  completion_tokens_sq: real('completion_tokens_sq').notNull(),
  ratings: integer('ratings').notNull(),
  ratings_up: integer('ratings_up').notNull(),
  agreement_count: integer('agreement_count').notNull(),
  agreement_sum: real('agreement_sum').notNull(),
  agreement_sq: real('agreement_sq').notNull(),
};

/** The experiment of requests that take part in none. */
export const NO_EXPERIMENT = 'none';
/** A source of events, and the variant of its requests in `outcomes`: they take part in no experiment. */
export const PLAYGROUND: RequestSource = 'playground';

/** Outcomes by minute, for charts over time and automatic rollback. */
export const outcomes = sqliteTable(
  'outcomes',
  {
    minute: integer('minute').notNull(),
    ...outcomeKeys,
    ...outcomeSums,
    outages: outages(),
    saved_count: integer('saved_count').notNull().default(0),
    saved_sum: real('saved_sum').notNull().default(0),
    saved_sq: real('saved_sq').notNull().default(0),
  },
  (table) => [
    primaryKey({
      columns: [
        table.minute,
        ...[table.tenant, table.model, table.version, table.cluster, table.mask, table.sparsity],
        ...[table.fallback, table.experiment, table.variant, table.region],
      ],
    }),
    index('outcomes_version').on(table.version, table.minute),
    index('outcomes_tenant').on(table.tenant, table.minute),
  ],
);

/** Outcomes of an experiment's variants, since its start. */
export const variantOutcomes = sqliteTable(
  'variant_outcomes',
  {
    experimentOwner: text('experiment_owner').notNull(),
    experiment: text('experiment').notNull(),
    variant: text('variant').notNull(),
    region: text('region').notNull(),
    ...outcomeSums,
  },
  (table) => [
    primaryKey({ columns: [table.experimentOwner, table.experiment, table.variant, table.region] }),
  ],
);

/** One row for each non-empty bucket of `shared/admin/statistics.ts`. */
const bucketCounts = {
  measure: text('measure', { enum: LATENCY_MEASURES }).notNull(),
  bucket: integer('bucket').notNull(),
  count: integer('count').notNull(),
};

/** Latencies by minute, for quantiles, which cannot be computed from sums. */
export const latencies = sqliteTable(
  'latencies',
  {
    minute: integer('minute').notNull(),
    tenant: outcomeKeys.tenant,
    version: outcomeKeys.version,
    sparsity: outcomeKeys.sparsity,
    ...bucketCounts,
  },
  ({ minute, tenant, version, sparsity, measure, bucket }) => [
    primaryKey({ columns: [minute, tenant, version, sparsity, measure, bucket] }),
  ],
);

/** Latencies of an experiment's variants, since its start. */
export const variantLatencies = sqliteTable(
  'variant_latencies',
  {
    experimentOwner: text('experiment_owner').notNull(),
    experiment: outcomeKeys.experiment,
    variant: outcomeKeys.variant,
    region: outcomeKeys.region,
    ...bucketCounts,
  },
  ({ experimentOwner, experiment, variant, region, measure, bucket }) => [
    primaryKey({ columns: [experimentOwner, experiment, variant, region, measure, bucket] }),
  ],
);

/**
 * Latencies by backend, over all tenants. `minute` is the first of ten. So the number of rows depends on backends and
 * time, not on tenants and versions, which may be many.
 */
export const backendLatencies = sqliteTable(
  'backend_latencies',
  { minute: integer('minute').notNull(), backend: text('backend').notNull(), ...bucketCounts },
  ({ minute, backend, measure, bucket }) => [primaryKey({ columns: [minute, backend, measure, bucket] })],
);

/**
 * Samples of recent requests' positions, for the dashboard's map: no text and no vector, only the distance to each
 * centroid.
 */
export const trafficSamples = sqliteTable(
  'traffic_samples',
  {
    id: integer('id').primaryKey({ autoIncrement: true }),
    tenant: text('tenant').notNull(),
    version: text('version').notNull(),
    cluster: integer('cluster').notNull(),
    /** A JSON array, by cluster. */
    distances: text('distances').notNull(),
    createdAt_ms: integer('created_at_ms').notNull(),
  },
  (table) => [
    index('traffic_samples_tenant').on(table.tenant, table.id),
    index('traffic_samples_version').on(table.version, table.id),
  ],
);
