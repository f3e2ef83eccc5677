/** What forms say of what cannot be: in the words of their labels, and about what this version of the edge cannot read. */
import type { Page, Request } from 'playwright-core';
import { beforeAll, expect, test } from 'vitest';
import { publishMaskSet } from '../../../gpu-backend/publication/publish.ts';
import { tenantSchema } from '../../../shared/admin/admin-wire.ts';
import { maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { expectAccessible, visit } from '../browser.ts';
import { dashboard } from './open.ts';

let page: Page;
beforeAll(() => {
  page = dashboard.page;
});

const dialog = () => page.getByRole('dialog');
const failure = () => dialog().getByRole('alert');
const leave = async () => {
  await dialog().getByRole('button', { name: 'Cancel' }).click();
  await dialog().getByRole('button', { name: 'Discard' }).click();
  await dialog().waitFor({ state: 'detached' });
};

test('what the edge refuses is said of the label of its field', async () => {
  await visit(page, 'Keys');
  await page.getByRole('button', { name: 'New key' }).click();
  await dialog().getByLabel('Name', { exact: true }).fill('of yesterday');
  await dialog().getByLabel('Role').selectOption('admin');
  await dialog().getByLabel('Expires').fill('2020-01-31T12:00');
  await dialog().getByRole('button', { name: 'Create' }).click();
  expect(await failure().textContent()).toBe('Expires: is in the past. invalid_request');
  await leave();
  // The browser tells of the refusal in its console.
  for (const complaint of dashboard.complaints.splice(0)) expect(complaint).toContain('400');
});

test('a set does not go live at once by a time in the past', async () => {
  const set = { ...dashboard.preset, name: 'in-time' };
  const version = maskSetVersion(set);
  await publishMaskSet(dashboard.client, set, { tenant: '', activate: false });
  await visit(page, 'Releases');
  await page.getByRole('button', { name: `Activate ${version}` }).click();
  await dialog().getByLabel('Not before').fill('2020-01-31T12:00');
  await dialog().getByRole('button', { name: 'Activate' }).click();
  expect(await failure().textContent()).toContain('Not before: is in the past.');
  await page.getByRole('button', { name: 'Cancel' }).click();
  await dialog().getByRole('button', { name: 'Discard' }).click();
  await page.getByRole('button', { name: `Activate ${version}` }).waitFor();
  expect(dashboard.complaints).toEqual([]);
});

test('a routing policy that this version cannot read is named, stays, and can be replaced', async () => {
  const { client } = dashboard;
  const body = { id: 'of-a-later-policy', name: 'Later' };
  await client.request({ method: 'POST', path: '/tenants', body }, tenantSchema);
  const list = '**/admin/v1/tenants?*';
  // As the edge answers when the database has it.
  await page.route(list, async (route) => {
    const response = await route.fetch();
    const { data, ...rest } = await response.json();
    const shown = data.map((tenant: { id: string }) =>
      tenant.id === body.id ? { ...tenant, unknown_policy: 'last_tool' } : tenant,
    );
    await route.fulfill({ response, json: { ...rest, data: shown } });
  });
  const sent: unknown[] = [];
  const note = (request: Request) => {
    if (request.method() === 'PATCH') sent.push(request.postDataJSON());
  };
  page.on('request', note);
  try {
    await visit(page, 'Overview');
    await visit(page, 'Tenants');
    await page
      .getByRole('cell', { name: 'first user message, as this version cannot read “last_tool”' })
      .waitFor();
    const save = async () => {
      await dialog().getByRole('button', { name: 'Save' }).click();
      await dialog().waitFor({ state: 'detached' });
    };
    const edit = () => page.getByRole('button', { name: `Edit ${body.id}` }).click();
    await edit();
    const policy = dialog().getByLabel('Routing policy');
    expect(await policy.locator('option:checked').textContent()).toBe(
      'last_tool, which this version cannot read',
    );
    await expectAccessible(page, 'the form of a tenant');
    await dialog().getByLabel('Name', { exact: true }).fill('Much later');
    await save();
    await edit();
    await policy.selectOption('first user message');
    await save();
    expect(sent).toEqual([{ name: 'Much later' }, { routing_policy: 'first_user' }]);
  } finally {
    page.off('request', note);
    // The page asks again after each change, and may do so now.
    await page.unrouteAll({ behavior: 'ignoreErrors' });
  }
});
