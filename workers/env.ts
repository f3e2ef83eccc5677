/**
 * The worker's bindings, variables and secrets, and the configuration parsed from them. A wrong value is found at the
 * first request, named in the log, reported by `/readyz`, and requests get `configuration_unavailable`; there are no
 * silent defaults for it.
 */
import { z } from 'zod';
import type { EdgeMessage } from '../shared/admin/requests-wire.ts';
import { collectorVariables, variablesSet } from '../shared/tracing/traces.ts';
import { MaskrouteError } from '../shared/wire/errors.ts';
import { allowedOriginsSchema } from '../shared/wire/protocol.ts';
import { FRONTS } from './base/place.ts';
import { AUDIT_KEPT_DAYS, COMPARISON_SHARE, ROUTE_SIMILARITY_MIN } from './limits.ts';
import type { TenantBudget } from './tenants/budgets.ts';

/** The part of Workers AI that computes embeddings. */
export interface TextEmbeddingBinding {
  run(model: string, inputs: Record<string, unknown>, options?: Record<string, unknown>): Promise<unknown>;
}

export interface Env extends Variables {
  readonly DB: D1Database;
  /** The encoder's files; only the worker reads them. */
  readonly ASSETS?: Pick<Fetcher, 'fetch'>;
  readonly AI?: TextEmbeddingBinding;
  readonly BUDGETS: DurableObjectNamespace<TenantBudget>;
  /** Rate limit of a tenant's requests, counted several at a time (`BURST` in limits.ts). */
  readonly TENANT_BURST?: RateLimit;
  /** Rate limit of an administrator's requests, counted likewise. */
  readonly ADMIN_BURST?: RateLimit;
  /** Rate limit of keys that an isolate does not know, by client network. */
  readonly UNKNOWN_KEY_BURST?: RateLimit;
  readonly EVENTS: Queue<EdgeMessage>;
  /** Analytics Engine: data points for dashboards outside this project. */
  readonly METRICS?: AnalyticsEngineDataset;
  /** A private network (Workers VPC) through which all backends are reached. Absent: backends have public names. */
  readonly BACKEND_NETWORK?: Pick<Fetcher, 'fetch'>;

  readonly BACKEND_URL: string;
  readonly BACKEND_KEY: string;
  readonly ADMIN_KEY: string;
}

/**
 * 24 hexadecimal digits of a random key are 96 bits, which cannot be guessed. So the admin key needs no rate limit,
 * which could lock its owner out, and the backend key cannot be found from a token that it signed.
 */
const SECRET_CHARS_MIN = 24;
const MISSING = 'it is missing';
const secret = z
  .string(MISSING)
  .min(SECRET_CHARS_MIN, `it needs ${SECRET_CHARS_MIN} characters or more; "openssl rand -hex 32" makes one`);
const baseUrl = z
  .url({ protocol: /^https?$/, error: ({ input }) => (input === undefined ? MISSING : undefined) })
  .transform((url) => url.replace(/\/+$/, ''));
const timeout_ms = (preset: number) => z.coerce.number().int().min(1).max(600_000).default(preset);

const configSchema = z.object({
  BACKEND_URL: baseUrl,
  BACKEND_KEY: secret,
  ADMIN_KEY: secret,
  /** Also accepted during a rotation; nothing is signed with these. */
  BACKEND_KEY_2: secret.optional(),
  ADMIN_KEY_2: secret.optional(),
  /** URL by which backends reach this edge. Without it they cannot fetch unknown masks, and such requests run dense. */
  EDGE_URL: baseUrl.optional(),
  /** Origins whose pages may call `/v1` (CORS); none by default. */
  ALLOWED_ORIGINS: allowedOriginsSchema.default([]),
  /** The trusted proxy in front of the worker. `none`: headers about the client's place are not trusted. */
  TRUSTED_FRONT: z.enum(FRONTS).default('none'),
  ENCODER: z.enum(['static', 'workers-ai', 'huggingface', 'backend']).default('static'),
  EMBED_TIMEOUT_MS: timeout_ms(500),
  /** Until the backend's first byte. */
  BACKEND_TIMEOUT_MS: timeout_ms(120_000),
  /**
   * A backend that sends no headers of a stream for this long is abandoned for another one, if there is another.
   * Backends send headers after some seconds even before the first token, so a longer silence is not a slow prompt.
   */
  BACKEND_SILENCE_MS: timeout_ms(15_000),
  /**
   * An answer that has begun and then sends nothing for this long is aborted. Backends send a comment every five
   * seconds while they have no token, so a longer silence is not a slow model.
   */
  BACKEND_STALL_MS: timeout_ms(30_000),
  /** Hedging: a second backend is asked when the first is silent for this long; 0: never. Work is then done twice. */
  BACKEND_HEDGE_MS: z.coerce.number().int().min(0).max(600_000).default(0),
  /** Streams that are silent for this long, also before the first token, get a keepalive comment. */
  STREAM_KEEPALIVE_MS: timeout_ms(10_000),
  /** Share of routed requests outside experiments that run again in the background, to be compared with dense. */
  COMPARISON_SHARE: z.coerce.number().min(0).max(0.2).default(COMPARISON_SHARE),
  /** Days for which the audit log is kept. */
  AUDIT_KEPT_DAYS: z.coerce.number().int().min(1).max(3_650).default(AUDIT_KEPT_DAYS),
  SIMILARITY_MIN: z.coerce.number().min(-1).max(1).default(ROUTE_SIMILARITY_MIN),
  /** OpenID Connect issuer for the dashboard's sign-in; without it people log in with keys only. */
  OIDC_ISSUER: z.url({ protocol: /^https?$/ }).optional(),
  OIDC_CLIENT_ID: z.string().optional(),
  /** The secret of a confidential client; a public client uses only PKCE. */
  OIDC_CLIENT_SECRET: z.string().optional(),
  /**
   * Claim of the id token with the role: `admin`, `viewer`, `tenant_admin:TENANT` or `viewer:TENANT`, or a list with
   * one of them.
   */
  OIDC_ROLE_CLAIM: z.string().default('maskroute_role'),
  ...collectorVariables,
  HF_TOKEN: z.string().optional(),
  HF_MODEL: z.string().default('sentence-transformers/all-MiniLM-L6-v2'),
  HF_REVISION: z.string().default('main'),
  HF_POOLING: z.enum(['mean', 'cls', 'weighted-mean']).default('mean'),
  HF_DIMENSIONS: z.coerce.number().int().min(1).max(4096).default(384),
  HF_ENDPOINT_URL: baseUrl.optional(),
});
export type Config = z.output<typeof configSchema>;

/** The variables and secrets as the platform gives them. */
type Variables = {
  readonly [Name in keyof Config]?: Config[Name] extends number ? string | number : string;
};

/**
 * @throws MaskrouteError `configuration_unavailable`; its cause names the wrong variables and the reasons, never their
 * values.
 */
export function parseConfig(env: Env): Config {
  const parsed = configSchema.safeParse(variablesSet(env));
  if (parsed.success) return parsed.data;
  const wrong = parsed.error.issues.map(({ path, message }) => `${String(path[0])}: ${message}`);
  throw new MaskrouteError('configuration_unavailable', 'The edge is not configured.', {
    cause: new Error(wrong.join('; ')),
  });
}
