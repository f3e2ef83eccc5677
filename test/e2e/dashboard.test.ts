/** The dashboard in a real Chromium, on the running product with the real model. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import type { Browser, BrowserContext, Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type AdminClient, createAdminClient } from '../../gpu-backend/publication/admin-client.ts';
import {
  livePublication,
  publishMaskSet,
  readMaskSet,
  rollBack,
} from '../../gpu-backend/publication/publish.ts';
import { apiKeySchema, listSchema, tenantSchema } from '../../shared/admin/admin-wire.ts';
import { maskSetVersion } from '../../shared/mask/mask-set.ts';
import { complaintsOf, expectAccessible, logIn, openBrowser, openPage, visit } from './browser.ts';
import { createHome, removeHome, type Started, start, stop } from './product.ts';

let home: string;
let product: Started;
let client: AdminClient;
let browser: Browser;
let context: BrowserContext;
let page: Page;
let complaints: string[];

beforeAll(async () => {
  home = createHome();
  product = await start(home);
  client = createAdminClient(product.dev.edge, product.dev.adminKey);
  browser = await openBrowser();
  page = await openPage(browser);
  context = page.context();
  complaints = complaintsOf(page);
}, 120_000);
afterAll(async () => {
  await browser?.close();
  if (product !== undefined) expect(await stop(product)).toBe(0);
  removeHome(home);
}, 60_000);

const focused = () => page.evaluate('document.activeElement.textContent');

const PRESET = path.resolve('gpu-backend/presets/smollm2-135m-instruct/mask-set.json');

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
    expect(data.map(({ id }) => id)).toEqual(['local']);
  });
});

describe('every page', () => {
  test('shows what it is for, breaks no policy, and is accessible in light and dark', async () => {
    const titles = await page.getByRole('navigation').getByRole('link').allTextContents();
    expect(titles.length).toBeGreaterThan(6);
    for (const colorScheme of ['light', 'dark'] as const) {
      await page.emulateMedia({ colorScheme });
      for (const title of titles) {
        await visit(page, title);
        expect(await page.getByRole('alert').allTextContents(), title).toEqual([]);
        await expectAccessible(page, `${title}, ${colorScheme}`);
      }
    }
    await page.emulateMedia({ colorScheme: 'light' });
    expect(complaints).toEqual([]);
  }, 180_000);

  test('can be reached with the keyboard alone, and is announced', async () => {
    await page.goto(`${product.dev.edge}/dashboard`);
    await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
    await page.keyboard.press('Tab');
    expect(await focused()).toBe('Skip to the content');
    while ((await focused()) !== 'Releases') await page.keyboard.press('Tab');
    await page.keyboard.press('Enter');
    await page.getByRole('heading', { level: 1, name: 'Releases' }).waitFor();
    expect(await focused()).toBe('Releases');
    expect(await page.title()).toBe('Releases · Maskroute');
  });

  test('wears the theme that was picked, also after a reload', async () => {
    const background = () => page.evaluate('getComputedStyle(document.documentElement).backgroundColor');
    const light = await background();
    await page.getByLabel('Theme').selectOption('dark');
    const dark = await background();
    expect(dark).not.toBe(light);
    await page.reload();
    await page.getByRole('heading', { level: 1 }).waitFor();
    expect(await background()).toBe(dark);
    await page.getByLabel('Theme').selectOption('auto');
  });
});

test('is there at the first visit after a dozen answers and two megabytes', async () => {
  const fresh = await browser.newContext();
  await fresh.addCookies(await context.cookies());
  const other = await fresh.newPage();
  const bytes: number[] = [];
  other.on('response', async (response) => {
    bytes.push((await response.body().catch(() => Buffer.alloc(0))).length);
  });
  await other.goto(`${product.dev.edge}/dashboard/masks`);
  await other.getByRole('table').waitFor();
  await fresh.close();
  // What makes the first visit slow is what it has to fetch.
  expect(bytes.length).toBeLessThanOrEqual(12);
  expect(bytes.reduce((sum, one) => sum + one, 0)).toBeLessThan(2_000_000);
});

test('the heat map shows the live masks', async () => {
  await visit(page, 'Live masks');
  const set = await readMaskSet(PRESET);
  // The rows of all clusters together say "skipped" too, of a block that nobody runs.
  const clusters = page.locator('table.heat tbody', { hasNotText: 'weighted by prompts' });
  const skipped = clusters.getByText('skipped', { exact: true });
  // Clusters with the same mask share its rows.
  const masks = new Set(set.clusters.map(({ bits }) => bits));
  const closed = [...masks].reduce(
    (sum, bits) => sum + [...bits].reduce((zeros, digit) => zeros + zerosOf(digit), 0),
    0,
  );
  expect(await skipped.count()).toBe(closed);
});
const zerosOf = (digit: string): number =>
  4 - [...Number.parseInt(digit, 16).toString(2)].filter((bit) => bit === '1').length;

test('a set goes live by click, and comes back by click; somebody faster wins', async () => {
  const preset = await readMaskSet(PRESET);
  const other = { ...preset, name: 'other-set' };
  const version = maskSetVersion(other);
  await publishMaskSet(client, other, { tenant: '', activate: false });
  const live = async () => (await livePublication(client, ''))?.version;
  expect(await live()).toBe(maskSetVersion(preset));

  await visit(page, 'Releases');
  await page.getByRole('button', { name: `Activate ${version}` }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Activate' }).click();
  await page.getByRole('status').getByText(version).waitFor();
  expect(await live()).toBe(version);

  await page.getByRole('button', { name: 'Roll back' }).click();
  await expectAccessible(page, 'the dialog');
  await page.keyboard.press('Escape');
  expect(await live()).toBe(version);
  await page.getByRole('button', { name: 'Roll back' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Roll back' }).click();
  await page.getByRole('status').getByText(maskSetVersion(preset)).waitFor();
  expect(await live()).toBe(maskSetVersion(preset));

  await page.getByRole('button', { name: `Activate ${version}` }).click();
  await publishMaskSet(client, other, { tenant: '', activate: true });
  await page.getByRole('dialog').getByRole('button', { name: 'Activate' }).click();
  await page.getByRole('alert').getByText('conflict', { exact: true }).waitFor();
  expect(complaints.splice(0)).toEqual([expect.stringContaining('409')]);
  await page.keyboard.press('Escape');
  await rollBack(client, '');
});

test('a tenant and its key are made; the key is shown once, works, and is revoked', async () => {
  await visit(page, 'Tenants');
  await page.getByRole('button', { name: 'New tenant' }).click();
  await page.getByRole('dialog').getByLabel('Id', { exact: true }).fill('acme');
  await page.getByRole('dialog').getByLabel('Name', { exact: true }).fill('Acme & <b>Sons</b>');
  await page.getByRole('dialog').getByRole('button', { name: 'Create' }).click();
  await page.getByRole('cell', { name: 'Acme & <b>Sons</b>' }).waitFor();

  await visit(page, 'Keys');
  await page.getByRole('button', { name: 'New key' }).click();
  await page.getByRole('dialog').getByLabel('Name', { exact: true }).fill('for a test');
  await page.getByRole('dialog').locator('select[name=tenant]').selectOption('acme');
  await page.getByRole('dialog').getByRole('button', { name: 'Create' }).click();
  await page.keyboard.press('Escape');
  const key = await page.getByRole('textbox', { name: 'The new key' }).inputValue();
  await page.getByRole('button', { name: 'Done' }).click();
  const status = async () =>
    (await fetch(`${product.dev.edge}/v1/models`, { headers: { authorization: `Bearer ${key}` } })).status;
  expect(await status()).toBe(200);
  expect(await page.content()).not.toContain(key);

  await page.getByRole('button', { name: `Revoke ${key.slice(0, 14)}` }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Revoke' }).click();
  await page.getByRole('row', { name: 'for a test' }).waitFor({ state: 'detached' });
  expect(await status()).toBe(401);
});

test('an experiment is drafted, started and stopped', async () => {
  await visit(page, 'Experiments');
  await page.getByRole('button', { name: 'New experiment' }).click();
  await page.getByRole('dialog').getByLabel('Id', { exact: true }).fill('dense-or-live');
  await page.getByRole('button', { name: 'Create the draft' }).click();
  const row = page.getByRole('row', { name: 'dense-or-live' });
  await row.getByText('draft').waitFor();
  for (const [act, state] of [
    ['Start', 'running'],
    ['Stop', 'stopped'],
  ] as const) {
    await page.getByRole('button', { name: `${act} dense-or-live` }).click();
    await page.getByRole('dialog').getByRole('button', { name: act }).click();
    await row.getByText(state).waitFor();
  }
  await page.getByRole('button', { name: 'Results dense-or-live' }).click();
  await page.getByRole('heading', { name: 'Results of dense-or-live' }).waitFor();
  await page.getByRole('cell', { name: 'A (control)' }).waitFor();
  await expectAccessible(page, 'results');
});

describe('the playground', () => {
  test('streams a prompt dense and masked side by side, and says why', async () => {
    await visit(page, 'Playground');
    await page.getByText('Pick the tenant').waitFor();
    await page.getByLabel('Run as the tenant').selectOption('local');
    await page
      .getByRole('textbox', { name: 'Prompt', exact: true })
      .fill('How much is 12 times 7 times 3? Explain.');
    await page.getByLabel('Max tokens').fill('24');
    const run = page.getByRole('button', { name: 'Run' });
    await run.click();
    await expect.poll(() => run.isEnabled(), { timeout: 40_000 }).toBe(true);
    for (const side of ['Dense', 'Masked']) {
      const answer = page.getByRole('article', { name: side });
      await answer.getByText(/ ms\/token, \d+ tokens/).waitFor();
      expect((await answer.locator('.text').textContent())!.length).toBeGreaterThan(0);
    }
    await page.getByRole('article', { name: 'Dense' }).getByText('0.0 % of the blocks skipped').waitFor();
    const routing = page.getByRole('region', { name: 'How the prompt was routed' });
    expect(await routing.textContent()).toMatch(/Cluster\d: .*math.*Cosine0\.\d/s);
    await expectAccessible(page, 'the playground after a run');
    expect(complaints).toEqual([]);
  });

  test('text comes bit by bit, and Stop hangs up', async () => {
    await page.getByLabel('Max tokens').fill('1000');
    await page.getByLabel(/^One after the other/).uncheck();
    await page.getByRole('button', { name: 'Run' }).click();
    const text = page.getByRole('article', { name: 'Masked' }).locator('.text');
    const length = async () => (await text.textContent())!.length;
    await expect.poll(length, { timeout: 20_000 }).toBeGreaterThan(0);
    const first = await length();
    await expect.poll(length, { timeout: 20_000 }).toBeGreaterThan(first + 20);
    await page.getByRole('button', { name: 'Stop' }).click();
    await page.getByRole('article', { name: 'Masked' }).getByText('Stopped.').waitFor();
    const metrics = async () =>
      (
        await fetch(`${product.dev.backend}/metrics`, {
          headers: { authorization: `Bearer ${product.dev.backendKey}` },
        })
      ).text();
    await expect.poll(metrics, { timeout: 10_000 }).toMatch(/num_requests_running\S* 0\n/);
  });
});

test('a backend learns by click: data is uploaded, the job shows how far it is, and is ended', async () => {
  await visit(page, 'Backends');
  await page.getByRole('button', { name: 'Jobs of default' }).click();
  const jobs = page.getByRole('region', { name: 'Jobs of default' });
  await jobs.getByText('No jobs on this backend yet').waitFor();
  await jobs.getByRole('button', { name: 'Learn masks' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel(/^Or a file/).fill('../../etc/passwd');
  await dialog.getByRole('button', { name: 'Start' }).click();
  await dialog.getByText('forbidden', { exact: true }).waitFor();
  expect(complaints.splice(0)).toEqual([expect.stringContaining('403')]);
  await expectAccessible(page, 'the form of a job');

  await dialog.getByLabel(/^Or a file/).fill('');
  const rows = Array.from({ length: 60 }, (_, i) => ({
    question: `What is ${i} and 2?`,
    answer: `${i + 2}.`,
  }));
  const jsonl = Buffer.from(rows.map((row) => JSON.stringify(row)).join('\n'));
  const file = { name: 'easy sums.jsonl', mimeType: 'application/x-ndjson', buffer: jsonl };
  await dialog.getByLabel(/^Prompts/).setInputFiles(file);
  await dialog.getByLabel(/^Clusters/).fill('1');
  await dialog.getByLabel('Name of the mask set').fill('by-click');
  // What the backend would refuse after the upload, the form refuses before it.
  const sparsity = dialog.getByLabel('Blocks skipped, %');
  const refused = dialog.locator('input:invalid');
  for (const nothingOrAll of ['0', '100']) {
    await sparsity.fill(nothingOrAll);
    expect(await refused.count(), nothingOrAll).toBe(1);
  }
  await sparsity.fill('12.5');
  expect(await refused.count()).toBe(0);
  await dialog.getByRole('button', { name: 'Start' }).click();
  const row = jobs.getByRole('row', { name: 'by-click' });
  await row.getByRole('progressbar').waitFor({ timeout: 60_000 });
  await expectAccessible(page, 'a running job');

  await row.getByRole('button', { name: 'End' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'End' }).click();
  await row.getByText('cancelled').waitFor();
  // A machine that learns may be late for a poll, which the page outlives.
  expect(complaints.splice(0).filter((complaint) => !complaint.includes('503'))).toEqual([]);
}, 120_000);

test('a backend learns again and again by click, with a key of its own, until that is deleted', async () => {
  await visit(page, 'Backends');
  await page.getByRole('button', { name: 'Jobs of default' }).click();
  const schedules = page.getByRole('region', { name: 'Schedules of default' });
  await schedules.getByText('No schedules on this backend yet').waitFor();
  await schedules.getByRole('button', { name: 'New schedule' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel('Every').fill('12');
  await dialog.getByLabel(/^Or a file/).fill('chats.jsonl');
  await dialog.getByLabel('Name of the mask set').fill('nightly');
  await dialog.getByLabel('What becomes of the set').selectOption('live');
  await dialog.getByLabel(/^Step by step/).check();
  await dialog.getByLabel(/^Roll back at an error rate/).fill('2');
  await expectAccessible(page, 'the form of a schedule');
  // This backend opens no folder, so the edge refuses it; the key that was made for it must not stay.
  await dialog.getByRole('button', { name: 'Create' }).click();
  await dialog.getByText('forbidden', { exact: true }).waitFor();
  expect(complaints.splice(0)).toEqual([expect.stringContaining('403')]);
  const keys = async () => {
    const path = '/keys?state=working&q=schedule%20on';
    const { data } = await client.request({ method: 'GET', path }, listSchema(apiKeySchema));
    return data.map(({ name, kind }) => `${kind}: ${name}`);
  };
  expect(await keys()).toEqual([]);

  await dialog.getByLabel(/^Or a file/).fill('');
  const buffer = Buffer.from('{"text": "Water boils at 100 degrees."}\n');
  await dialog
    .getByLabel(/^Prompts/)
    .setInputFiles({ name: 'chats.jsonl', mimeType: 'application/x-ndjson', buffer });
  await dialog.getByRole('button', { name: 'Create' }).click();
  const row = schedules.getByRole('row', { name: 'nightly' });
  await row.getByText('12h').waitFor();
  await row.getByText('goes live for all tenants without their own, in 3 steps, watched').waitFor();
  expect(await keys()).toEqual(['admin: schedule on default: nightly']);
  await expectAccessible(page, 'a schedule');

  await row.getByRole('button', { name: 'Delete' }).press('Enter');
  await page
    .getByRole('dialog')
    .getByRole('button', { name: /^Delete schedule_/ })
    .press('Enter');
  await schedules.getByText('No schedules on this backend yet').waitFor();
  expect(complaints).toEqual([]);
}, 60_000);

test('what was asked is counted, by cluster and by day', async () => {
  await visit(page, 'Routing');
  const counted = page.getByRole('table', { name: 'Requests by cluster' });
  await counted.waitFor({ timeout: 30_000 });
  await visit(page, 'Usage');
  await page.getByRole('cell', { name: new Date().toISOString().slice(0, 10) }).waitFor();
  await expectAccessible(page, 'usage');
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
