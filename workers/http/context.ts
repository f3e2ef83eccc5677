/** Middleware of every request: its id, the services of its isolate, tracing, CORS, and turning errors into answers. */
import type { Context, Hono, MiddlewareHandler } from 'hono';
import { cors } from 'hono/cors';
import { createMiddleware } from 'hono/factory';
import { routePath } from 'hono/route';
import type { ContentfulStatusCode } from 'hono/utils/http-status';
import type { Role } from '../../shared/admin/admin-wire.ts';
import { COMPLETION_HEADERS } from '../../shared/wire/backend-load.ts';
import {
  type MaskrouteError,
  toMaskrouteError,
  USELESS_TO_RETRY,
  unrouted,
} from '../../shared/wire/errors.ts';
import { HEADERS, REQUEST_ID_PATTERN } from '../../shared/wire/protocol.ts';
import { log, type RequestTrace, reasonOf } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import type { Env } from '../env.ts';
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
    /** State before the change, as the API shows it; for the audit log. */
    before: unknown;
    /** The tenant whose object is changed, if the answer does not name it; for the audit log. */
    changedTenant: string | undefined;
    /** The request's trace, until its account takes it over. */
    trace: RequestTrace | undefined;
  };
};
export type AppContext = Context<AppEnv>;

/** `tenant`: the only tenant that the caller may see and change; undefined: all tenants. */
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

/* Services, tracing and CORS. */

/** Sets the isolate's services; a misconfigured worker answers every request with 503. */
export const services = createMiddleware<AppEnv>(async (c, next) => {
  c.set('services', servicesFor(c.env));
  await next();
});

/** Starts a span for the request. Its account ends the span; without an account it ends here, with the answer. */
export const traced = createMiddleware<AppEnv>(async (c, next) => {
  const { traces } = c.get('services');
  const trace = traces.begin((name) => c.req.header(name), routePath(c), c.get('requestId'));
  c.set('trace', trace);
  await next();
  if (!trace.isRecorded || c.get('trace') === undefined) return;
  const code = c.error === undefined ? null : toMaskrouteError(c.error).code;
  holdOf(c)(trace.end({ name: undefined, status: c.res.status, code, attributes: {}, at_ms: Date.now() }));
});

/**
 * CORS for the origins in `ALLOWED_ORIGINS`. These endpoints authenticate only by a key in a header, so cookies are not
 * allowed; any header is, since OpenAI's clients add some to every request.
 */
export const browsers: MiddlewareHandler<AppEnv> = (c, next) => {
  const origins = c.get('services').config.ALLOWED_ORIGINS;
  if (origins.length === 0) return next();
  return cors({
    origin: origins.includes('*') ? '*' : origins,
    allowMethods: ['GET', 'POST'],
    exposeHeaders: EXPOSED_HEADERS,
    maxAge: PREFLIGHT_KEPT_s,
  })(c, next);
};

const EXPOSED_HEADERS = [...COMPLETION_HEADERS, 'retry-after', 'x-should-retry'];

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
 * Adds the id to every answer. Completions are routed before it and add the id themselves: they build their headers
 * once, and setting a header before the answer makes the runtime allocate an extra header object.
 */
export const requestIdHeader = createMiddleware<AppEnv>(async (c, next) => {
  tellRequestId(c);
  await next();
});

const tellRequestId = (c: AppContext): void => c.header(HEADERS.requestId, c.get('requestId'));

/* Errors. Details of unexpected errors are only logged. */

export function onError(thrown: unknown, c: AppContext): Response {
  const error = toMaskrouteError(thrown);
  tellRequestId(c);
  if (error.status >= 500) {
    log('error', 'request_failed', {
      request_id: c.get('requestId'),
      path: c.req.path,
      code: error.code,
      reason: reasonOf(error),
      // A stack trace is needed only for bugs.
      ...(error.code === 'internal_error' ? { stack: (error.cause as Error | undefined)?.stack } : {}),
    });
  }
  if (error.retryAfter_s !== undefined) c.header('retry-after', String(error.retryAfter_s));
  if (isHopeless(error)) c.header('x-should-retry', 'false');
  return c.json(error.toWire(), error.status as ContentfulStatusCode);
}

/** Whether a retry cannot help, or only much later. */
const isHopeless = ({ code, retryAfter_s = Number.POSITIVE_INFINITY }: MaskrouteError): boolean =>
  USELESS_TO_RETRY.includes(code) || (code === 'budget_exceeded' && retryAfter_s > RETRIED_AFTER_MAX_s);

/** Handles requests without a route. */
export const onNotFound =
  (app: Hono<AppEnv>) =>
  (c: AppContext): Response => {
    tellRequestId(c);
    const { error, allowed } = unrouted(app, c.req);
    if (allowed.length > 0) c.header('allow', allowed.join(', '));
    return c.json(error.toWire(), error.status as ContentfulStatusCode);
  };
