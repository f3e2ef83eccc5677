/** What the dashboard's builds leave beside the libraries that checkouts share. */
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { expect, test } from 'vitest';
import { forgetGoneCheckouts } from '../../scripts/build-dashboard.ts';

test('records of checkouts that are gone go, too', async () => {
  const folder = mkdtempSync(path.join(tmpdir(), 'build-records-'));
  const write = (name: string, content: object) =>
    writeFileSync(path.join(folder, name), JSON.stringify(content));
  write('here.json', { checkout: folder, sources: 'a', files: [] });
  write('gone.json', { checkout: path.join(folder, 'gone'), sources: 'a', files: [] });
  write('of-an-earlier-release.json', { sources: 'a', files: [] });
  write('.written-by-another-build', {});
  await forgetGoneCheckouts(folder);
  expect(readdirSync(folder).sort()).toEqual(['.written-by-another-build', 'here.json']);
  rmSync(folder, { recursive: true });
});
