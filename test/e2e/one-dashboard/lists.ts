/** Lists that are longer than a page: what lies beyond is found by the edge, or loaded. */
import type { Page } from 'playwright-core';
import { beforeAll, expect, test } from 'vitest';
import { storeMaskSet } from '../../../gpu-backend/publication/publish.ts';
import { listSchema, tenantSchema } from '../../../shared/admin/admin-wire.ts';
import { comeBack, visit } from '../browser.ts';
import { dashboard } from './open.ts';

let page: Page;
beforeAll(() => {
  page = dashboard.page;
});

test('what lies beyond the first page is found by the edge, or loaded', async () => {
  const path = '/tenants';
  const there = (await dashboard.client.request({ method: 'GET', path }, listSchema(tenantSchema))).data;
  for (let i = 0; i < 104; i++) {
    const body = { id: `many-${String(i).padStart(3, '0')}`, name: `One of many ${i}` };
    await dashboard.client.request({ method: 'POST', path, body }, tenantSchema);
  }
  await visit(page, 'Overview');
  await visit(page, 'Tenants');
  const rows = page.getByRole('table', { name: 'Tenants' }).locator('tbody tr');
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBe(100);
  await page.getByRole('button', { name: 'Load more' }).click();
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBe(104 + there.length);
  await page.getByRole('button', { name: /^Id/ }).click();
  expect(await rows.first().textContent()).toContain(there.map(({ id }) => id).sort()[0]);
  await page.getByLabel(/^Search tenants/).fill('many 7');
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBe(11);
  expect(page.url()).toContain('q=many+7');
}, 120_000);

test('the last hour keeps the pages that are loaded, also when a minute is over', async () => {
  const { client, dev } = dashboard.product;
  const ask = (i: number) =>
    client.completions.create({ model: dev.model, prompt: `Row ${i}`, max_tokens: 1 });
  for (let i = 0; i < 104; i += 8) await Promise.all(Array.from({ length: 8 }, (_, at) => ask(i + at)));
  await page.goto(`${dev.edge}/dashboard/requests?range=hour`);
  const rows = page.getByRole('table', { name: 'Requests, kept' }).locator('tbody tr');
  const more = page.getByRole('button', { name: 'Load more' });
  await more.waitFor({ timeout: 30_000 });
  await more.click();
  await expect.poll(() => rows.count(), { timeout: 20_000 }).toBeGreaterThan(100);
  await page.clock.setFixedTime(Date.now() + 60_000);
  const asked = page.waitForRequest((request) => request.url().includes('/admin/v1/requests?'));
  await comeBack(page);
  await asked;
  for (let i = 0; i < 20; i++) {
    expect(await rows.count()).toBeGreaterThan(100);
    await page.waitForTimeout(50);
  }
}, 120_000);

test('the last hour is the edge’s, also in a browser whose clock is a day ahead', async () => {
  await page.clock.setFixedTime(Date.now() + 86_400_000);
  const asked = page.waitForRequest((request) => request.url().includes('/admin/v1/requests?'));
  await page.goto(`${dashboard.product.dev.edge}/dashboard/requests?range=hour`);
  const from = new URL((await asked).url()).searchParams.get('from');
  const ago_min = (Date.now() - Date.parse(from ?? '')) / 60_000;
  expect(ago_min).toBeGreaterThan(58);
  expect(ago_min).toBeLessThan(61);
  await page.clock.setFixedTime(Date.now());
});

test('a search follows the address, and ends with its page', async () => {
  await visit(page, 'Tenants');
  const field = page.getByLabel(/^Search tenants/);
  await field.fill('many 7');
  await expect.poll(() => page.url()).toContain('q=many+7');
  await visit(page, 'Tenants');
  await expect.poll(() => field.inputValue()).toBe('');
  expect(page.url()).not.toContain('q=');
  await field.pressSequentially('ab');
  // Before the search has begun.
  await page.getByRole('navigation').getByRole('link', { name: 'Usage', exact: true }).click();
  await page.waitForTimeout(600);
  expect(new URL(page.url())).toMatchObject({ pathname: '/dashboard/usage', search: '' });
});

test('a tenant that another version of the edge wrote does not hide the others', async () => {
  const tenants = '**/admin/v1/tenants?*';
  await page.route(tenants, async (route) => {
    const response = await route.fetch();
    const list = await response.json();
    const [first, ...others] = list.data;
    await route.fulfill({
      response,
      json: { ...list, data: [{ ...first, id: 'of-later', routing_policy: 'last_tool' }, ...others] },
    });
  });
  try {
    await visit(page, 'Keys');
    await visit(page, 'Tenants');
    await page.getByText(/cannot read it: of-later \(routing_policy: /).waitFor();
    expect(await page.getByRole('table', { name: 'Tenants' }).locator('tbody tr').count()).toBeGreaterThan(0);
    await page.getByRole('combobox', { name: 'Tenant', exact: true }).focus();
    await expect.poll(() => page.getByRole('option', { name: 'of-later' }).count()).toBe(1);
  } finally {
    await page.unroute(tenants);
  }
});

test('mask sets beyond what a list shows are found where they are listed and where one is picked', async () => {
  const { edge } = dashboard.product.dev;
  const tenant = 'many-sets';
  const body = { id: tenant, name: tenant };
  await dashboard.client.request({ method: 'POST', path: '/tenants', body }, tenantSchema);
  const { clusters, ...set } = dashboard.preset;
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
  // Enter searches, and does not send the form around the field.
  await page.getByLabel('Find more mask sets').press('Enter');
  await page.waitForTimeout(300);
  expect(await page.getByText('Nothing was run yet.').count()).toBe(2);
}, 120_000);
