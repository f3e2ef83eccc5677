/** Mask sets on the dashboard: made live and taken back, whose they are, what was measured of them. */
import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import type { Page } from 'playwright-core';
import { beforeAll, expect, test } from 'vitest';
import type { AdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { livePublication, publishMaskSet, rollBack } from '../../../gpu-backend/publication/publish.ts';
import {
  type ApiKeyKind,
  type CreatedKey,
  createdKeySchema,
  tenantSchema,
} from '../../../shared/admin/admin-wire.ts';
import { experimentSchema } from '../../../shared/admin/experiment-wire.ts';
import { type MaskSet, maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { madeUpEvaluation } from '../../support/evaluation.ts';
import { complaintsOf, expectAccessible, logIn, openPage, visit } from '../browser.ts';
import { type Dashboard, dashboard } from './open.ts';

let product: Dashboard['product'];
let client: AdminClient;
let page: Page;
let complaints: string[];
let preset: MaskSet;

beforeAll(() => {
  ({ product, client, preset, page, complaints } = dashboard);
});

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
  const body = { kind, tenant: id, name: `of ${id}` };
  return await of.request({ method: 'POST', path: '/keys', body }, createdKeySchema);
}

test('the way back is named as it is, step by step, and closed at its end', async () => {
  const first = maskSetVersion(preset);
  const second = await publish('second');
  const third = await publish('third');
  await visit(page, 'Releases');
  for (const [goes, comes] of [
    [third, second],
    [second, first],
  ] as const) {
    await page.getByRole('status').getByText(goes).waitFor();
    await rollBackButton().click();
    await dialog()
      .getByText(`${comes} replaces ${goes} for all tenants without a set of their own.`)
      .waitFor();
    await dialog().getByRole('button', { name: 'Roll back' }).click();
    await page.getByRole('status').getByText(comes).waitFor();
    expect((await live())?.version).toBe(comes);
  }
  expect(await rollBackButton().isDisabled()).toBe(true);
  expect(complaints).toEqual([]);
});

test('a set goes live by click, and comes back by click; somebody faster wins', async () => {
  const other = { ...preset, name: 'other-set' };
  const version = maskSetVersion(other);
  await publishMaskSet(client, other, { tenant: '', activate: false });
  const versionLive = async () => (await live())?.version;
  const before = (await versionLive())!;

  // What is on view is read again when it is opened.
  await visit(page, 'Live masks');
  await visit(page, 'Releases');
  await page.getByRole('button', { name: `Activate ${version}` }).click();
  await dialog().getByRole('button', { name: 'Activate' }).click();
  await page.getByRole('status').getByText(version).waitFor();
  expect(await versionLive()).toBe(version);

  await rollBackButton().click();
  await expectAccessible(page, 'the dialog');
  await page.keyboard.press('Escape');
  expect(await versionLive()).toBe(version);
  await rollBackButton().click();
  await dialog().getByRole('button', { name: 'Roll back' }).click();
  await page.getByRole('status').getByText(before).waitFor();
  expect(await versionLive()).toBe(before);

  await page.getByRole('button', { name: `Activate ${version}` }).click();
  await publishMaskSet(client, other, { tenant: '', activate: true });
  await dialog().getByRole('button', { name: 'Activate' }).click();
  await page.getByRole('alert').getByText('conflict', { exact: true }).waitFor();
  expect(complaints.splice(0)).toEqual([expect.stringContaining('409')]);
  await page.keyboard.press('Escape');
  await rollBack(client, '', await live());
});

test('a set goes live step by step and watched, as the dialog says, and is called off', async () => {
  const before = (await live())!.version;
  await visit(page, 'Live masks');
  const version = await publish('gradual', false);
  await visit(page, 'Releases');
  await page.getByRole('button', { name: `Activate ${version}` }).click();
  await dialog()
    .getByLabel(/^Step by step/)
    .check();
  await dialog().getByLabel('Minutes a step').fill('3');
  await dialog()
    .getByLabel(/^Roll back at an error rate above/)
    .fill('2.5');
  await dialog()
    .getByLabel(/^Roll back when ms/)
    .fill('1.5');
  await expectAccessible(page, 'the dialog of an activation');
  await dialog().getByRole('button', { name: 'Activate' }).click();
  await page.getByRole('listitem').filter({ hasText: 'serving 99 %' }).getByText(before).waitFor();
  await page.getByRole('listitem').filter({ hasText: 'rolling out 1 %' }).getByText(version).waitFor();
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
  expect(await row.textContent()).toContain(
    '1 % for 3 min, 10 % for 3 min, then everyone; automatic rollback',
  );
  await rollBackButton().click();
  await dialog().getByText(`${before} replaces ${version} for`).waitFor();
  await dialog().getByRole('button', { name: 'Roll back' }).click();
  await page.getByRole('listitem').filter({ hasText: 'serving 100 %' }).getByText(before).waitFor();
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
    await visit(of, 'Releases');
    await of.getByRole('status').getByText('(Default mask set)').waitFor();
  };
  await visit(page, 'Live masks');
  // The list of tenants is read again when it is opened.
  await page.getByLabel('Tenant').focus();
  await page.getByLabel('Tenant').selectOption('guest');
  await expectDefaultSet(page);
  await page.getByLabel('Tenant').selectOption('');

  const own = await openPage(dashboard.browser);
  const troubles = complaintsOf(own);
  await logIn(own, product.dev.edge, key);
  await expectDefaultSet(own);
  await visit(own, 'Experiments');
  const setsToPick = /\/mask-sets\?/;
  const choices = Promise.withResolvers<void>();
  await own.route(setsToPick, (route) => choices.promise.then(() => route.continue()));
  await own.getByRole('button', { name: 'New experiment' }).click();
  await own.getByRole('dialog').getByLabel('Id', { exact: true }).fill('with-the-default-set');
  const create = own.getByRole('button', { name: 'Create the draft' });
  expect(await create.isDisabled()).toBe(true);
  choices.resolve();
  await create.click();
  await own.unroute(setsToPick);
  await own.getByRole('button', { name: 'Start with-the-default-set' }).click();
  await own.getByRole('dialog').getByRole('button', { name: 'Start' }).click();
  await own.getByRole('row', { name: 'with-the-default-set' }).getByText('running').waitFor();
  const { variants } = await client.request(
    { method: 'GET', path: '/experiments/with-the-default-set' },
    experimentSchema,
  );
  expect(variants.map(({ mask_set }) => mask_set)).toEqual(['dense', version]);
  // Whose requests take part in one experiment take part in no other.
  const stop = { method: 'POST', path: '/experiments/with-the-default-set/stop' } as const;
  await client.request(stop, experimentSchema);
  // Each asked for what is live for the tenant itself, which is nothing, and goes on to ask.
  for (const list of [complaints, troubles]) {
    expect([...new Set(list.splice(0))]).toEqual([expect.stringContaining('404')]);
  }
  await own.context().close();
});

test('an evaluation that was sent with a set is drawn, every baseline in it, and else what the sets carry', async () => {
  const version = maskSetVersion(preset);
  const evaluation = madeUpEvaluation(version);
  const file = path.join(dashboard.home, 'evaluation.json');
  writeFileSync(file, JSON.stringify(evaluation));
  const setFile = path.join(dashboard.home, 'mask-set.json');
  writeFileSync(setFile, JSON.stringify(preset));
  const line = ['bin/maskroute.js', 'publish', setFile, '--evaluation', file, '--edge', product.dev.edge];
  const env = { ...process.env, MASKROUTE_ADMIN_KEY: product.dev.adminKey };
  const { status, stderr } = spawnSync(process.execPath, line, { env, encoding: 'utf8' });
  expect(status, stderr).toBe(0);

  await visit(page, 'Quality');
  const figures = page.getByRole('combobox', { name: 'Figures' });
  await figures.selectOption(`evaluation of ${preset.name} ${version.slice(0, 10)}`);
  const table = page.getByRole('table', { name: 'Evaluated methods' });
  const rows = await table.locator('tbody tr').allTextContents();
  const drawn = [...evaluation.rows, ...evaluation.equalTime];
  expect(rows).toHaveLength(drawn.length);
  drawn.forEach(({ method, msPerToken }, index) => {
    expect(rows[index]).toMatch(new RegExp(`^${method}.*${msPerToken.toFixed(2)}$`));
  });
  await page.getByRole('img', { name: 'KL to dense (less is better) against ms/token' }).waitFor();
  await page.getByLabel('Quality').selectOption('perplexity');
  await page.getByRole('img', { name: 'perplexity (less is better) against ms/token' }).waitFor();
  await expectAccessible(page, 'an evaluation');

  await figures.selectOption('held-out figures of every set');
  await page.getByRole('img', { name: 'perplexity (less is better) against blocks that run' }).waitFor();
  await page.getByRole('table', { name: 'Held-out figures' }).waitFor();
  // What is in view is in the address.
  await page.reload();
  await page.getByRole('img', { name: 'perplexity (less is better) against blocks that run' }).waitFor();
  expect(await figures.inputValue()).toBe('held-out figures of every set');
  expect(complaints).toEqual([]);
});

test('the time of a token in live traffic stands beside it, by the blocks that were out', async () => {
  const { version, sparsity } = await completed();
  const times = page.getByRole('table', { name: 'ms/token in live traffic' });
  await expect
    .poll(
      async () => {
        await visit(page, 'Live masks');
        await visit(page, 'Quality');
        return await times.getByRole('row').count();
      },
      { timeout: 20_000 },
    )
    .toBe(2);
  const text = await times.getByRole('row').nth(1).textContent();
  expect(text).toContain(`${version.slice(0, 10)}${(100 * sparsity).toFixed(1)} %1`);
});

test('what routing gains stands there, and how much is known of live traffic', async () => {
  const figure = { kl: 0.41, interval: [0.4, 0.42], change: -0.02, changeInterval: [-0.03, -0.01] };
  const headroom = {
    rows: 90,
    positions: 4000,
    masks: 3,
    byKind: figure,
    bestAfterwards: figure,
    bestByOtherHalf: { ...figure, kl: 0.405 },
    oneMask: { ...figure, change: 0, changeInterval: [0, 0] },
    routed: { ...figure, kl: 0.4 },
    lead: { mean_kl: 0.01, standardError_kl: 0.002 },
    blocks: { gained: 0.6, isMore: false },
  };
  // Nothing lies as near to a centroid as that.
  const nearest = { rows: 90, median: 0.001, far: 0.002 };
  const set = { ...preset, name: 'told', heldOut: { ...preset.heldOut, headroom, nearest } };
  await publishMaskSet(client, set, { tenant: '', activate: true });
  await visit(page, 'Live masks');
  await visit(page, 'Quality');
  const table = page.getByRole('table', { name: 'Headroom of 3 masks, told' });
  await table.getByRole('row', { name: 'best by the other half' }).getByText('0.4050').waitFor();
  await table
    .getByRole('row', { name: /^routing \d/ })
    .getByText('-3.0 % to -1.0 %')
    .waitFor();
  await page.getByText('On 90 held-out prompts, 4000 positions.').waitFor();
  await page.getByText('At the routed KL one mask leaves out 0.6 blocks fewer.').waitFor();
  await page.getByText(/ of the 50 requests needed to compare distances/).waitFor();
  await expectAccessible(page, 'what routing gains');
  expect(complaints).toEqual([]);
});

/** One request through the edge, and how it was routed. */
async function completed(): Promise<{ version: string; sparsity: number }> {
  const answer = await product.client.chat.completions
    .create({
      model: product.dev.model,
      messages: [{ role: 'user', content: 'Why is the sky blue?' }],
      max_tokens: 12,
      ...{ ignore_eos: true },
    })
    .asResponse();
  const header = (name: string) => answer.headers.get(`x-maskroute-${name}`)!;
  return { version: header('version'), sparsity: Number(header('sparsity')) };
}
