/** The page of a report: what stands first, and how it fits a window. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { reportHtml } from '../../../gpu-backend/learning/report/write-report.ts';
import { expectFits } from '../../e2e/browser.ts';
import { madeUpEvaluation } from '../../support/evaluation.ts';

const folder = mkdtempSync(path.join(tmpdir(), 'maskroute-report-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

test('it begins with a verdict in two sentences, and each time has its spread', () => {
  const made = madeUpEvaluation('v_1');
  const rows = made.rows.map((row) => ({
    ...row,
    msPerTokenSpread: [row.msPerToken - 0.1, row.msPerToken + 0.2] as [number, number],
  }));
  const html = reportHtml({ evaluation: { ...made, rows } });
  const verdict = /<p class="verdict">(.*?)<\/p>/s.exec(html)![1]!;
  expect(verdict).toBe(
    'The learned masks take 11.9 % less time per token than dense (5.20 ms/token (5.10 to 5.40) and 5.90 ms/token (5.80 to 6.10)) and agree with it on 78.0 % of tokens. They are nearer to dense than the best other method with as many blocks skipped, one-mask (KL 0.260 against 0.280).',
  );
  expect(html).toContain('5.15 ms/token (5.05 to 5.35)');
});

test('it fits 390 and 1440 pixels, light and dark', async () => {
  const file = path.join(folder, 'report.html');
  writeFileSync(file, reportHtml({ evaluation: madeUpEvaluation('v_1') }));
  await expectFits(file);
}, 60_000);
