/**
 * The dashboard as a console: by pointer and by keyboard, wide and narrow, light and dark, also while the edge fails. With
 * `SCREENSHOTS=1` it draws the pictures of docs/dashboard.md.
 */
import { mkdirSync } from 'node:fs';
import path from 'node:path';
import type { Page } from 'playwright-core';
import { beforeAll, describe, expect, test } from 'vitest';
import { publishMaskSet } from '../../../gpu-backend/publication/publish.ts';
import { createdKeySchema, tenantSchema } from '../../../shared/admin/admin-wire.ts';
import { maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { comeBack, expectAccessible, visit } from '../browser.ts';
import { dashboard } from './open.ts';

let page: Page;
beforeAll(() => {
  page = dashboard.page;
});

const dialog = () => page.getByRole('dialog');

/** One request through the edge; its `x-request-id`. */
async function ask(content: string): Promise<string> {
  const { client, dev } = dashboard.product;
  const body = { model: dev.model, messages: [{ role: 'user' as const, content }], max_tokens: 4 };
  const { data, response } = await client.chat.completions.create(body).withResponse();
  const rating = { id: data.id, rating: -1, comment: `About “${content}”: not what I asked.` };
  await client.post('/feedback', { body: rating });
  return response.headers.get('x-request-id')!;
}

test('a request is found by its x-request-id, opens with the mask drawn and why, and its address leads there', async () => {
  const id = await ask('How much is 12 times 7?');
  await visit(page, 'Requests');
  await page.getByLabel('Find by x-request-id').fill(id);
  const open = page.getByRole('button', { name: `Open ${id}` });
  await expect
    .poll(
      async () => {
        if (!(await open.isVisible())) await page.reload();
        return await open.isVisible({ timeout: 2_000 } as never);
      },
      { timeout: 30_000, interval: 1_000 },
    )
    .toBe(true);
  // With seconds: it is one among many.
  expect(await page.locator('tbody time').first().textContent()).toMatch(/:\d\d:\d\d/);
  await open.click();
  const detail = page.getByRole('region', { name: /^Request / });
  await detail.getByText(/is the nearest, at a cosine of .*it got that cluster’s mask/).waitFor();
  await detail.getByRole('table', { name: 'Which blocks ran, by layer' }).waitFor();
  await detail.getByText('not what I asked').waitFor();
  expect(await detail.locator('dt:text-is("Experiment") + dd').textContent()).toBe('none');
  await detail.getByText('The prompt and the answer are not kept.').waitFor();
  await expectAccessible(page, 'a request');
  await page.reload();
  await detail.getByText(id).waitFor();
  await detail.getByRole('button', { name: 'Close' }).click();
  expect(page.url()).not.toContain('request=');
});

test('the overview counts it, says what is not comparable yet, and shows the comment', async () => {
  await visit(page, 'Overview');
  // Chance has some requests compared.
  await page.getByText(/not comparable yet \(\d+ of 30/).waitFor({ timeout: 20_000 });
  await page
    .getByRole('cell', { name: /not what I asked/ })
    .first()
    .waitFor();
  await page.getByRole('combobox', { name: 'Time' }).selectOption('week');
  expect(page.url()).toContain('range=week');
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
    (await fetch(`${dashboard.product.dev.edge}/v1/models`, { headers: { authorization: `Bearer ${key}` } }))
      .status;
  expect(await status()).toBe(200);
  expect(await page.content()).not.toContain(key);

  await page.getByRole('button', { name: `Revoke ${key.slice(0, 14)}` }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Revoke' }).click();
  await page.getByRole('row', { name: 'for a test' }).waitFor({ state: 'detached' });
  expect(await status()).toBe(401);
});

test('what a form shows in another order, or rounded, is not sent as changed', async () => {
  const { client, product } = dashboard;
  const terms = { models: ['elsewhere', product.dev.model], sparsity_max: 1 / 3 };
  const body = { id: 'exact', name: 'Exact', ...terms };
  await client.request({ method: 'POST', path: '/tenants', body }, tenantSchema);
  await visit(page, 'Overview');
  await visit(page, 'Tenants');
  await page.getByRole('button', { name: 'Edit exact' }).click();
  await dialog().getByLabel(product.dev.model).waitFor();
  await dialog().getByLabel('Name', { exact: true }).fill('Exactly');
  await dialog().getByRole('button', { name: 'Save' }).click();
  await page.getByRole('cell', { name: 'Exactly' }).waitFor();
  const path = '/tenants/exact';
  expect(await client.request({ method: 'GET', path }, tenantSchema)).toMatchObject({
    name: 'Exactly',
    ...terms,
  });
});

test('the playground says when there is no model to ask', async () => {
  const body = { id: 'nowhere', name: 'Nowhere', models: ['elsewhere'] };
  await dashboard.client.request({ method: 'POST', path: '/tenants', body }, tenantSchema);
  await page.goto(`${dashboard.product.dev.edge}/dashboard/playground?as=nowhere`);
  await page.getByText('No backend serves a model that nowhere may use.').waitFor();
});

test('what was sent is waited for: neither Cancel nor Escape leaves it', async () => {
  const path = '/keys';
  const body = { kind: 'tenant', tenant: 'local', name: 'slowly revoked' };
  const { prefix } = await dashboard.client.request({ method: 'POST', path, body }, createdKeySchema);
  await visit(page, 'Overview');
  await visit(page, 'Keys');
  let answer: () => void = () => undefined;
  const held = new Promise<void>((resolve) => {
    answer = resolve;
  });
  await page.route('**/admin/v1/keys/*', async (route) => {
    await held;
    await route.continue();
  });
  await page.getByRole('button', { name: `Revoke ${prefix}` }).click();
  await dialog().getByRole('button', { name: 'Revoke' }).click();
  await page.keyboard.press('Escape');
  expect(await dialog().getByRole('button', { name: 'Cancel' }).isDisabled()).toBe(true);
  answer();
  await dialog().waitFor({ state: 'detached' });
  await page.getByRole('row', { name: 'slowly revoked' }).waitFor({ state: 'detached' });
  await page.unroute('**/admin/v1/keys/*');
});

describe('a form', () => {
  test('outlives a poll that fails, and Escape asks before it is thrown away, by keyboard alone', async () => {
    await visit(page, 'Releases');
    const set = { ...dashboard.preset, name: 'kept' };
    const version = maskSetVersion(set);
    await publishMaskSet(dashboard.client, set, { tenant: '', activate: false });
    await visit(page, 'Overview');
    await visit(page, 'Releases');
    const button = page.getByRole('button', { name: `Activate ${version}` });
    await button.focus();
    await page.keyboard.press('Enter');
    await dialog().getByLabel('Minutes a step').fill('42');
    await page.route('**/admin/v1/**', (route) => route.abort());
    const stale = page.locator('.stale').first();
    await expect.poll(() => stale.count(), { timeout: 20_000 }).toBe(1);
    expect(await stale.textContent()).toContain('It could not be read again');
    expect(await dialog().getByLabel('Minutes a step').inputValue()).toBe('42');
    await dialog().getByRole('button', { name: 'Activate' }).click();
    await dialog().getByText('The edge cannot be reached.').waitFor();
    await page.unroute('**/admin/v1/**');
    dashboard.complaints.splice(0);

    await page.keyboard.press('Escape');
    await dialog().getByText('Discard your changes?').first().waitFor();
    await expectAccessible(page, 'the question before a form is thrown away');
    await page.keyboard.press('Enter');
    expect(await dialog().getByLabel('Minutes a step').inputValue()).toBe('42');
    await page.keyboard.press('Escape');
    await page.keyboard.press('Tab');
    await page.keyboard.press('Enter');
    await dialog().waitFor({ state: 'detached' });
    // Who works by keyboard goes on where they were.
    expect(await button.evaluate((one) => one === document.activeElement)).toBe(true);
    await comeBack(page);
    await expect.poll(() => page.locator('.stale').count(), { timeout: 20_000 }).toBe(0);
  });

  test('a new key is put away by Done alone', async () => {
    await visit(page, 'Keys');
    await page.getByRole('button', { name: 'New key' }).click();
    await dialog().getByLabel('Name', { exact: true }).fill('shown once');
    await dialog().locator('select[name=tenant]').selectOption('local');
    await dialog().getByRole('button', { name: 'Create', exact: true }).click();
    const key = await page.getByRole('textbox', { name: 'The new key' }).inputValue();
    // As in a page without TLS.
    await page.evaluate(
      "Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })",
    );
    await dialog().getByRole('button', { name: 'Copy' }).click();
    await dialog().getByText('This browser does not allow the page to copy').waitFor();
    for (let i = 0; i < 3; i++) await page.keyboard.press('Escape');
    expect(await page.getByRole('textbox', { name: 'The new key' }).inputValue()).toBe(key);
    await page.getByRole('button', { name: 'Done' }).click();
    await dialog().waitFor({ state: 'detached' });
    await page.getByRole('button', { name: `Revoke ${key.slice(0, 14)}` }).click();
    const revoke = dialog().getByRole('button', { name: `Revoke ${key.slice(0, 14)}` });
    expect(await revoke.evaluate((button) => getComputedStyle(button).backgroundColor)).toBe(
      'rgb(179, 38, 30)',
    );
    await page.keyboard.press('Escape');
  });
});

test('a rollout shows both versions with their shares and a countdown, is paused, resumed and promoted', async () => {
  const set = { ...dashboard.preset, name: 'rolled-out' };
  const version = maskSetVersion(set);
  const rollout = [
    { share: 0.01, duration_s: 3600 },
    { share: 0.1, duration_s: 100 },
  ];
  await publishMaskSet(dashboard.client, set, { tenant: '', activate: true, schedule: { rollout } });
  await visit(page, 'Live masks');
  await page.getByText('99 %', { exact: true }).waitFor();
  await visit(page, 'Releases');
  const part = (text: string) => page.getByRole('listitem').filter({ hasText: text });
  await part('serving 99 %').waitFor();
  await part('rolling out 1 %').getByText(version).waitFor();
  const how = '1 % for 1 h, 10 % for 1 min 40 s, then everyone';
  await page.getByRole('cell', { name: how }).first().waitFor();
  const timer = page.getByRole('timer');
  const first = await timer.textContent();
  await expect.poll(() => timer.textContent(), { timeout: 20_000 }).not.toBe(first);
  for (const [act, shown] of [
    ['Pause', 'paused at 1 %'],
    ['Resume', 'rolling out 1 %'],
    ['Promote', 'serving 100 %'],
  ] as const) {
    await page.getByRole('button', { name: act, exact: true }).click();
    await dialog().getByRole('button', { name: act }).click();
    await part(shown).getByText(version).waitFor();
  }
  await visit(page, 'Audit log');
  await page.getByRole('cell', { name: 'POST /publications/pause' }).waitFor();
  await page.getByLabel(/^Search/).fill('/publications/resume');
  await page.getByRole('button', { name: /Open .* \/publications\/resume/ }).click();
  const paused = page.getByRole('region', { name: /^Change/ }).getByText('"paused_at": "');
  await paused.waitFor();
  // A long text scrolls by keyboard, too.
  await page.getByLabel(/^Search/).fill('PUT /mask-sets/:version/evaluation');
  await page
    .getByRole('button', { name: /^Open .* \/mask-sets\/.*\/evaluation/ })
    .first()
    .click();
  await page.getByRole('region', { name: 'After' }).getByText('"method": "learned"').waitFor();
  await expectAccessible(page, 'a long change');
  await page.getByLabel(/^Search/).fill('/publications/resume');
  await page.getByRole('button', { name: /Open .* \/publications\/resume/ }).click();
  await paused.waitFor();
  // Its address leads there, also where the entry is on no page of the list.
  await page.getByLabel(/^Search/).fill('nothing has this in it');
  await page.getByText('Nothing matches “nothing has this in it”.').waitFor();
  await page.reload();
  await paused.waitFor();
});

/* Every main page, wide and narrow; and its picture for the documentation. */

const SHOWN = ['Overview', 'Requests', 'Releases', 'Live masks', 'Playground', 'Audit log'];
const NARROW = ['Overview', 'Releases'];
const PICTURES = path.resolve('docs/dashboard');

test('every main page fits wide and narrow, its first and action columns in view, and is accessible when narrow', async () => {
  await page.goto(`${dashboard.product.dev.edge}/dashboard/?tenant=local`);
  for (const width of [390, 1440]) {
    await page.setViewportSize({ width, height: 900 });
    for (const title of SHOWN) {
      await visit(page, title);
      const where = `${title}, ${width} px`;
      const excess = await page.evaluate('document.documentElement.scrollWidth - innerWidth');
      expect(excess, where).toBeLessThanOrEqual(0);
      for (const cell of await page.locator('table.data tbody tr:first-child .actions').all()) {
        const box = (await cell.boundingBox())!;
        expect(box.x + box.width, where).toBeLessThanOrEqual(width);
      }
      if (title === 'Requests') {
        const date = page
          .getByRole('table', { name: /^Requests/ })
          .locator('tbody td')
          .first();
        const hidden_px = await date.evaluate((cell) => cell.scrollWidth - cell.clientWidth);
        expect(hidden_px, where).toBe(0);
      }
      // Wide, and in dark colours, which are the same at both widths, all pages are looked at in pages.ts.
      if (width === 390) await expectAccessible(page, where, 'looks');
      if (process.env.SCREENSHOTS === '1') await draw(title, width);
    }
  }
  await page.setViewportSize({ width: 1400, height: 900 });
  await page.goto(`${dashboard.product.dev.edge}/dashboard`);
  await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
  // The tenant has no publication of its own, which the browser notes as a 404.
  expect(dashboard.complaints.splice(0).filter((complaint) => !complaint.includes('404'))).toEqual([]);
}, 240_000);

/** Wide pages in light colours, narrow ones in dark. */
async function draw(title: string, width: number): Promise<void> {
  const isWide = width === 1440;
  if (isWide ? title === 'Audit log' : !NARROW.includes(title)) return;
  await page.emulateMedia({ colorScheme: isWide ? 'light' : 'dark' });
  mkdirSync(PICTURES, { recursive: true });
  const name = `${title.toLowerCase().replaceAll(' ', '-')}-${width}.png`;
  await page.screenshot({ path: path.join(PICTURES, name), scale: 'css' });
  await page.emulateMedia({ colorScheme: 'light' });
}
