/**
 * Signing in to the dashboard through OpenID Connect, beside keys: the authorization code flow with PKCE (oauth4webapi
 * does the protocol). A claim of the id token says what somebody may do; whoever has none gets no session. What has to be
 * known when they come back waits in a signed cookie of ten minutes.
 */
import { Hono } from 'hono';
import { deleteCookie, getSignedCookie, setSignedCookie } from 'hono/cookie';
import * as oauth from 'oauth4webapi';
import { z } from 'zod';
import { tenantId } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { log, reasonOf } from '../base/log.ts';
import { SIGN_IN_s } from '../limits.ts';
import type { Grant } from '../tenants/sessions.ts';
import { isSecure, noStore, setSessionCookie } from './authentication.ts';
import type { AppContext, AppEnv } from './context.ts';

const COOKIE = 'maskroute-sign-in';
const CALLBACK = '/dashboard/sign-in/callback';

export const signIn = new Hono<AppEnv>()
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
    // Lax: they come back by a link of the provider's.
    await setSignedCookie(c, COOKIE, JSON.stringify(waiting), c.var.services.config.ADMIN_KEY, {
      ...{ path: CALLBACK, httpOnly: true, sameSite: 'Lax', secure: isSecure(c), maxAge: SIGN_IN_s },
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
    if (grant === null)
      throw new MaskrouteError('forbidden', `${claims.sub} may do nothing here: no role was given.`);
    const { token, claims: session } = await sessions.issue(`oidc:${claims.sub}`, { keySha256: null, grant });
    setSessionCookie(c, token, session.expiresAt_s);
    return c.redirect('/dashboard/');
  });

const waitingSchema = z.object({ state: z.string(), nonce: z.string(), verifier: z.string() });

/** @throws MaskrouteError `invalid_session` for whatever is not as the provider says it must be. */
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
    ...{ server, options, client: { client_id: OIDC_CLIENT_ID } satisfies oauth.Client },
    auth: OIDC_CLIENT_SECRET === undefined ? oauth.None() : oauth.ClientSecretBasic(OIDC_CLIENT_SECRET),
  };
}

/** Nothing but the same machine is asked without TLS. */
const isLoopback = ({ hostname }: URL): boolean => ['localhost', '127.0.0.1', '[::1]'].includes(hostname);

const callbackOf = (c: AppContext): string => new URL(CALLBACK, c.req.url).href;

/** The first role that is one; null without any. */
function grantOf(claim: unknown): Grant | null {
  for (const role of Array.isArray(claim) ? claim : [claim]) {
    if (role === 'admin' || role === 'viewer') return { role, tenant: null };
    const [kind, tenant] = typeof role === 'string' ? role.split(':', 2) : [];
    const isOfTenant = kind === 'viewer' || kind === 'tenant_admin';
    if (isOfTenant && tenantId.safeParse(tenant).success) return { role: kind, tenant: tenant! };
  }
  return null;
}

const refused = (message: string) => new MaskrouteError('invalid_session', `${message} Sign in again.`);

function unavailable(reason: string): MaskrouteError {
  log('error', 'sign_in_unavailable', { reason });
  return new MaskrouteError('configuration_unavailable', 'The OpenID Connect provider cannot be reached.');
}
