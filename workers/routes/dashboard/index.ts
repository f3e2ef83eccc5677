/** The dashboard: its session, and the page with everything that it loads. `shared/dashboard.ts` describes it. */
import { Hono } from 'hono';
import { loginSchema } from '../../../shared/dashboard.ts';
import type { AppEnv } from '../../context.ts';
import { adminOf } from '../../middleware/authenticate.ts';
import { parse, readJson } from '../../middleware/body.ts';
import { methodNotAllowed } from '../../middleware/errors.ts';
import {
  clearSessionCookie,
  noStore,
  ROOT,
  readClaims,
  readSession,
  setSessionCookie,
  toSession,
} from '../../middleware/session.ts';
import { sha256Hex } from '../../services/secrets.ts';
import { requireOwnOrigin } from '../../services/sessions.ts';
import { page } from './page.ts';

export const dashboard = new Hono<AppEnv>()
  .use('/session', noStore)
  .post('/session', async (c) => {
    requireOwnOrigin(c.req.raw);
    const { key } = parse(loginSchema, await readJson(c.req.raw));
    const admin = await adminOf(c, key);
    const keySha256 = admin === ROOT ? null : sha256Hex(key);
    const { token, claims } = await c.var.services.sessions.issue(admin.actor, keySha256);
    setSessionCookie(c, token, claims.expiresAt_s);
    return c.json(toSession(admin, claims));
  })
  .get('/session', async (c) => {
    const session = await readSession(c);
    // Asked by the page before anybody logged in: no error, there is just nobody.
    if (session === undefined) return c.body(null, 204);
    return c.json(toSession(session.admin, session.claims));
  })
  .delete('/session', async (c) => {
    const { sessions } = c.var.services;
    if (c.req.query('everywhere') === 'true') {
      // One that has ended must not end others.
      const session = await readSession(c);
      if (session !== undefined) await sessions.endAll(session.claims.actor);
      clearSessionCookie(c);
    } else {
      const claims = await readClaims(c);
      // The browser lets go of it even when the end cannot be written down.
      clearSessionCookie(c);
      if (claims !== undefined) await sessions.end(claims);
    }
    return c.body(null, 204);
  })
  .all('/session', methodNotAllowed('GET', 'POST', 'DELETE'))
  .route('/', page);
