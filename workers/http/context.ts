/** What every request has: an id, the services of its isolate, what Hono carries through it, and how an error becomes its answer. */
import type { Context, Hono, MiddlewareHandler } from 'hono';
import { cors } from 'hono/cors';
import { createMiddleware } from 'hono/factory';
import type { ContentfulStatusCode } from 'hono/utils/http-status';
import type { Role } from '../../shared/admin/admin-wire.ts';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import { HEADERS, REQUEST_ID_PATTERN } from '../../shared/wire/protocol.ts';
import { log, type RequestTrace, reasonOf } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import type { Config, Env } from '../env.ts';
import { PREFLIGHT_KEPT_s, RETRIED_AFTER_MAX_s } from '../limits.ts';
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

/** A span for the request. Its account ends it; where a request gets no account, its answer ends it here. */
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

/* The id: the client's when it is well-formed, else a new one. It names the request everywhere. */

export const requestId = createMiddleware<AppEnv>(async (c, next) => {
  const given = c.req.header(HEADERS.requestId);
  c.set(
    'requestId',
    given !== undefined && REQUEST_ID_PATTERN.test(given) ? given : `req_${crypto.randomUUID()}`,
  );
  await next();
});

/**
 * Tells the client the id with whatever `c` answers. Completions come before it and do so themselves: they make their
 * headers once, and a header that is set ahead of the answer makes the runtime keep a set of headers for it alone.
 */
export const requestIdHeader = createMiddleware<AppEnv>(async (c, next) => {
  tellRequestId(c);
  await next();
});

const tellRequestId = (c: AppContext): void => c.header(HEADERS.requestId, c.get('requestId'));

/* Errors. The log alone gets those that are not ours. */

export function onError(thrown: unknown, c: AppContext): Response {
  const error = toMaskrouteError(thrown);
  tellRequestId(c);
  if (error.status >= 500) {
    log('error', 'request_failed', {
      request_id: c.get('requestId'),
      path: c.req.path,
      code: error.code,
      reason: reasonOf(error),
      // Only a bug needs to be traced to its line.
      ...(error.code === 'internal_error' ? { stack: (error.cause as Error | undefined)?.stack } : {}),
    });
  }
  if (error.retryAfter_s !== undefined) c.header('retry-after', String(error.retryAfter_s));
  if (isHopeless(error)) c.header('x-should-retry', 'false');
  return c.json(error.toWire(), error.status as ContentfulStatusCode);
}

/**
 * OpenAI's clients ask again by themselves after 409 and 429, and sleep for as long as `retry-after` says. They must not
 * where asking again cannot help, or not today.
 */
const isHopeless = ({ code, retryAfter_s = Number.POSITIVE_INFINITY }: MaskrouteError): boolean =>
  code === 'conflict' || (code === 'budget_exceeded' && retryAfter_s > RETRIED_AFTER_MAX_s);

const METHODS = ['GET', 'POST', 'PUT', 'PATCH', 'DELETE'];

/** What takes a request of no route. Where a path has routes of other methods, the answer names these. */
export const onNotFound =
  ({ router }: Hono<AppEnv>) =>
  (c: AppContext): Response => {
    tellRequestId(c);
    const { method, path } = c.req;
    const allowed = METHODS.filter((one) => {
      const [matches] = router.match(one, path);
      return matches.some(([[, route]]) => route.method === one);
    });
    if (allowed.length === 0) {
      const error = new MaskrouteError('not_found', `There is no ${method} ${path}.`);
      return c.json(error.toWire(), 404);
    }
    c.header('allow', allowed.join(', '));
    const error = new MaskrouteError('method_not_allowed', `${path} takes ${allowed.join(', ')}.`);
    return c.json(error.toWire(), 405);
  };
