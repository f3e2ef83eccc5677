/** A new administrator without a key: the login page's link leads through a real provider and back, in a real Chromium. */
import path from 'node:path';
import type { Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { freePort } from '../../../gpu-backend/ports.ts';
import { OIDC_CLIENT, startOidcProvider } from '../../support/edge/oidc-server.ts';
import { complaintsOf, expectAccessible, openPage, visit } from '../browser.ts';
import { dashboard } from './open.ts';

let provider: Awaited<ReturnType<typeof startOidcProvider>>;
let edge: Edge;
let page: Page;
let complaints: string[];

beforeAll(async () => {
  // Each has to know the other's address before it starts.
  const port = await freePort();
  provider = await startOidcProvider(`http://localhost:${port}`);
  edge = await startEdge({
    projectFolder: path.resolve('.'),
    stateFolder: undefined,
    port,
    bindings: {
      BACKEND_URL: 'http://127.0.0.1:9',
      BACKEND_KEY: 'b'.repeat(32),
      ADMIN_KEY: 'a'.repeat(32),
      OIDC_ISSUER: provider.url,
      OIDC_CLIENT_ID: OIDC_CLIENT.id,
      OIDC_CLIENT_SECRET: OIDC_CLIENT.secret,
    },
  });
  page = await openPage(dashboard.browser);
  complaints = complaintsOf(page);
}, 120_000);

afterAll(async () => {
  await page?.context().close();
  await edge?.close();
  await provider?.close();
}, 60_000);

test('the link signs in, a change bears the name of who made it, and logging out leads back to the link', async () => {
  await page.goto(`${edge.url}/dashboard`);
  const link = page.getByRole('link', { name: /^Sign in through 127\.0\.0\.1/ });
  await expectAccessible(page, 'the login page with a provider');
  await link.focus();
  await page.keyboard.press('Enter');
  await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
  expect(new URL(page.url()).origin).toBe(edge.url);
  expect(page.url()).not.toMatch(/code=|state=/);

  await visit(page, 'Tenants');
  await page.getByRole('button', { name: 'New tenant' }).click();
  const dialog = page.getByRole('dialog');
  // This edge's backend is away, and a tenant can be made all the same.
  await dialog.getByText('The models cannot be listed right now.').waitFor();
  await dialog.getByLabel('Id', { exact: true }).fill('signed-in');
  await dialog.getByLabel('Name', { exact: true }).fill('Made without a key');
  await dialog.getByRole('button', { name: 'Create', exact: true }).click();
  await dialog.waitFor({ state: 'detached' });
  await visit(page, 'Audit log');
  await page.getByText('oidc:admin').first().waitFor();

  await page.reload();
  await page.getByRole('heading', { level: 1, name: 'Audit log' }).waitFor();
  await page.getByRole('button', { name: 'Log out', exact: true }).click();
  await link.waitFor();
  for (const complaint of complaints) expect(complaint).toContain('503');
});
