/** Every request has an id: the client's when it is well-formed, else a new one. It names the request everywhere. */
import { createMiddleware } from 'hono/factory';
import { HEADERS, REQUEST_ID_PATTERN } from '../../shared/protocol.ts';
import type { AppEnv } from '../context.ts';

export const requestId = createMiddleware<AppEnv>(async (c, next) => {
  const given = c.req.header(HEADERS.requestId);
  const id = given !== undefined && REQUEST_ID_PATTERN.test(given) ? given : `req_${crypto.randomUUID()}`;
  c.set('requestId', id);
  c.header(HEADERS.requestId, id);
  await next();
});
