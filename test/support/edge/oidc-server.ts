/**
 * A real OpenID Connect provider (oidc-provider) that knows some people and asks nobody for a password: `login_hint` says who
 * somebody is, and who says nothing is the administrator. The role that they have is their name without what follows a dash.
 */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import Provider from 'oidc-provider';
import { EDGE_URL } from './constants.ts';

export const OIDC_CLIENT = { id: 'maskroute', secret: 'a-secret-of-the-tests' } as const;

export async function startOidcProvider(
  edge: string = EDGE_URL,
): Promise<{ url: string; close: () => Promise<void> }> {
  const server = createServer();
  await new Promise<void>((listening) => server.listen(0, '127.0.0.1', listening));
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const provider = new Provider(url, {
    clients: [
      {
        client_id: OIDC_CLIENT.id,
        client_secret: OIDC_CLIENT.secret,
        redirect_uris: [`${edge}/dashboard/sign-in/callback`],
        response_types: ['code'],
        grant_types: ['authorization_code'],
      },
    ],
    claims: { openid: ['sub', 'maskroute_role'] },
    conformIdTokenClaims: false,
    features: { devInteractions: { enabled: false } },
    interactions: { url: (_context, { uid }) => `/who/${uid}` },
    findAccount: (_context, accountId) => ({
      accountId,
      claims: () => ({ sub: accountId, maskroute_role: rolesOf(accountId) }),
    }),
    // Nobody is asked whether the dashboard may know who they are.
    async loadExistingGrant(context) {
      const { client, session } = context.oidc;
      const grant = new context.oidc.provider.Grant({
        clientId: client!.clientId,
        accountId: session!.accountId!,
      });
      grant.addOIDCScope('openid');
      await grant.save();
      return grant;
    },
  });
  const callback = provider.callback();
  server.on('request', async (request, response) => {
    if (!request.url!.startsWith('/who/')) return callback(request, response);
    const { params } = await provider.interactionDetails(request, response);
    await provider.interactionFinished(request, response, {
      login: { accountId: String(params.login_hint ?? 'admin') },
    });
  });
  return { url, close: () => new Promise((closed) => server.close(() => closed())) };
}

/** `viewer:acme-2` is another one with the role `viewer:acme`; `nobody` has none. */
const rolesOf = (accountId: string): string[] => (accountId === 'nobody' ? ['guest'] : ['guest', accountId]);
