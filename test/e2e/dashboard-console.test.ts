/**
 * The dashboard as a console: by pointer and by keyboard, wide and narrow, light and dark, also while the edge fails. With
 * `SCREENSHOTS=1` it draws the pictures of docs/dashboard.md.
 */
import { mkdirSync } from 'node:fs';
import path from 'node:path';
import type { Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { publishMaskSet, readMaskSet, storeMaskSet } from '../../gpu-backend/publication/publish.ts';
import { tenantSchema } from '../../shared/admin/admin-wire.ts';
import { maskSetVersion } from '../../shared/mask/mask-set.ts';
import { expectAccessible, visit } from './browser.ts';
import { closeDashboard, type Dashboard, openDashboard } from './open-dashboard.ts';

let dashboard: Dashboard;
let page: Page;

beforeAll(async () => {
  dashboard = await openDashboard();
  ({ page } = dashboard);
}, 120_000);
afterAll(() => closeDashboard(dashboard), 60_000);

const PRESET = path.resolve('gpu-backend/presets/smollm2-135m-instruct/mask-set.json');
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
  await open.click();
  const detail = page.getByRole('region', { name: /^Request / });
  await detail.getByText(/is the nearest, at a cosine of .*it got that cluster’s mask/).waitFor();
  await detail.getByRole('table', { name: 'Which blocks ran, by layer' }).waitFor();
  await detail.getByText('not what I asked').waitFor();
  await detail.getByText('The prompt and the answer are not kept.').waitFor();
  await expectAccessible(page, 'a request');
  await page.reload();
  await detail.getByText(id).waitFor();
  await detail.getByRole('button', { name: 'Close' }).click();
  expect(page.url()).not.toContain('request=');
});

test('the overview counts it, says what is not comparable yet, and shows the comment', async () => {
  await visit(page, 'Overview');
  await page.getByText(/not comparable yet \(0 of 30/).waitFor({ timeout: 20_000 });
  await page
    .getByRole('cell', { name: /not what I asked/ })
    .first()
    .waitFor();
  await page.getByRole('combobox', { name: 'Time' }).selectOption('week');
  expect(page.url()).toContain('range=week');
});

describe('a form', () => {
  test('outlives a poll that fails, and Escape asks before it is thrown away, by keyboard alone', async () => {
    await visit(page, 'Releases');
    const version = maskSetVersion({ ...(await readMaskSet(PRESET)), name: 'kept' });
    await publishMaskSet(
      dashboard.client,
      { ...(await readMaskSet(PRESET)), name: 'kept' },
      {
        tenant: '',
        activate: false,
      },
    );
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
    await dialog().getByText('Throw away what you entered?').first().waitFor();
    await expectAccessible(page, 'the question before a form is thrown away');
    await page.keyboard.press('Enter');
    expect(await dialog().getByLabel('Minutes a step').inputValue()).toBe('42');
    await page.keyboard.press('Escape');
    await page.keyboard.press('Tab');
    await page.keyboard.press('Enter');
    await dialog().waitFor({ state: 'detached' });
    await expect.poll(() => page.locator('.stale').count(), { timeout: 20_000 }).toBe(0);
  });

  test('a new key is put away by Done alone', async () => {
    await visit(page, 'Keys');
    await page.getByRole('button', { name: 'New key' }).click();
    await dialog().getByLabel('Name', { exact: true }).fill('shown once');
    await dialog().locator('select[name=tenant]').selectOption('local');
    await dialog().getByRole('button', { name: 'Create', exact: true }).click();
    const key = await page.getByRole('textbox', { name: 'The new key' }).inputValue();
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
  const set = { ...(await readMaskSet(PRESET)), name: 'rolled-out' };
  const version = maskSetVersion(set);
  const rollout = [{ share: 0.01, duration_s: 3600 }];
  await publishMaskSet(dashboard.client, set, { tenant: '', activate: true, schedule: { rollout } });
  await visit(page, 'Live masks');
  await page.getByText('99 %', { exact: true }).waitFor();
  await visit(page, 'Releases');
  const part = (text: string) => page.getByRole('listitem').filter({ hasText: text });
  await part('serving 99 %').waitFor();
  await part('rolling out 1 %').getByText(version).waitFor();
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
  // Its address leads there, also where the entry is on no page of the list.
  await page.getByLabel(/^Search/).fill('nothing has this in it');
  await page.getByText('Nothing matches “nothing has this in it”.').waitFor();
  await page.reload();
  await paused.waitFor();
});

test('what lies beyond the first page is found by the edge, or loaded', async () => {
  for (let i = 0; i < 104; i++) {
    const body = { id: `many-${String(i).padStart(3, '0')}`, name: `One of many ${i}` };
    await dashboard.client.request({ method: 'POST', path: '/tenants', body }, tenantSchema);
  }
  await visit(page, 'Overview');
  await visit(page, 'Tenants');
  const rows = page.getByRole('table', { name: 'Tenants' }).locator('tbody tr');
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBe(100);
  await page.getByRole('button', { name: 'Load more' }).click();
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBe(105);
  await page.getByRole('button', { name: /^Id/ }).click();
  expect(await rows.first().textContent()).toContain('local');
  await page.getByLabel(/^Search tenants/).fill('many 7');
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBe(11);
  expect(page.url()).toContain('q=many+7');
}, 120_000);

test('mask sets beyond what a list shows are found where they are listed and where one is picked', async () => {
  const { edge } = dashboard.product.dev;
  const tenant = 'many-sets';
  const body = { id: tenant, name: tenant };
  await dashboard.client.request({ method: 'POST', path: '/tenants', body }, tenantSchema);
  const { clusters, ...set } = await readMaskSet(PRESET);
  for (let i = 0; i < 203; i++) {
    const own = { ...set, clusters: clusters.slice(0, 1), name: `set-${String(i).padStart(3, '0')}` };
    await storeMaskSet(dashboard.client, own, tenant);
  }
  await page.goto(`${edge}/dashboard/?tenant=${tenant}`);
  await visit(page, 'Releases');
  const rows = page.getByRole('table', { name: 'Mask sets' }).locator('tbody tr');
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBe(100);
  await page.getByLabel(/^Search mask sets/).fill('SET-001');
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBe(1);
  await visit(page, 'Playground');
  const oldest = page.getByRole('option', { name: /^set-001/ });
  expect(await oldest.count()).toBe(0);
  await page.getByLabel('Find more mask sets').fill('SET-001');
  await expect.poll(() => oldest.count(), { timeout: 20_000 }).toBeGreaterThan(0);
}, 120_000);

/* Every main page, wide and narrow, in both themes; and its picture for the documentation. */

const SHOWN = ['Overview', 'Requests', 'Releases', 'Live masks', 'Playground', 'Audit log'];
const NARROW = ['Overview', 'Releases'];
const PICTURES = path.resolve('docs/dashboard');

test('every main page fits wide and narrow, its first and action columns in view, and is accessible in both themes', async () => {
  await page.goto(`${dashboard.product.dev.edge}/dashboard/?tenant=local`);
  for (const width of [390, 1440]) {
    await page.setViewportSize({ width, height: 900 });
    for (const colorScheme of ['light', 'dark'] as const) {
      await page.emulateMedia({ colorScheme });
      for (const title of SHOWN) {
        await visit(page, title);
        const where = `${title}, ${width} px, ${colorScheme}`;
        const excess = await page.evaluate('document.documentElement.scrollWidth - innerWidth');
        expect(excess, where).toBeLessThanOrEqual(0);
        for (const cell of await page.locator('table.data tbody tr:first-child .actions').all()) {
          const box = (await cell.boundingBox())!;
          expect(box.x + box.width, where).toBeLessThanOrEqual(width);
        }
        // Colours are the same at both widths.
        if (width === 390) await expectAccessible(page, where);
        const isPictured =
          width === 1440
            ? colorScheme === 'light' && title !== 'Audit log'
            : colorScheme === 'dark' && NARROW.includes(title);
        if (process.env.SCREENSHOTS === '1' && isPictured) {
          mkdirSync(PICTURES, { recursive: true });
          const name = `${title.toLowerCase().replaceAll(' ', '-')}-${width}.png`;
          await page.screenshot({ path: path.join(PICTURES, name), scale: 'css' });
        }
      }
    }
  }
  // The tenant has no publication of its own, which the browser notes as a 404.
  expect(dashboard.complaints.filter((complaint) => !complaint.includes('404'))).toEqual([]);
}, 240_000);
