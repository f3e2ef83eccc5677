/** The page of a report: what stands first. `learn.test.ts` looks at pages in a browser. */
import { expect, test } from 'vitest';
import { reportHtml } from '../../../gpu-backend/learning/report/write-report.ts';
import { madeUpEvaluation } from '../../support/evaluation.ts';

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
