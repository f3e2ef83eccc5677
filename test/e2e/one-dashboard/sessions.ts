/** Logging in and out where no other test is, and at last everywhere. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Browser, BrowserContext, Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { AdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import {
  createdKeySchema,
  endedSessionsSchema,
  listSchema,
  tenantSchema,
} from '../../../shared/admin/admin-wire.ts';
import { comeBack, complaintsOf, expectAccessible, logIn, openPage, visit } from '../browser.ts';
import type { Started } from '../product.ts';
import { dashboard } from './open.ts';

let product: Started;
let client: AdminClient;
let browser: Browser;
let context: BrowserContext;
let page: Page;
let complaints: string[];
beforeAll(async () => {
  ({ product, client, browser } = dashboard);
  page = await openPage(browser);
  context = page.context();
  complaints = complaintsOf(page);
});
afterAll(() => context.close());

describe('the login', () => {
  test('refuses a wrong key with the reason, then opens, and keeps no key in the browser', async () => {
    await page.goto(`${product.dev.edge}/dashboard/keys`);
    await page.getByLabel('Admin key').fill('a-key-that-is-none');
    await page.getByRole('button', { name: 'Log in' }).click();
    await page.getByRole('alert').getByText('invalid_api_key').waitFor();
    // The browser tells of the refusal in its console.
    expect(complaints.splice(0)).toEqual([expect.stringContaining('401')]);
    await expectAccessible(page, 'the login');

    await logIn(page, product.dev.edge, product.dev.adminKey);
    const stored = await page.evaluate<string>(
      'JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie, location.href])',
    );
    expect(stored).not.toContain('session');
    expect(stored).not.toContain(product.dev.adminKey);
    const [cookie] = await context.cookies();
    expect(cookie).toMatchObject({ httpOnly: true, sameSite: 'Strict' });
    await page.reload();
    await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
  });

  test('a session that cannot be checked right now goes on at "Try again"', async () => {
    const body = {
      error: { message: 'Sessions cannot be checked right now.', code: 'configuration_unavailable' },
    };
    await page.route('**/dashboard/session', (route) => route.fulfill({ status: 503, json: body }));
    await page.reload();
    await page.getByRole('alert').getByText('Sessions cannot be checked right now.').waitFor();
    await page.unroute('**/dashboard/session');
    await page.getByRole('button', { name: 'Try again' }).click();
    await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
    expect(complaints.splice(0)).toEqual([expect.stringContaining('503')]);
  });

  test('does not help a page on another port of this machine, to which the browser gives the cookie', async () => {
    const target = `${product.dev.edge}/admin/v1/tenants`;
    const attack = `fetch(${JSON.stringify(target)}, { method: 'POST', mode: 'no-cors', credentials: 'include',
      body: JSON.stringify({ id: 'stolen', name: 'stolen' }) }).then(() => { document.title = 'sent'; })`;
    const server = createServer((_request, response) => {
      response.setHeader('content-type', 'text/html').end(`<title>.</title><script>${attack}</script>`);
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const evil = await context.newPage();
    const answered = evil.waitForResponse((response) => response.url() === target);
    await evil.goto(`http://localhost:${(server.address() as AddressInfo).port}`);
    // Without the cookie it would be 401: SameSite does not hold it back, since a port is no site.
    expect((await answered).status()).toBe(403);
    await evil.waitForFunction("document.title === 'sent'");
    await evil.close();
    server.close();
    const { data } = await client.request({ method: 'GET', path: '/tenants' }, listSchema(tenantSchema));
    expect(data.map(({ id }) => id)).not.toContain('stolen');
  });
});

test('logging out ends it, also for who copied its cookie', async () => {
  const ask = async ([cookie]: Awaited<ReturnType<typeof context.cookies>>) => {
    const headers = { cookie: `${cookie!.name}=${cookie!.value}` };
    return (await fetch(`${product.dev.edge}/admin/v1/tenants`, { headers })).status;
  };
  const copied = await context.cookies();
  expect(await ask(copied)).toBe(200);
  await page.getByRole('button', { name: 'Log out', exact: true }).click();
  await page.getByLabel('Admin key').waitFor();
  expect(await context.cookies()).toEqual([]);
  expect(await ask(copied)).toBe(401);
});

test('a second tab that logs in anew keeps the first one working, and ends it when it is somebody else', async () => {
  const { edge, adminKey } = product.dev;
  await logIn(page, edge, adminKey);
  const second = await context.newPage();
  // A tab in the background draws a frame every two seconds, and a click waits for one.
  const logInAgain = async (key: string) => {
    await second.bringToFront();
    await second.goto(`${edge}/dashboard`);
    await second.getByRole('button', { name: 'Log out', exact: true }).click();
    await second.getByLabel('Admin key').fill(key);
    await second.getByRole('button', { name: 'Log in' }).click();
    await second.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
  };
  const nameTenant = async (id: string) => {
    await page.bringToFront();
    await visit(page, 'Tenants');
    await page.getByRole('button', { name: 'New tenant' }).click();
    await page.getByRole('dialog').getByLabel('Id', { exact: true }).fill(id);
    await page.getByRole('dialog').getByLabel('Name', { exact: true }).fill(id);
    await page.getByRole('dialog').getByRole('button', { name: 'Create' }).click();
  };
  await logInAgain(adminKey);
  await nameTenant('of-two-tabs');
  await page.getByRole('cell', { name: 'of-two-tabs' }).first().waitFor();

  const body = { kind: 'viewer', tenant: 'of-two-tabs', name: 'looks' };
  const { key } = await client.request({ method: 'POST', path: '/keys', body }, createdKeySchema);
  await logInAgain(key);
  await second.goto(`${edge}/dashboard/keys`);
  await second.getByRole('row', { name: 'looks' }).getByText('works').waitFor();
  await second.getByRole('banner').getByText('reads only').waitFor();
  await second.goto(`${edge}/dashboard/playground`);
  await second.getByText('This page is not for viewers.').waitFor();
  await second.goto(`${edge}/dashboard/backends`);
  await second.getByText('This page is for administrators of all tenants.').waitFor();
  await nameTenant('of-nobody');
  await page.getByRole('status').getByText('Somebody else has logged in in this browser.').waitFor();
  await second.bringToFront();
  await second.getByRole('button', { name: 'Log out', exact: true }).click();
  await second.getByLabel('Admin key').waitFor();
  await second.close();
  // The browser tells of the refusals in its console.
  for (const complaint of complaints.splice(0)) expect(complaint).toContain('403');
});

test('a form that is filled in stays when its session ends, and goes on after the login', async () => {
  const { edge, adminKey } = product.dev;
  await logIn(page, edge, adminKey);
  await visit(page, 'Tenants');
  const form = page.getByRole('dialog', { name: 'New tenant' });
  const again = page.getByRole('dialog', { name: 'Log in again' });
  const fill = async (id: string) => {
    await page.getByRole('button', { name: 'New tenant' }).click();
    await form.getByLabel('Id', { exact: true }).fill(id);
    await form.getByLabel('Name', { exact: true }).fill('שוכר of long work');
  };
  const endSessions = () => client.request({ method: 'DELETE', path: '/sessions' }, endedSessionsSchema);
  await fill('typed-before');
  await endSessions();
  await form.getByRole('button', { name: 'Create' }).click();
  await again.getByRole('status').getByText('The session has ended.').waitFor();
  await expectAccessible(page, 'the login in front of a form');
  // Escape does not reach the form, and a wrong key changes nothing.
  await page.keyboard.press('Escape');
  await again.getByLabel('Admin key').fill('a-key-that-is-none');
  await again.getByRole('button', { name: 'Log in' }).click();
  await again.getByRole('alert').getByText('invalid_api_key').waitFor();
  await again.getByRole('button', { name: 'Go on here' }).click();
  await again.getByText('No tab of this browser has logged in.').waitFor();
  await again.getByLabel('Admin key').fill(adminKey);
  await again.getByRole('button', { name: 'Log in' }).click();
  // What was sent without a session is sent again.
  await page.getByRole('cell', { name: 'typed-before' }).first().waitFor();
  expect(await page.getByRole('dialog').count()).toBe(0);

  // In the background, and another tab logs in.
  await fill('typed-again');
  await endSessions();
  await comeBack(page);
  await again.waitFor();
  const [second] = await Promise.all([
    context.waitForEvent('page'),
    again.getByRole('link', { name: 'in another tab' }).click(),
  ]);
  await logIn(second, edge, adminKey);
  await second.close();
  await again.getByRole('button', { name: 'Go on here' }).click();
  await again.waitFor({ state: 'detached' });
  expect(await form.getByLabel('Id', { exact: true }).inputValue()).toBe('typed-again');
  await form.getByRole('button', { name: 'Create' }).click();
  await page.getByRole('cell', { name: 'typed-again' }).first().waitFor();

  // Somebody else meets nothing of it.
  const body = { kind: 'viewer', name: 'looks at all' };
  const { key } = await client.request({ method: 'POST', path: '/keys', body }, createdKeySchema);
  await fill('typed-by-another');
  await endSessions();
  await comeBack(page);
  await again.getByLabel('Admin key').fill(key);
  await again.getByRole('button', { name: 'Log in' }).click();
  await again.waitFor({ state: 'detached' });
  await page.getByRole('heading', { level: 1, name: 'Tenants' }).waitFor();
  expect(await page.getByRole('dialog').count()).toBe(0);
  expect(await page.getByRole('button', { name: 'New tenant' }).count()).toBe(0);
  await page.getByRole('button', { name: 'Log out', exact: true }).click();
  await page.getByLabel('Admin key').waitFor();
  for (const complaint of complaints.splice(0)) expect(complaint).toContain('401');
});

test('a form stays when its key was rotated, and goes on with the new key', async () => {
  const body = { kind: 'admin', name: 'rotated while typing' };
  const old = await client.request({ method: 'POST', path: '/keys', body }, createdKeySchema);
  await logIn(page, product.dev.edge, old.key);
  await visit(page, 'Tenants');
  await page.getByRole('button', { name: 'New tenant' }).click();
  const form = page.getByRole('dialog', { name: 'New tenant' });
  await form.getByLabel('Id', { exact: true }).fill('typed-over-a-rotation');
  await form.getByLabel('Name', { exact: true }).fill('Typed');
  await page.getByRole('banner').getByText(`Logged in as ${old.id}`).waitFor();
  const path = `/keys/${old.id}/rotate`;
  const { key } = await client.request({ method: 'POST', path, body: { overlap_s: 0 } }, createdKeySchema);
  await form.getByRole('button', { name: 'Create' }).click();
  const again = page.getByRole('dialog', { name: 'Log in again' });
  await again.getByLabel('Admin key').fill(key);
  await again.getByRole('button', { name: 'Log in' }).click();
  await page.getByRole('cell', { name: 'typed-over-a-rotation' }).first().waitFor();
  await page.getByRole('button', { name: 'Log out', exact: true }).click();
  await page.getByLabel('Admin key').waitFor();
  for (const complaint of complaints.splice(0)) expect(complaint).toContain('401');
});

test('logging out everywhere ends the sessions in other browsers', async () => {
  const elsewhere = await openPage(browser);
  for (const at of [elsewhere, page]) await logIn(at, product.dev.edge, product.dev.adminKey);
  await page.getByRole('button', { name: 'Log out everywhere' }).click();
  await expectAccessible(page, 'the question before logging out everywhere');
  await page.getByRole('dialog').getByRole('button', { name: 'End all sessions' }).click();
  await page.getByRole('status').getByText('You are logged out everywhere.').waitFor();
  await elsewhere.getByRole('navigation').getByRole('link', { name: 'Keys' }).click();
  await elsewhere.getByLabel('Admin key').waitFor();
  await elsewhere.getByRole('status').getByText('The session has ended.').waitFor();
});
