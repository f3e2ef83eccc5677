/** Making sets live and taking them back on the dashboard, in a real Chromium on the running product. */
import path from 'node:path';
import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type AdminClient, createAdminClient } from '../../gpu-backend/publication/admin-client.ts';
import { readMaskSet } from '../../gpu-backend/publication/mask-set-file.ts';
import { livePublication, publishMaskSet } from '../../gpu-backend/publication/publish.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask-set.ts';
import { complaintsOf, logIn, openBrowser, openPage, visit } from './browser.ts';
import { createHome, removeHome, type Started, start, stop } from './product.ts';

let home: string;
let product: Started;
let client: AdminClient;
let browser: Browser;
let page: Page;
let complaints: string[];
let preset: MaskSet;

beforeAll(async () => {
  home = createHome();
  product = await start(home);
  client = createAdminClient(product.dev.edge, product.dev.adminKey);
  browser = await openBrowser();
  page = await openPage(browser);
  complaints = complaintsOf(page);
  preset = await readMaskSet(path.resolve('gpu-backend/presets/smollm2-135m-instruct/mask-set.json'));
  await logIn(page, product.dev.edge, product.dev.adminKey);
}, 120_000);
afterAll(async () => {
  await browser?.close();
  if (product !== undefined) expect(await stop(product)).toBe(0);
  removeHome(home);
}, 60_000);

const live = () => livePublication(client, '');
const rollBackButton = () => page.getByRole('button', { name: 'Roll back' });
const dialog = () => page.getByRole('dialog');

async function publish(name: string, activate = true): Promise<string> {
  const set = { ...preset, name };
  await publishMaskSet(client, set, { tenant: '', activate });
  return maskSetVersion(set);
}

test('the way back is named as it is, step by step, and closed at its end', async () => {
  const first = maskSetVersion(preset);
  const second = await publish('second');
  const third = await publish('third');
  await visit(page, 'Publications');
  for (const [goes, comes] of [
    [third, second],
    [second, first],
  ] as const) {
    await page.getByRole('status').getByText(goes).waitFor();
    await rollBackButton().click();
    await dialog().getByText(`${goes} goes, ${comes} comes back for default (shared).`).waitFor();
    await dialog().getByRole('button', { name: 'Roll back' }).click();
    await page.getByRole('status').getByText(comes).waitFor();
    expect((await live())?.version).toBe(comes);
  }
  expect(await rollBackButton().isDisabled()).toBe(true);
  expect(complaints).toEqual([]);
});
