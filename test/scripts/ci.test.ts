/** The counts that CI reports, on reports as vitest writes them. */
import { expect, test } from 'vitest';
import { countReport } from '../../scripts/ci.ts';

const report = (passed: number, failed: number, files: { status: string; tests: string[] }[]): string =>
  JSON.stringify({
    numPassedTests: passed,
    numFailedTests: failed,
    testResults: files.map(({ status, tests }) => ({
      status,
      assertionResults: tests.map((result, i) => ({ status: result, fullName: `test ${i}` })),
    })),
  });

const ONE_FAILED = report(1, 1, [{ status: 'failed', tests: ['passed', 'failed'] }]);
const BROKEN_FILE = report(1, 0, [
  { status: 'passed', tests: ['passed'] },
  { status: 'failed', tests: [] },
]);
const GOOD = report(2, 0, [{ status: 'passed', tests: ['passed', 'passed'] }]);

test.each([
  ['all passed', GOOD, true, { passed: 2, failed: 0 }],
  ['one failed', ONE_FAILED, false, { passed: 1, failed: 1 }],
  ['a file that does not load', BROKEN_FILE, false, { passed: 1, failed: 1 }],
  ['a runner that crashed after its report', GOOD, false, { passed: 2, failed: 1 }],
  ['no report', '', false, { passed: 0, failed: 1 }],
  ['a report cut short', GOOD.slice(0, 30), true, { passed: 0, failed: 1 }],
  [
    'one did not run',
    report(1, 0, [{ status: 'passed', tests: ['passed', 'skipped'] }]),
    true,
    { passed: 1, failed: 0, skipped: ['test 1'] },
  ],
  ['no test at all', report(0, 0, []), true, { passed: 0, failed: 1 }],
])('%s', (_name, text, green, counts) => {
  expect(countReport(text, green)).toEqual({ skipped: [], ...counts });
});
