/**
 * `npm run ci`: runs everything that `npm run check` runs, and counts. Each static check counts as a test. A crash of the
 * runner counts as a failure; skipped tests are listed. The last line is `N passed, N failed`.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import path from 'node:path';
import { z } from 'zod';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';

const STATIC_CHECKS = ['lint', 'types', 'imports', 'deploy:check'];

type Counts = {
  readonly passed: number;
  readonly failed: number;
  /** Names of tests that did not run. */
  readonly skipped: readonly string[];
};

function main(): void {
  const checks = STATIC_CHECKS.map((name) => ({ name, isGreen: succeeds('run', name) }));
  const tests = runTests();
  const red = checks.filter(({ isGreen }) => !isGreen);
  for (const { name } of red) console.error(`npm run ${name} failed`);
  for (const name of tests.skipped) console.error(`did not run: ${name}`);
  const failed = red.length + tests.failed;
  process.exitCode = failed === 0 ? 0 : 1;
  console.log(`${checks.length - red.length + tests.passed} passed, ${failed} failed`);
}

const succeeds = (...npmArguments: string[]): boolean =>
  spawnSync('npm', npmArguments, { stdio: 'inherit' }).status === 0;

function runTests(): Counts {
  const folder = mkdtempSync(path.join(tmpdir(), 'test-report-'));
  const report = path.join(folder, 'report.json');
  const reporters = ['--reporter=default', '--reporter=json', `--outputFile.json=${report}`];
  // On a busy machine, one of some thousands of timing tests fails. A retry tells that from a bug; the reporter marks
  // retried tests (`retry x1`). With more test files at a time than cores, timing tests fail more often; so this uses fewer
  // workers than `npm test`, and takes two minutes longer.
  const calm = ['--retry=1', `--maxWorkers=${Math.max(2, availableParallelism())}`];
  const isGreen = succeeds('test', '--', ...calm, ...reporters);
  let text = '';
  try {
    text = readFileSync(report, 'utf8');
  } catch {
    console.error('The test runner wrote no report.');
  }
  rmSync(folder, { recursive: true });
  return countReport(text, isGreen);
}

const reportSchema = z.object({
  numPassedTests: z.int(),
  numFailedTests: z.int(),
  testResults: z.array(
    z.object({
      status: z.string(),
      assertionResults: z.array(z.object({ status: z.string(), fullName: z.string() })),
    }),
  ),
});

/**
 * Counts the tests of vitest's JSON report. `isGreen`: whether the runner exited with 0. These count as one failure each: a
 * file that failed outside its tests, a runner that failed without a failed test, a missing report, and a run without tests.
 */
export function countReport(text: string, isGreen: boolean): Counts {
  const report = parse(text);
  if (report === undefined) return { passed: 0, failed: 1, skipped: [] };
  const filesFailedOutside = report.testResults.filter(
    (file) => file.status === 'failed' && file.assertionResults.every((test) => test.status !== 'failed'),
  ).length;
  const failed = report.numFailedTests + filesFailedOutside;
  const unexplained = failed === 0 && (!isGreen || report.numPassedTests === 0);
  const skipped = report.testResults
    .flatMap((file) => file.assertionResults)
    .filter(({ status }) => status !== 'passed' && status !== 'failed');
  return {
    passed: report.numPassedTests,
    failed: unexplained ? 1 : failed,
    skipped: skipped.map(({ fullName }) => fullName),
  };
}

function parse(text: string): z.infer<typeof reportSchema> | undefined {
  try {
    return reportSchema.parse(JSON.parse(text));
  } catch {
    return undefined;
  }
}

if (import.meta.main) {
  parseScript(newCommand('npm run ci --', 'run every check and test; the last line counts them'), [
    'npm run ci',
  ]);
  main();
}
