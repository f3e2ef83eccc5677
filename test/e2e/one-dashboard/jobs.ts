/** Learning by click on a backend: once, and again and again. */
import type { Page } from 'playwright-core';
import { beforeAll, expect, test } from 'vitest';
import { apiKeySchema, listSchema } from '../../../shared/admin/admin-wire.ts';
import { scheduleSchema } from '../../../shared/admin/job-wire.ts';
import { expectAccessible, visit } from '../browser.ts';
import { dashboard } from './open.ts';

let page: Page;
let complaints: string[];
beforeAll(() => {
  ({ page, complaints } = dashboard);
});

test('a backend learns by click: data is uploaded, the job shows how far it is, and is ended', async () => {
  await visit(page, 'Backends');
  await page.getByRole('button', { name: 'Jobs of default' }).click();
  const jobs = page.getByRole('region', { name: 'Jobs of default' });
  await jobs.getByText('No jobs on this backend yet').waitFor();
  await jobs.getByRole('button', { name: 'Learn masks' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel(/^Or a file/).fill('../../etc/passwd');
  await dialog.getByRole('button', { name: 'Start' }).click();
  await dialog.getByText('forbidden', { exact: true }).waitFor();
  expect(complaints.splice(0)).toEqual([expect.stringContaining('403')]);
  await expectAccessible(page, 'the form of a job');

  await dialog.getByLabel(/^Or a file/).fill('');
  // Without prompts nothing is sent, and nobody has to know what `data` is.
  await dialog.getByRole('button', { name: 'Start' }).click();
  await dialog.getByText(/^Choose files with prompts/).waitFor();
  const nothing = { name: 'nothing.jsonl', mimeType: 'application/x-ndjson', buffer: Buffer.alloc(0) };
  await dialog.getByLabel(/^Prompts/).setInputFiles(nothing);
  await dialog.getByRole('button', { name: 'Start' }).click();
  await dialog.getByText('nothing.jsonl is empty.').waitFor();
  expect(complaints.splice(0)).toEqual([]);
  // So much that it has not ended before somebody ends it.
  const rows = Array.from({ length: 2_000 }, (_, i) => ({
    question: `What is ${i} and 2?`,
    answer: `${i + 2}.`,
  }));
  const jsonl = Buffer.from(rows.map((row) => JSON.stringify(row)).join('\n'));
  const file = { name: 'easy sums.jsonl', mimeType: 'application/x-ndjson', buffer: jsonl };
  await dialog.getByLabel(/^Prompts/).setInputFiles(file);
  await dialog.getByLabel(/^Clusters/).fill('32');
  await dialog.getByLabel('Name of the mask set').fill('by-click');
  // What the backend would refuse after the upload, the form refuses before it.
  const sparsity = dialog.getByLabel('Blocks skipped, %');
  const refused = dialog.locator('input:invalid');
  for (const nothingOrAll of ['0', '100']) {
    await sparsity.fill(nothingOrAll);
    expect(await refused.count(), nothingOrAll).toBe(1);
  }
  await sparsity.fill('12.5');
  expect(await refused.count()).toBe(0);
  await dialog.getByRole('button', { name: 'Start' }).click();
  const row = jobs.getByRole('row', { name: 'by-click' });
  await row.getByRole('progressbar').waitFor({ timeout: 60_000 });
  await expectAccessible(page, 'a running job');

  await row.getByRole('button', { name: 'End' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'End' }).click();
  await row.getByText('cancelled').waitFor();
  // A machine that learns may be late for a poll, which the page outlives.
  expect(complaints.splice(0).filter((complaint) => !complaint.includes('503'))).toEqual([]);
}, 120_000);

test('a backend learns again and again by click, with a key of its own, until that is deleted', async () => {
  await visit(page, 'Backends');
  await page.getByRole('button', { name: 'Jobs of default' }).click();
  const schedules = page.getByRole('region', { name: 'Schedules of default' });
  await schedules.getByText('No schedules on this backend yet').waitFor();
  await schedules.getByRole('button', { name: 'New schedule' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel('Every').fill('12');
  await dialog.getByLabel(/^Or a file/).fill('chats.jsonl');
  await dialog.getByLabel('Name of the mask set').fill('nightly');
  await dialog.getByLabel(/^A first set in minutes/).check();
  await dialog.getByLabel('When learned').selectOption('live');
  await dialog.getByLabel(/^Step by step/).check();
  await dialog.getByLabel(/^Roll back at an error rate/).fill('2');
  await expectAccessible(page, 'the form of a schedule');
  // This backend opens no folder, so the edge refuses it; the key that was made for it must not stay.
  await dialog.getByRole('button', { name: 'Create' }).click();
  await dialog.getByText('forbidden', { exact: true }).waitFor();
  expect(complaints.splice(0)).toEqual([expect.stringContaining('403')]);
  const keys = async () => {
    const path = '/keys?state=working&q=schedule%20on';
    const { data } = await dashboard.client.request({ method: 'GET', path }, listSchema(apiKeySchema));
    return data.map(({ name, kind }) => `${kind}: ${name}`);
  };
  expect(await keys()).toEqual([]);

  await dialog.getByLabel(/^Or a file/).fill('');
  const buffer = Buffer.from('{"text": "Water boils at 100 degrees."}\n');
  await dialog
    .getByLabel(/^Prompts/)
    .setInputFiles({ name: 'chats.jsonl', mimeType: 'application/x-ndjson', buffer });
  await dialog.getByRole('button', { name: 'Create' }).click();
  const row = schedules.getByRole('row', { name: 'nightly' });
  await row.getByText('12h').waitFor();
  await row
    .getByText('goes live for all tenants without a set of their own, in 3 steps, automatic rollback')
    .waitFor();
  expect(await keys()).toEqual(['admin: schedule on default: nightly']);
  const path = '/backends/default/jobs/schedules';
  const made = await dashboard.client.request({ method: 'GET', path }, listSchema(scheduleSchema));
  expect(made.data.map(({ job }) => job)).toMatchObject([{ name: 'nightly', quick: true }]);
  await expectAccessible(page, 'a schedule');

  await row.getByRole('button', { name: 'Delete' }).press('Enter');
  await page
    .getByRole('dialog')
    .getByRole('button', { name: /^Delete schedule_/ })
    .press('Enter');
  await schedules.getByText('No schedules on this backend yet').waitFor();
  expect(complaints).toEqual([]);
}, 60_000);
