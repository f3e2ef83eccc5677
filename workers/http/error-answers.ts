/** The boundary where thrown values become the OpenAI error object. What is not ours is told to the log alone. */
import { createMiddleware } from 'hono/factory';
import type { ContentfulStatusCode } from 'hono/utils/http-status';
import { MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import { HEADERS, REQUEST_ID_PATTERN } from '../../shared/wire/protocol.ts';
import { log, reasonOf } from '../base/log.ts';
import { RETRIED_AFTER_MAX_s } from '../limits.ts';
import type { AppContext, AppEnv } from './context.ts';

/* Every request has an id: the client's when it is well-formed, else a new one. It names the request everywhere. */

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
 * OpenAI's clients ask again by themselves after 409 and 429, and sleep for as long as `retry-after` says: what will
 * never be otherwise, or not today, is told to the caller instead.
 */
const isHopeless = ({ code, retryAfter_s = Number.POSITIVE_INFINITY }: MaskrouteError): boolean =>
  code === 'conflict' || (code === 'budget_exceeded' && retryAfter_s > RETRIED_AFTER_MAX_s);

export function onNotFound(c: AppContext): Response {
  const error = new MaskrouteError('not_found', `There is no ${c.req.method} ${c.req.path}.`);
  return c.json(error.toWire(), 404);
}

/** For a known path asked with another method. */
export const methodNotAllowed =
  (...allowed: string[]) =>
  (c: AppContext): Response => {
    tellRequestId(c);
    c.header('allow', allowed.join(', '));
    const error = new MaskrouteError('method_not_allowed', `${c.req.path} takes ${allowed.join(', ')}.`);
    return c.json(error.toWire(), 405);
  };
