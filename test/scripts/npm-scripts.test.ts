/** npm's scripts as a person calls them: each says what it takes, and is refused with exit code 2 what it does not. */
import { execFile } from 'node:child_process';
import { expect, test } from 'vitest';
import manifest from '../../package.json' with { type: 'json' };

/** Those that are programs of this project, by name. The command line has a test of its own. */
const SCRIPTS = Object.entries(manifest.scripts).flatMap(([name, line]) => {
  const [, words] = /^(?:exec )?node ((?:scripts|gpu-backend)\/\S+\.ts(?: \w+)?)$/.exec(line) ?? [];
  return words === undefined ? [] : [[name, words.split(' ')] as const];
});

const call = (words: readonly string[], env: Record<string, string> = {}) =>
  new Promise<{ status: unknown; stdout: string; stderr: string }>((resolve) => {
    execFile(process.execPath, words, { env: { ...process.env, ...env } }, (error, stdout, stderr) =>
      resolve({ status: error === null ? 0 : error.code, stdout, stderr }),
    );
  });

test('all of them are looked at', () => {
  const names = SCRIPTS.map(([name]) => name);
  expect(names).toEqual(
    expect.arrayContaining(['start', 'demo', 'load', 'soak', 'attack', 'backup', 'restore']),
  );
  const others = Object.keys(manifest.scripts).filter((name) => !names.includes(name));
  expect(others.sort()).toEqual(['check', 'format', 'lint', 'maskroute', 'pretest', 'test', 'types']);
});

test.concurrent.each(SCRIPTS)('npm run %s', async (name, words) => {
  const [help, refused] = await Promise.all([
    call([...words, '--help']),
    // What must be given is missing, or what is given is unknown.
    call([...words, '--no-such-option']),
  ]);
  expect([help.status, help.stderr]).toEqual([0, '']);
  expect(help.stdout).toMatch(new RegExp(`^Usage: npm (run )?${name} -- `));
  expect(help.stdout).toMatch(new RegExp(`\nExamples?:\n  npm (run )?${name}`));
  expect(refused.stderr).toMatch(/^error: .*\n\(run with --help for the options\)\n$/);
  expect([refused.status, refused.stdout]).toEqual([2, '']);
});

test.concurrent.each([
  ['a soak too short to say whether memory is flat', ['scripts/soak.ts', '--minutes', '2']],
  ['a load too short to compare memory', ['scripts/load.ts', '--seconds', '9']],
  ['a random model of no layers', ['scripts/random-model.ts', '--layers', 'four', '--out', 'x']],
  ['a random model in no known format', ['scripts/random-model.ts', '--format', 'onnx', '--out', 'x']],
])('%s is refused', async (_, words) => {
  const { status, stdout, stderr } = await call(words);
  expect(stderr).toMatch(/^error: .* is invalid\. (expected a whole number above \d|Allowed choices)/);
  expect([status, stdout]).toEqual([2, '']);
});

test('a soak whose folder cannot be made says so before it begins', async () => {
  const { status, stderr } = await call(['scripts/soak.ts', '--out', 'package.json']);
  expect([status, stderr.split(',')[0]]).toEqual([1, 'error: EEXIST: file already exists']);
});

test.concurrent.each([
  ['valkey', 'VALKEY_SERVER'],
  ['browser', 'CHROMIUM'],
])('npm run %s says so when %s names no file', async (tool, name) => {
  const { status, stderr } = await call(['scripts/test-tools.ts', tool], { [name]: '/nowhere/tool' });
  expect([status, stderr]).toEqual([1, `${name} names /nowhere/tool, and there is no such file.\n`]);
});
