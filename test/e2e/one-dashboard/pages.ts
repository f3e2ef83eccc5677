/** Every page of the dashboard: accessible in light and dark, by keyboard, and small at the first visit. */
import type { BrowserContext, Page } from 'playwright-core';
import { beforeAll, describe, expect, test } from 'vitest';
import { expectAccessible, visit } from '../browser.ts';
import { dashboard } from './open.ts';

let page: Page;
let context: BrowserContext;
beforeAll(() => {
  page = dashboard.page;
  context = page.context();
});

const focused = () => page.evaluate('document.activeElement.textContent');

describe('every page', () => {
  test('shows what it is for, breaks no policy, and is accessible in light and dark', async () => {
    const titles = await page.getByRole('navigation').getByRole('link').allTextContents();
    expect(titles.length).toBeGreaterThan(6);
    for (const colorScheme of ['light', 'dark'] as const) {
      await page.emulateMedia({ colorScheme });
      for (const title of titles) {
        await visit(page, title);
        expect(await page.getByRole('alert').allTextContents(), title).toEqual([]);
        await expectAccessible(page, `${title}, ${colorScheme}`, colorScheme === 'light' ? 'all' : 'colours');
      }
    }
    await page.emulateMedia({ colorScheme: 'light' });
    expect(dashboard.complaints).toEqual([]);
  }, 180_000);

  test('can be reached with the keyboard alone, and is announced', async () => {
    await page.goto(`${dashboard.product.dev.edge}/dashboard`);
    await page.getByRole('heading', { level: 1, name: 'Overview' }).waitFor();
    await page.keyboard.press('Tab');
    expect(await focused()).toBe('Skip to the content');
    while ((await focused()) !== 'Releases') await page.keyboard.press('Tab');
    await page.keyboard.press('Enter');
    await page.getByRole('heading', { level: 1, name: 'Releases' }).waitFor();
    expect(await focused()).toBe('Releases');
    expect(await page.title()).toBe('Releases · Maskroute');
  });

  test('says when its charts could not be loaded', async () => {
    await page.route('**/assets/echarts-*', (route) => route.abort());
    await page.goto(`${dashboard.product.dev.edge}/dashboard/map`);
    await page.getByText('The chart could not be loaded').waitFor();
    await page.getByRole('table', { name: 'Clusters' }).waitFor();
    await page.unroute('**/assets/echarts-*');
    // The browser tells of what it could not load.
    expect(dashboard.complaints.splice(0)).toEqual([expect.stringContaining('ERR_FAILED')]);
  });

  test('has one name, with a slash at its end or without', async () => {
    await page.goto(`${dashboard.product.dev.edge}/dashboard/keys/`);
    await page.getByRole('heading', { level: 1, name: 'Keys' }).waitFor();
    const link = page.getByRole('navigation').getByRole('link', { name: 'Keys' });
    expect(await link.getAttribute('aria-current')).toBe('page');
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
  const fresh = await dashboard.browser.newContext();
  await fresh.addCookies(await context.cookies());
  const other = await fresh.newPage();
  const bytes: number[] = [];
  other.on('response', async (response) => {
    bytes.push((await response.body().catch(() => Buffer.alloc(0))).length);
  });
  await other.goto(`${dashboard.product.dev.edge}/dashboard/masks`);
  await other.getByRole('table').waitFor();
  await fresh.close();
  // What makes the first visit slow is what it has to fetch.
  expect(bytes.length).toBeLessThanOrEqual(12);
  expect(bytes.reduce((sum, one) => sum + one, 0)).toBeLessThan(2_000_000);
});
