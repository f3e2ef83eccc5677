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
  await storeMaskSet(dashboard.client, { ...preset, name: 'strange', clusters }, tenant);
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
  expect(await page.evaluate('window.didRun')).toBeUndefined();
  await page.setViewportSize({ width: 1400, height: 900 });
  await page.goto(`${dashboard.product.dev.edge}/dashboard`);
  await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
  dashboard.complaints.splice(0);
}, 60_000);
