/** Every request has an id: the client's when it is well-formed, else a new one. It names the request everywhere. */
import { createMiddleware } from 'hono/factory';
import { HEADERS, REQUEST_ID_PATTERN } from '../../shared/protocol.ts';
import type { AppContext, AppEnv } from '../context.ts';

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
 * headers once, and one that is set ahead of the answer makes the runtime keep a set of headers for it alone.
 */
export const requestIdHeader = createMiddleware<AppEnv>(async (c, next) => {
  tellRequestId(c);
  await next();
});

export const tellRequestId = (c: AppContext): void => c.header(HEADERS.requestId, c.get('requestId'));
