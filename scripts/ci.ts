/**
 * Everything that `npm run check` does, counted: each static check is one test, then the tests themselves.
 * A runner that crashes counts as a failure. The last line is `N passed, N failed`.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type Counts, countReport } from './test-report.ts';

const STATIC_CHECKS = ['lint', 'types', 'imports', 'deploy:check'];

const succeeds = (...npmArguments: string[]): boolean =>
  spawnSync('npm', npmArguments, { stdio: 'inherit' }).status === 0;

function runTests(): Counts {
  const folder = mkdtempSync(path.join(tmpdir(), 'test-report-'));
  const report = path.join(folder, 'report.json');
  const reporters = ['--reporter=default', '--reporter=json', `--outputFile.json=${report}`];
  const green = succeeds('test', '--', ...reporters);
  let text = '';
  try {
    text = readFileSync(report, 'utf8');
  } catch {
    console.error('The test runner wrote no report.');
  }
  rmSync(folder, { recursive: true });
  return countReport(text, green);
}

const checks = STATIC_CHECKS.map((name) => ({ name, green: succeeds('run', name) }));
const tests = runTests();
for (const { name } of checks.filter((check) => !check.green)) console.error(`npm run ${name} failed`);
const passed = checks.filter((check) => check.green).length + tests.passed;
const failed = checks.filter((check) => !check.green).length + tests.failed;
process.exitCode = failed === 0 ? 0 : 1;
console.log(`${passed} passed, ${failed} failed`);
