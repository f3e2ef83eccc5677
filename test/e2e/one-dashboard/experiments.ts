/** Experiments on the dashboard, from the form to intervals of real requests, and the warning that routing collapsed. */
import type { Page } from 'playwright-core';
import { beforeAll, expect, test } from 'vitest';
import { livePublication, publishMaskSet } from '../../../gpu-backend/publication/publish.ts';
import { experimentSchema } from '../../../shared/admin/experiment-wire.ts';
import { maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { comeBack, expectAccessible, visit } from '../browser.ts';
import { dashboard } from './open.ts';

let page: Page;
beforeAll(() => {
  page = dashboard.page;
});

const experiment = (id: string) =>
  dashboard.client.request({ method: 'GET', path: `/experiments/${id}` }, experimentSchema);

async function startAndStop(id: string): Promise<void> {
  for (const [act, state] of [
    ['Start', 'running'],
    ['Stop', 'stopped'],
  ] as const) {
    await page.getByRole('button', { name: `${act} ${id}` }).click();
    await page.getByRole('dialog').getByRole('button', { name: act }).click();
    await page.getByRole('row', { name: id }).getByText(state).waitFor();
  }
}

test('an experiment is drafted, started and stopped', async () => {
  await visit(page, 'Experiments');
  await page.getByRole('button', { name: 'New experiment' }).click();
  const form = page.getByRole('dialog');
  await form.getByLabel('Id', { exact: true }).fill('dense-or-live');
  // The edge also has the default model's preset, which this model cannot run.
  const own = maskSetVersion(dashboard.preset);
  await form.getByRole('combobox', { name: 'Mask set' }).nth(1).selectOption(own);
  await page.getByRole('button', { name: 'Create the draft' }).click();
  const row = page.getByRole('row', { name: 'dense-or-live' });
  await row.getByText('draft').waitFor();
  await startAndStop('dense-or-live');
  await page.getByRole('button', { name: 'Results dense-or-live' }).click();
  await page.getByRole('heading', { name: 'Results of dense-or-live' }).waitFor();
  await page.getByRole('cell', { name: 'A (control)' }).waitFor();
  await expectAccessible(page, 'results');
});

test('an experiment of one variant shows its figures, and no differences', async () => {
  await visit(page, 'Experiments');
  await page.getByRole('button', { name: 'New experiment' }).click();
  const form = page.getByRole('dialog');
  await form.getByLabel('Id', { exact: true }).fill('one-region');
  await form.getByLabel(/^Significance level/).fill('0.01');
  await form.getByRole('button', { name: 'Remove variant B' }).click();
  await form.getByText('a set for everybody').waitFor();
  expect(await form.getByLabel(/^(Significance level|Sticky unit|Weight)/).count()).toBe(0);
  await form.getByLabel(/^Countries/).fill('NZ');
  await form.getByRole('button', { name: 'Create the draft' }).click();
  const row = page.getByRole('row', { name: 'one-region' });
  await row.getByText('draft').waitFor();
  await row.getByText('A for everybody').waitFor();
  expect(await experiment('one-region')).toMatchObject({ variants: [{ name: 'A', mask_set: 'dense' }] });
  await startAndStop('one-region');
  await page.getByRole('button', { name: 'Results one-region' }).click();
  await page.getByRole('heading', { name: 'Results of one-region' }).waitFor();
  await page.getByRole('cell', { name: 'A', exact: true }).waitFor();
  expect(await page.getByText(/Differences|Compared by/).count()).toBe(0);
});

test('the form asks for all that an experiment can be limited to', async () => {
  await visit(page, 'Experiments');
  await page.getByRole('button', { name: 'New experiment' }).click();
  const dialog = page.getByRole('dialog');
  const version = maskSetVersion(dashboard.preset);
  await dialog.getByRole('combobox', { name: 'Mask set' }).nth(1).selectOption(version);
  await expectAccessible(page, 'the form of an experiment');
  const { model } = dashboard.product.dev;
  for (const [label, value] of [
    [/^Id$/, 'everything'],
    [/^Description/, 'whether less is enough'],
    [/^Continents/, 'eu'],
    [/^Countries/, 'us , T1'],
    [/^Data centres/, 'fra,CDG'],
    [/^Begins/, '2031-03-01T09:00'],
    [/^Ends/, '2031-02-01T09:00'],
    [/^Requests compared/, '2.5'],
    [/^Significance level/, '1'],
  ] as const) {
    await dialog.getByLabel(label).fill(value);
  }
  await dialog
    .getByRole('group', { name: /^Tenants/ })
    .getByLabel('local')
    .check();
  await dialog
    .getByRole('group', { name: /^Models/ })
    .getByLabel(model)
    .check();
  await dialog.getByLabel(/^Sticky unit/).selectOption('user');
  const create = dialog.getByRole('button', { name: 'Create the draft' });
  await create.click();
  // In the words of the form.
  await dialog.getByText('Ends: must be later than Begins.').waitFor();
  expect(dashboard.complaints.splice(0)).toEqual([expect.stringContaining('400')]);
  await dialog.getByLabel(/^Ends/).fill('2031-04-01T09:00');
  await create.click();
  const row = page.getByRole('row', { name: 'everything' });
  await row.getByText('draft').waitFor();
  expect(await row.textContent()).toContain('EU, US, T1, FRA, CDG');
  expect(await experiment('everything')).toMatchObject({
    tenant: '',
    description: 'whether less is enough',
    sticky: 'user',
    state: 'draft',
    tenants: ['local'],
    models: [model],
    shadow_share: 0.025,
    alpha: 0.01,
    regions: [{ continent: 'EU' }, { country: 'US' }, { country: 'T1' }, { colo: 'FRA' }, { colo: 'CDG' }],
    starts_at: new Date('2031-03-01T09:00').toISOString(),
    ends_at: new Date('2031-04-01T09:00').toISOString(),
    variants: [
      { name: 'A', mask_set: 'dense' },
      { name: 'B', mask_set: version },
    ],
  });
  await page.getByRole('button', { name: 'Start everything' }).click();
  await dialog.getByRole('button', { name: 'Start' }).click();
  await row.getByText('scheduled').waitFor();
  await page.getByRole('button', { name: 'Stop everything' }).click();
  await dialog.getByRole('button', { name: 'Stop' }).click();
  await row.getByText('stopped').waitFor();
});

const askAgain = async (path: string) => {
  const asked = page.waitForResponse((response) => new URL(response.url()).pathname.endsWith(path));
  await comeBack(page);
  await asked;
};

test('what is picked and typed stays, whatever is asked again meanwhile', async () => {
  await visit(page, 'Experiments');
  await page.getByRole('button', { name: 'New experiment' }).click();
  const form = page.getByRole('dialog');
  const variant = form.getByRole('combobox', { name: 'Mask set' }).nth(1);
  await variant.selectOption('dense');
  const options = variant.locator('option');
  const before = await options.count();
  await publishMaskSet(
    dashboard.client,
    { ...dashboard.preset, name: 'came-later' },
    { tenant: '', activate: false },
  );
  await askAgain('/mask-sets');
  await expect.poll(() => options.count()).toBe(before + 1);
  expect(await variant.inputValue()).toBe('dense');
  await form.getByRole('button', { name: 'Cancel' }).click();
  await form.getByRole('button', { name: 'Discard' }).click();

  await page.getByRole('button', { name: 'Results dense-or-live' }).click();
  // What is still on its way is not asked for again.
  await page.getByRole('cell', { name: 'A (control)' }).waitFor();
  const region = page.getByLabel(/^Only requests from/);
  await region.pressSequentially('EU/D');
  await askAgain('/results');
  await page.waitForTimeout(300);
  expect(await region.inputValue()).toBe('EU/D');
  const results = page.getByRole('region', { name: 'Results of dense-or-live' });
  await results.getByRole('button', { name: 'Close' }).click();
  await results.waitFor({ state: 'detached' });
  expect(page.url()).not.toContain('experiment=');
});

/** More than a hundred a variant: fewer make no interval. */
const REQUESTS = 240;
const AT_ONCE = 8;

/** Sums of all kinds, and nothing else; where they came in, as the edge says. */
async function askSums(): Promise<string> {
  const { client, dev } = dashboard.product;
  let region = '';
  let next = 0;
  const ask = async () => {
    while (next < REQUESTS) {
      // Short, since there are many: what is asked of the model does not matter here.
      const body = { model: dev.model, prompt: `How much is ${next++} times 7?`, max_tokens: 1 };
      const { response } = await client.completions.create(body).withResponse();
      region = response.headers.get('x-maskroute-region')!;
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, ask));
  return region;
}

test('intervals are drawn with what they hold for, by region; one-sided traffic is a collapse, and said', async () => {
  const live = (await livePublication(dashboard.client, ''))!;
  const variants = [
    { name: 'A', weight: 1, mask_set: 'dense' },
    { name: 'B', weight: 1, mask_set: live.version },
  ];
  const body = { id: 'sums', variants, shadow_share: 0 };
  await dashboard.client.request({ method: 'POST', path: '/experiments', body }, experimentSchema);
  await dashboard.client.request({ method: 'POST', path: '/experiments/sums/start' }, experimentSchema);
  const region = await askSums();

  await visit(page, 'Live masks');
  await visit(page, 'Experiments');
  await page.getByRole('button', { name: 'Results sums' }).click();
  const results = page.getByRole('region', { name: 'Results of sums' });
  const table = results.getByRole('table', { name: 'Variants' });
  await results.getByLabel('Compared by').selectOption('ttft_ms');
  const chart = results.getByRole('img', { name: 'Difference from A in ms to the first token' });
  await chart.waitFor({ timeout: 40_000 });
  expect(await results.textContent()).toContain('Requests of one conversation are not');
  await expectAccessible(page, 'intervals');
  // The tables are wider than the page, which is not for it.
  expect(await page.evaluate('document.documentElement.scrollWidth - innerWidth')).toBeLessThanOrEqual(0);
  const filter = results.getByLabel(/^Only requests from/);
  for (const [within, counted] of [
    ['XX/YY', false],
    [region, true],
  ] as const) {
    await filter.fill(within);
    await filter.press('Enter');
    await expect
      .poll(() => table.getByRole('row', { name: 'A (control)' }).textContent(), { timeout: 20_000 })
      .toMatch(counted ? /dense1\d\d/ : /dense10–/);
  }

  await visit(page, 'Routing');
  await page.getByRole('alert').getByText('Routing has collapsed').waitFor({ timeout: 20_000 });
  const balance = page.getByRole('table', { name: 'Balance' });
  expect(await balance.textContent()).toContain('collapsed');
  await expectAccessible(page, 'a collapse');
  expect(dashboard.complaints).toEqual([]);
}, 240_000);
