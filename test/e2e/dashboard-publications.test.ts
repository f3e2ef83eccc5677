/** Making sets live and taking them back on the dashboard, in a real Chromium on the running product. */
import path from 'node:path';
import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type AdminClient, createAdminClient } from '../../gpu-backend/publication/admin-client.ts';
import { readMaskSet } from '../../gpu-backend/publication/mask-set-file.ts';
import { livePublication, publishMaskSet } from '../../gpu-backend/publication/publish.ts';
import { type ApiKeyKind, type CreatedKey, createdKeySchema, tenantSchema } from '../../shared/admin.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask-set.ts';
import { complaintsOf, expectAccessible, logIn, openBrowser, openPage, visit } from './browser.ts';
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

async function newTenant(of: AdminClient, id: string, kind: ApiKeyKind): Promise<CreatedKey> {
  await of.request({ method: 'POST', path: '/tenants', body: { id, name: id } }, tenantSchema);
  const body = { kind, tenant: id, name: 'for a test' };
  return await of.request({ method: 'POST', path: '/keys', body }, createdKeySchema);
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

test('a set goes live step by step and watched, as the dialog says, and is called off', async () => {
  const before = (await live())!.version;
  await visit(page, 'Live masks');
  const version = await publish('gradual', false);
  await visit(page, 'Publications');
  await page.getByRole('button', { name: `Activate ${version}` }).click();
  await dialog()
    .getByLabel(/^Step by step/)
    .check();
  await dialog().getByLabel('Minutes a step').fill('3');
  await dialog()
    .getByLabel(/^Take it back when more than this share/)
    .fill('2.5');
  await dialog()
    .getByLabel(/^Take it back when a token takes/)
    .fill('1.5');
  await expectAccessible(page, 'the dialog of an activation');
  await dialog().getByRole('button', { name: 'Activate' }).click();
  await page.getByRole('status').getByText(`the others see ${before}`).waitFor();
  expect(await live()).toMatchObject({
    version,
    share: 0.01,
    rollout: [
      { share: 0.01, duration_s: 180 },
      { share: 0.1, duration_s: 180 },
    ],
    auto_rollback: { error_rate_max: 0.025, tpot_ratio_max: 1.5 },
  });
  const row = page.getByRole('table', { name: 'History' }).getByRole('row').nth(1);
  expect(await row.textContent()).toContain('1 % for 3 min, 10 % for 3 min, then everyone; watched');
  await rollBackButton().click();
  await dialog().getByText(`${version} goes, ${before} comes back`).waitFor();
  await dialog().getByRole('button', { name: 'Roll back' }).click();
  await page.getByRole('status').getByText(`: ${before}, since`).waitFor();
  expect(complaints).toEqual([]);
});

test('a tenant without a set of its own sees the default one, with its own key, too', async () => {
  const { version } = (await live())!;
  const { key } = await newTenant(client, 'guest', 'tenant_admin');
  const expectDefaultSet = async (of: Page) => {
    for (const title of ['Live masks', 'Embedding map']) {
      await visit(of, title);
      await of.getByText('guest has no mask set of its own').waitFor();
      await of.getByText(version).waitFor();
      await of.getByRole('table').first().waitFor();
    }
    await visit(of, 'Publications');
    await of
      .getByRole('status')
      .getByText('Nothing is live for guest. Its requests use the default')
      .waitFor();
  };
  await visit(page, 'Live masks');
  // The list of tenants is read again when it is opened.
  await page.getByLabel('Tenant').focus();
  await page.getByLabel('Tenant').selectOption('guest');
  await expectDefaultSet(page);
  await page.getByLabel('Tenant').selectOption('');

  const own = await openPage(browser);
  const troubles = complaintsOf(own);
  await logIn(own, product.dev.edge, key);
  await expectDefaultSet(own);
  // Each asked for what is live for the tenant itself, which is nothing.
  for (const list of [complaints, troubles]) {
    expect(list.splice(0)).toEqual([expect.stringContaining('404')]);
  }
  await own.context().close();
});
