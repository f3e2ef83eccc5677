/**
 * Reads on what a refused request still sends, and forgets it. The runtime closes the connection of a request
 * whose body nobody read, and a client that is still sending then sees a reset, not the refusal.
 */
import { createMiddleware } from 'hono/factory';
import type { AppEnv } from '../context.ts';
import { DRAIN_BYTES_MAX } from '../limits.ts';
import { drain } from '../services/bounded.ts';

export const unreadBody = createMiddleware<AppEnv>(async (c, next) => {
  await next();
  // Asked first: to name the body makes the runtime wrap it as a stream.
  if (c.req.raw.bodyUsed) return;
  const { body } = c.req.raw;
  if (body !== null && !body.locked) await drain(body, DRAIN_BYTES_MAX).catch(() => {});
});
