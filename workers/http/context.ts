/** What Hono carries through a request. */
import type { Context, MiddlewareHandler } from 'hono';
import { cors } from 'hono/cors';
import { createMiddleware } from 'hono/factory';
import type { Role } from '../../shared/admin/admin-wire.ts';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { toMaskrouteError } from '../../shared/wire/errors.ts';
import { HEADERS } from '../../shared/wire/protocol.ts';
import type { RequestTrace } from '../base/tracing.ts';
import type { Hold } from '../base/waiting.ts';
import type { Config, Env } from '../env.ts';
import { PREFLIGHT_KEPT_s } from '../limits.ts';
import { type Services, servicesFor } from '../services.ts';
import type { Caller } from '../tenants/api-keys.ts';

export type AppEnv = {
  Bindings: Env;
  Variables: {
    requestId: string;
    services: Services;
    caller: Caller;
    admin: AdminCaller;
    /** Of what is about to be changed, as it is shown; for the audit log. */
    before: unknown;
    /** Until its account has it. */
    trace: RequestTrace | undefined;
  };
};
export type AppContext = Context<AppEnv>;

/** `tenant` limits what the caller sees and changes; undefined for those who manage everything. */
export type AdminCaller = {
  readonly actor: string;
  readonly tenant: string | undefined;
  readonly role: Role;
};

/** Keeps work alive after the answer. */
export const holdOf =
  (c: AppContext): Hold =>
  (work) =>
    c.executionCtx.waitUntil(work);

/* What every request gets: the isolate's services, and what its browser has to be told before it gets anything. */

/** A worker that is not configured answers 503, never half-works. */
export const services = createMiddleware<AppEnv>(async (c, next) => {
  c.set('services', servicesFor(c.env));
  await next();
});

/** A span for the request. Its account ends it; of a request that gets none, what the client is told ends it here. */
export const traced = createMiddleware<AppEnv>(async (c, next) => {
  const { traces } = c.get('services');
  const trace = traces.begin((name) => c.req.header(name), c.req.path, c.get('requestId'));
  c.set('trace', trace);
  await next();
  if (!trace.isRecorded || c.get('trace') === undefined) return;
  const code = c.error === undefined ? null : toMaskrouteError(c.error).code;
  holdOf(c)(trace.end({ name: undefined, status: c.res.status, code, attributes: {}, at_ms: Date.now() }));
});

/**
 * Lets pages of other origins call, where `ALLOWED_ORIGINS` names them. A key in a header is all that lets anybody in
 * here, so no cookie ever comes along, and any header may: clients of OpenAI's kind add some to every request.
 */
export const browsers: MiddlewareHandler<AppEnv> = (c, next) => {
  const { config } = c.get('services');
  return config.ALLOWED_ORIGINS.length === 0 ? next() : corsOf(config)(c, next);
};

const made = new WeakMap<Config, MiddlewareHandler<AppEnv>>();

function corsOf(config: Config): MiddlewareHandler<AppEnv> {
  const known = made.get(config);
  if (known !== undefined) return known;
  const origins = config.ALLOWED_ORIGINS;
  const handler = cors({
    origin: origins.includes('*') ? '*' : origins,
    allowMethods: ['GET', 'POST'],
    exposeHeaders: [
      ...Object.values(HEADERS),
      BACKEND_HEADERS.backend,
      BACKEND_HEADERS.affinity,
      ...ABOUT_LIMITS,
    ],
    maxAge: PREFLIGHT_KEPT_s,
  });
  made.set(config, handler);
  return handler;
}

const ABOUT_LIMITS = [
  ...['retry-after', 'x-should-retry'],
  ...['requests', 'tokens'].flatMap((unit) =>
    ['limit', 'remaining', 'reset'].map((what) => `x-ratelimit-${what}-${unit}`),
  ),
];
