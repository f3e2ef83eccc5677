/** Texts of people who mean harm, and very long ones: no script runs, and nothing is wider than its place. */
import type { Page } from 'playwright-core';
import { beforeAll, expect, test } from 'vitest';
import { storeMaskSet } from '../../../gpu-backend/publication/publish.ts';
import { tenantSchema } from '../../../shared/admin/admin-wire.ts';
import { visit } from '../browser.ts';
import { dashboard } from './open.ts';

let page: Page;
beforeAll(() => {
  page = dashboard.page;
});

const SCRIPT = '<img src=x onerror="window.didRun = true">';
const BACKWARDS = '\u202Efdp.exe';
const LONG = 'W'.repeat(200);
/** The longest name that a mask set can have. */
const LONG_SET = 'W'.repeat(64);

/** How far the page, and the dialog in it, are wider than they may be. */
const excess_px = (): Promise<number[]> =>
  page.evaluate(`[document.documentElement, ...document.querySelectorAll('dialog article')]
    .map((box) => box.scrollWidth - box.clientWidth)`);

test('a name from right to left keeps its order', async () => {
  const tenant = { id: 'right-to-left', name: 'חברה (test)' };
  await dashboard.client.request({ method: 'POST', path: '/tenants', body: tenant }, tenantSchema);
  await visit(page, 'Tenants');
  await page.getByRole('cell', { name: tenant.name }).waitFor();
  /** Where the first letter and the last bracket are, from the left. */
  const places = await page.evaluate<number[]>(`(() => {
    const cell = [...document.querySelectorAll('td')].find((one) => one.textContent === '${tenant.name}');
    const text = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT).nextNode();
    return [0, text.length - 1].map((at) => {
      const range = document.createRange();
      range.setStart(text, at);
      range.setEnd(text, at + 1);
      return range.getBoundingClientRect().left;
    });
  })()`);
  expect(places[0]).toBeGreaterThan(places[1]!);
});

test('no script of a name runs, and no text makes a page or a dialog wider than a telephone', async () => {
  // The longest id that a tenant can have.
  const tenant = `strange-${'w'.repeat(55)}`;
  const names = { name: SCRIPT, models: [SCRIPT, BACKWARDS, LONG] };
  const path = '/tenants';
  await dashboard.client.request({ method: 'POST', path, body: { id: tenant, ...names } }, tenantSchema);
  const { preset } = dashboard;
  const labels = [SCRIPT, BACKWARDS, LONG];
  const clusters = preset.clusters.map((cluster, i) => ({ ...cluster, label: labels[i % labels.length]! }));
  await storeMaskSet(dashboard.client, { ...preset, name: LONG_SET, clusters }, tenant);
  await page.goto(`${dashboard.product.dev.edge}/dashboard/?tenant=${tenant}`);
  await page.setViewportSize({ width: 390, height: 900 });
  for (const title of ['Overview', 'Releases', 'Quality', 'Keys', 'Tenants']) {
    await visit(page, title);
    expect(await excess_px(), title).toEqual([0]);
  }
  await page.getByRole('button', { name: `Edit ${tenant}` }).click();
  await page.getByLabel(LONG).waitFor();
  expect(await excess_px(), 'the form of a tenant').toEqual([0, 0]);
  await page.keyboard.press('Escape');
  await page.getByLabel(/^Search tenants/).fill(LONG);
  await page.getByText(`Nothing matches “${LONG}”`).waitFor();
  expect(await excess_px(), 'a search without results').toEqual([0]);
  await visit(page, 'Experiments');
  await page.getByRole('button', { name: 'New experiment' }).click();
  await page
    .getByRole('option', { name: new RegExp(`^${LONG_SET}`) })
    .first()
    .waitFor({ state: 'attached' });
  expect(await excess_px(), 'the form of an experiment').toEqual([0, 0]);
  await page.keyboard.press('Escape');
  // A table may be wider than the window; its caption is read as a whole.
  await visit(page, 'Backends');
  const caption = await page.getByText(/^Backends, as seen by/).boundingBox();
  expect(caption!.x + caption!.width).toBeLessThanOrEqual(390);
  expect(await page.evaluate('window.didRun')).toBeUndefined();
  await page.setViewportSize({ width: 1400, height: 900 });
  await page.goto(`${dashboard.product.dev.edge}/dashboard`);
  await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
  dashboard.complaints.splice(0);
}, 60_000);

test('what a form cannot take is named at its field, and nothing is sent', async () => {
  await visit(page, 'Keys');
  await page.getByRole('button', { name: 'New key' }).click();
  const form = page.getByRole('dialog', { name: 'New key' });
  /** What the browser says at the field. */
  const objection = (label: string) =>
    form
      .getByLabel(label)
      .evaluate((field) => (field as unknown as { validationMessage: string }).validationMessage);
  await form.getByLabel('Name', { exact: true }).fill('   ');
  expect(await objection('Name')).not.toBe('');
  await form.getByLabel('Name', { exact: true }).fill(' שם ');
  expect(await objection('Name')).toBe('');
  await form.getByLabel('Expires (empty: never)').fill('20000-01-01T00:00');
  expect(await objection('Expires (empty: never)')).not.toBe('');
  await form.getByRole('button', { name: 'Create' }).click();
  expect(await page.getByRole('alert').count()).toBe(0);
  await page.keyboard.press('Escape');
  await page.getByRole('button', { name: 'Discard', exact: true }).click();
  await visit(page, 'Backends');
  await page.getByRole('button', { name: 'New backend' }).click();
  const backend = page.getByRole('dialog', { name: 'New backend' });
  await backend.getByLabel('Id', { exact: true }).fill('אחורי');
  expect(await backend.locator('input[name="id"]:invalid').count()).toBe(1);
  await page.keyboard.press('Escape');
  await page.getByRole('button', { name: 'Discard', exact: true }).click();
  expect(dashboard.complaints.splice(0)).toEqual([]);
});
