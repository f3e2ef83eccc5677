/** What the dashboard shows of the real model: its masks, two answers side by side, and what was asked. */
import type { Page } from 'playwright-core';
import { beforeAll, describe, expect, test } from 'vitest';
import { readMaskSet } from '../../../gpu-backend/publication/publish.ts';
import { complaintsOf, expectAccessible, logIn, openPage, visit } from '../browser.ts';
import { PRESET } from '../product.ts';
import { browser } from './browser-client.ts';
import { product } from './running.ts';

/** Of a hexadecimal digit. */
const zerosOf = (digit: string): number =>
  4 - [...Number.parseInt(digit, 16).toString(2)].filter((bit) => bit === '1').length;

describe('the dashboard', () => {
  let page: Page;
  let complaints: string[];
  beforeAll(async () => {
    page = await openPage(browser);
    complaints = complaintsOf(page);
    await logIn(page, product.dev.edge, product.dev.adminKey);
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
  describe('the playground', () => {
    test('streams a prompt dense and masked side by side, and says why', async () => {
      await visit(page, 'Playground');
      await page.getByText('Pick a tenant').waitFor();
      await page.getByLabel('Run as the tenant').selectOption('local');
      await page
        .getByRole('textbox', { name: 'Prompt', exact: true })
        .fill('How much is 12 times 7 times 3? Explain.');
      await page.getByLabel('Max tokens').fill('24');
      const run = page.getByRole('button', { name: 'Run' });
      const asked: string[] = [];
      page.on('request', (request) => void asked.push(new URL(request.url()).pathname));
      await run.dblclick();
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
      // A double click runs it once.
      expect(asked.filter((path) => path === '/v1/chat/completions')).toHaveLength(2);
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

  test('what was asked is counted, by cluster and by day', async () => {
    await visit(page, 'Routing');
    const counted = page.getByRole('table', { name: 'Requests by cluster' });
    await counted.waitFor({ timeout: 30_000 });
    await visit(page, 'Usage');
    await page.getByRole('cell', { name: new Date().toISOString().slice(0, 10) }).waitFor();
    await expectAccessible(page, 'usage');
  });
});
