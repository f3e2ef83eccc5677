/**
 * The page: one HTML file for every path below `/dashboard` (the page itself reads the path), and the scripts and
 * styles that it loads, whose names hold their content's hash. Nothing from elsewhere may run or be asked.
 */
import { Hono } from 'hono';
import { accepts } from 'hono/accepts';
import { secureHeaders } from 'hono/secure-headers';
import { loginSchema, SIGN_IN_HEADER } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { sha256Hex } from '../base/secrets.ts';
import {
  adminOf,
  clearSessionCookie,
  noStore,
  ROOT,
  readClaims,
  readSession,
  requireOwnOrigin,
  setSessionCookie,
  toSession,
} from './authentication.ts';
import type { AppContext, AppEnv } from './context.ts';
import { methodNotAllowed, requestIdHeader } from './error-answers.ts';
import { readJson } from './request-body.ts';
import { signIn } from './sign-in.ts';

const NONE = ["'none'"];
const SELF = ["'self'"];

const headers = secureHeaders({
  contentSecurityPolicy: {
    defaultSrc: NONE,
    scriptSrc: SELF,
    styleSrc: SELF,
    connectSrc: SELF,
    // The style sheet draws its small icons as data URIs.
    imgSrc: ["'self'", 'data:'],
    baseUri: NONE,
    formAction: NONE,
    frameAncestors: NONE,
  },
  crossOriginOpenerPolicy: 'same-origin',
  crossOriginResourcePolicy: 'same-origin',
  referrerPolicy: 'no-referrer',
  xFrameOptions: 'DENY',
  permissionsPolicy: { camera: [], microphone: [], geolocation: [], payment: [] },
});

/**
 * What the build calls a file of the page: a name and its content's hash. The binding below reads a path as a browser
 * would, dots, escapes and all, and the encoder lies beside the page: no name that could lead elsewhere gets there.
 */
const BUILT_NAME = /^[A-Za-z0-9_]+-[A-Z0-9]{8}\.(js|css)$/;

const page = new Hono<AppEnv>()
  .use(headers)
  .get('/assets/*', async (c) => {
    const name = new URL(c.req.url).pathname.slice('/dashboard/assets/'.length);
    const file = BUILT_NAME.test(name) ? await asset(c, `/dashboard/assets/${name}`) : null;
    if (file === null) throw new MaskrouteError('not_found', `There is no ${c.req.path}.`);
    return deliver(c, file, 'public, max-age=31536000, immutable');
  })
  .get('*', (c) => built(c, '/dashboard/'));

async function asset(c: AppContext, path: string): Promise<Response | null> {
  // The assets binding answers by path; the host means nothing.
  const response = await c.env.ASSETS?.fetch(new URL(path, 'http://assets').href);
  if (response?.ok === true) return response;
  await response?.body?.cancel();
  return null;
}

function deliver(c: AppContext, file: Response, cacheControl: string): Response {
  c.header('content-type', file.headers.get('content-type') ?? 'application/octet-stream');
  c.header('cache-control', cacheControl);
  return c.body(file.body as ReadableStream);
}

/* What this is, for whoever finds it, and the documentation of its API: files of the same build. */

export const site = new Hono<AppEnv>()
  .use('/', headers, requestIdHeader)
  .use('/docs', headers, requestIdHeader)
  .use('/openapi.json', headers, requestIdHeader)
  .get('/', async (c) => {
    c.header('vary', 'accept');
    const wanted = accepts(c, { header: 'Accept', supports: [HTML, JSON_TYPE], default: HTML });
    return wanted === HTML ? await built(c, '/dashboard/home') : c.json(WHAT_THIS_IS);
  })
  .get('/docs', (c) => built(c, '/dashboard/docs'))
  .get('/openapi.json', (c) => built(c, '/dashboard/openapi.json'));

const [HTML, JSON_TYPE] = ['text/html', 'application/json'];
const WHAT_THIS_IS = {
  ...{ object: 'maskroute.edge', api: '/v1', admin: '/admin/v1', openapi: '/openapi.json' },
  ...{ documentation: '/docs', dashboard: '/dashboard', ready: '/readyz' },
};

async function built(c: AppContext, path: string): Promise<Response> {
  const file = await asset(c, path);
  if (file === null) {
    throw new MaskrouteError('not_found', 'The page was not built: "npm run dashboard" builds it.');
  }
  return deliver(c, file, 'no-cache');
}

/* The dashboard: its session, and the page with everything that it loads. `shared/admin/admin-wire.ts` describes it. */

export const dashboard = new Hono<AppEnv>()
  .use('/session', noStore)
  .post('/session', async (c) => {
    requireOwnOrigin(c.req.raw);
    const { key } = parse(loginSchema, await readJson(c.req.raw));
    const admin = await adminOf(c, key);
    const keySha256 = admin === ROOT ? null : sha256Hex(key);
    const { token, claims } = await c.var.services.sessions.issue(admin.actor, { keySha256, grant: null });
    setSessionCookie(c, token, claims.expiresAt_s);
    return c.json(toSession(admin, claims));
  })
  .get('/session', async (c) => {
    const { OIDC_ISSUER } = c.var.services.config;
    // Also beside a session, whose end leads back to the login.
    if (OIDC_ISSUER !== undefined) c.header(SIGN_IN_HEADER, new URL(OIDC_ISSUER).host);
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
  .route('/sign-in', signIn)
  .route('/', page);
