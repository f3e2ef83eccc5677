/**
 * The tables of D1. Only this folder knows columns; everything else speaks the types of `shared/` or of the
 * query files here. Times are milliseconds since the epoch. An empty owner or tenant is the default one.
 */
import { index, integer, primaryKey, real, sqliteTable, text } from 'drizzle-orm/sqlite-core';
import { API_KEY_KINDS, type AutoRollback } from '../../shared/admin.ts';
import { ROUTING_POLICIES } from '../../shared/embedding/route-text.ts';
import type { RolloutStep } from '../../shared/rollout.ts';

export const tenants = sqliteTable('tenants', {
  id: text('id').primaryKey(),
  name: text('name').notNull(),
  routingPolicy: text('routing_policy', { enum: ROUTING_POLICIES }).notNull(),
  createdAt_ms: integer('created_at_ms').notNull(),
  enabled: integer('enabled', { mode: 'boolean' }).notNull().default(true),
  /** Names of models, without `:dense`; null: all of them. */
  models: text('models', { mode: 'json' }).$type<string[]>(),
  /** The largest sparsity of a mask; null: any. */
  sparsityMax: real('sparsity_max'),
  /** Budgets; null: none. */
  requestsPerMinute: integer('requests_per_minute'),
  tokensPerMinute: integer('tokens_per_minute'),
  requestsPerDay: integer('requests_per_day'),
  tokensPerDay: integer('tokens_per_day'),
  /** The least share of tokens on which a set that goes live must agree with dense; null: any. */
  agreementMin: real('agreement_min'),
});

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
    /** The id of the key that a rotation made in its place. */
    replacedBy: text('replaced_by'),
  },
  (table) => [index('api_keys_tenant').on(table.tenantId)],
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
    owner: text('owner').notNull(),
    version: text('version').notNull(),
    replacedVersion: text('replaced_version'),
    /** The publication that a rollback of this one returns to. */
    previousId: text('previous_id'),
    action: text('action', { enum: ['activate', 'rollback'] }).notNull(),
    actor: text('actor').notNull(),
    createdAt_ms: integer('created_at_ms').notNull(),
    /** Null: at once. */
    activateAt_ms: integer('activate_at_ms'),
    /** The steps on the way to everyone; null: none. */
    rollout: text('rollout', { mode: 'json' }).$type<readonly RolloutStep[]>(),
    autoRollback: text('auto_rollback', { mode: 'json' }).$type<AutoRollback>(),
    reason: text('reason'),
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

/** One opinion a caller and completion. */
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
  (table) => [primaryKey({ columns: [table.tenantId, table.completionId, table.apiKeyId] })],
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
  regions: text('regions', { mode: 'json' }).$type<string[]>().notNull(),
  weight: real('weight').notNull(),
  enabled: integer('enabled', { mode: 'boolean' }).notNull(),
  createdAt_ms: integer('created_at_ms').notNull(),
  updatedAt_ms: integer('updated_at_ms').notNull(),
});
