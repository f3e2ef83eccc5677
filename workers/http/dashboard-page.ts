/**
 * Serves the dashboard and its sign-in. The page is one HTML file for every path below `/dashboard` (it reads the path
 * itself), and scripts and styles with content hashes in their names. The content security policy allows no other
 * origin.
 */
import { Hono } from 'hono';
import { accepts } from 'hono/accepts';
import { deleteCookie, getSignedCookie, setSignedCookie } from 'hono/cookie';
import { secureHeaders } from 'hono/secure-headers';
import * as oauth from 'oauth4webapi';
import { z } from 'zod';
import { loginSchema, logoutQuerySchema, SIGN_IN_HEADER, tenantId } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parse } from '../../shared/wire/parse-body.ts';
import { sha256Hex } from '../base/secrets.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { d1 } from '../db/d1.ts';
import { tenantExists } from '../db/tenant-rows.ts';
import { SIGN_IN_s } from '../limits.ts';
import type { Grant } from '../tenants/sessions.ts';
import {
  adminOf,
  clearSessionCookie,
  isSecure,
  noStore,
  ROOT,
  readClaims,
  readSession,
  requireOwnOrigin,
  setSessionCookie,
  toSession,
} from './authentication.ts';
import { type AppContext, type AppEnv, requestIdHeader } from './context.ts';
import { readJson, readQuery } from './request-body.ts';

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
 * File names of the build: a name and a content hash. The assets binding resolves paths like a browser, including dots
 * and escapes, and the encoder is stored beside the page, so no other name may reach it.
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
  // The assets binding uses only the path; the host is arbitrary.
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

/* The home page and the API documentation: files of the same build. */

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
  object: 'maskroute.edge',
  api: '/v1',
  admin: '/admin/v1',
  openapi: '/openapi.json',
  documentation: '/docs',
  dashboard: '/dashboard',
  ready: '/readyz',
};

async function built(c: AppContext, path: string): Promise<Response> {
  const file = await asset(c, path);
  if (file === null) {
    throw new MaskrouteError('not_found', 'The page was not built: "npm run dashboard" builds it.');
  }
  return deliver(c, file, 'no-cache');
}

/*
 * Sign-in with OpenID Connect, in addition to keys: the authorization code flow with PKCE (by oauth4webapi). A claim of
 * the id token gives the role; without it there is no session. The flow's state is kept in a signed cookie for ten
 * minutes.
 */

const COOKIE = 'maskroute-sign-in';
const CALLBACK = '/dashboard/sign-in/callback';

const signIn = new Hono<AppEnv>()
  .use(noStore)
  .get('/', async (c) => {
    const { server, client } = await providerOf(c);
    if (server.authorization_endpoint === undefined) throw unavailable('it has no authorization endpoint');
    const waiting = {
      state: oauth.generateRandomState(),
      nonce: oauth.generateRandomNonce(),
      verifier: oauth.generateRandomCodeVerifier(),
    };
    const to = new URL(server.authorization_endpoint);
    for (const [name, value] of Object.entries({
      client_id: client.client_id,
      redirect_uri: callbackOf(c),
      response_type: 'code',
      scope: 'openid',
      state: waiting.state,
      nonce: waiting.nonce,
      code_challenge: await oauth.calculatePKCECodeChallenge(waiting.verifier),
      code_challenge_method: 'S256',
    })) {
      to.searchParams.set(name, value);
    }
    // Lax: the provider redirects back from another site.
    await setSignedCookie(c, COOKIE, JSON.stringify(waiting), c.var.services.config.ADMIN_KEY, {
      path: CALLBACK,
      httpOnly: true,
      sameSite: 'Lax',
      secure: isSecure(c),
      maxAge: SIGN_IN_s,
    });
    return c.redirect(to.href);
  })
  .get('/callback', async (c) => {
    const { config, sessions } = c.var.services;
    const kept = await getSignedCookie(c, config.ADMIN_KEY, COOKIE);
    deleteCookie(c, COOKIE, { path: CALLBACK });
    const waiting = waitingSchema.safeParse(kept ? JSON.parse(kept) : undefined);
    if (!waiting.success) throw refused('The sign-in took too long, or began in another browser.');
    const claims = await claimsOf(c, waiting.data);
    const grant = grantOf(claims[config.OIDC_ROLE_CLAIM]);
    if (grant === null) throw new MaskrouteError('forbidden', `${claims.sub} has no role here.`);
    if (grant.tenant !== null && !(await d1(tenantExists(c.var.services.db, grant.tenant))))
      throw new MaskrouteError(
        'forbidden',
        `The role of ${claims.sub} is for ${grant.tenant}, which is not a tenant here.`,
      );
    const { token, claims: session } = await sessions.issue(`oidc:${claims.sub}`, { keySha256: null, grant });
    setSessionCookie(c, token, session.expiresAt_s);
    return c.redirect('/dashboard/');
  });

const waitingSchema = z.object({ state: z.string(), nonce: z.string(), verifier: z.string() });

/** The id token's claims. @throws MaskrouteError `invalid_session` when the provider's answer cannot be verified. */
async function claimsOf(c: AppContext, waiting: z.infer<typeof waitingSchema>): Promise<oauth.IDToken> {
  const { server, client, auth, options } = await providerOf(c);
  try {
    const answer = oauth.validateAuthResponse(server, client, new URL(c.req.url), waiting.state);
    const response = await oauth.authorizationCodeGrantRequest(
      ...([server, client, auth, answer, callbackOf(c), waiting.verifier, options] as const),
    );
    const tokens = await oauth.processAuthorizationCodeResponse(server, client, response, {
      expectedNonce: waiting.nonce,
      requireIdToken: true,
    });
    await oauth.validateApplicationLevelSignature(server, response, options);
    return oauth.getValidatedIdTokenClaims(tokens)!;
  } catch (error) {
    log('warn', 'sign_in_refused', { request_id: c.get('requestId'), reason: reasonOf(error) });
    throw refused('The provider did not confirm who you are.');
  }
}

/** @throws MaskrouteError `not_found` without a provider, `configuration_unavailable` when it cannot be reached. */
async function providerOf(c: AppContext) {
  const { OIDC_ISSUER, OIDC_CLIENT_ID, OIDC_CLIENT_SECRET } = c.get('services').config;
  if (OIDC_ISSUER === undefined || OIDC_CLIENT_ID === undefined) {
    throw new MaskrouteError('not_found', 'This edge has no OpenID Connect provider: log in with a key.');
  }
  const issuer = new URL(OIDC_ISSUER);
  const options = {
    [oauth.allowInsecureRequests]: isLoopback(issuer),
    signal: () => AbortSignal.timeout(10_000),
  };
  const server = await oauth
    .discoveryRequest(issuer, options)
    .then((response) => oauth.processDiscoveryResponse(issuer, response))
    .catch((error) => {
      throw unavailable(reasonOf(error));
    });
  return {
    server,
    options,
    client: { client_id: OIDC_CLIENT_ID } satisfies oauth.Client,
    auth: OIDC_CLIENT_SECRET === undefined ? oauth.None() : oauth.ClientSecretBasic(OIDC_CLIENT_SECRET),
  };
}

/** Only providers on the same machine are contacted without TLS. */
const isLoopback = ({ hostname }: URL): boolean => ['localhost', '127.0.0.1', '[::1]'].includes(hostname);

const callbackOf = (c: AppContext): string => new URL(CALLBACK, c.req.url).href;

/** The first valid role of the claim; null if there is none. */
function grantOf(claim: unknown): Grant | null {
  for (const role of Array.isArray(claim) ? claim : [claim]) {
    if (role === 'admin' || role === 'viewer') return { role, tenant: null };
    const [kind, ...rest] = typeof role === 'string' ? role.split(':') : [];
    const tenant = rest.join(':');
    const isOfTenant = kind === 'viewer' || kind === 'tenant_admin';
    if (isOfTenant && tenantId.safeParse(tenant).success) return { role: kind, tenant };
  }
  return null;
}

const refused = (message: string) => new MaskrouteError('invalid_session', `${message} Sign in again.`);

function unavailable(reason: string): MaskrouteError {
  log('error', 'sign_in_unavailable', { reason });
  return new MaskrouteError('configuration_unavailable', 'The OpenID Connect provider cannot be reached.');
}

/* The dashboard's session endpoints (see `shared/admin/admin-wire.ts`), and its page. */

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
    const { OIDC_ISSUER, OIDC_CLIENT_ID } = c.var.services.config;
    // Sent with a session, too, since its end leads back to the login.
    if (OIDC_ISSUER !== undefined && OIDC_CLIENT_ID !== undefined)
      c.header(SIGN_IN_HEADER, new URL(OIDC_ISSUER).host);
    const session = await readSession(c);
    // The page asks before anybody has logged in, so this is not an error.
    if (session === undefined) return c.body(null, 204);
    return c.json(toSession(session.admin, session.claims));
  })
  .delete('/session', async (c) => {
    const { sessions } = c.var.services;
    const { everywhere } = readQuery(c, logoutQuerySchema);
    if (everywhere !== undefined) {
      // An ended session must not end others.
      const session = await readSession(c);
      if (session !== undefined) await sessions.endAll(session.claims.actor);
      clearSessionCookie(c);
    } else {
      const claims = await readClaims(c);
      // The cookie is removed even if the end cannot be stored.
      clearSessionCookie(c);
      if (claims !== undefined) await sessions.end(claims);
    }
    return c.body(null, 204);
  })
  .route('/sign-in', signIn)
  .route('/', page);
