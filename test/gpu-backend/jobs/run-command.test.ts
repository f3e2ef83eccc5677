import { fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it, vi } from 'vitest';
import { tryLock } from '../../../gpu-backend/files.ts';
import { runCommand } from '../../../gpu-backend/jobs/run-command.ts';

it('a stop in the moment when the log is being opened ends the command, too', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-command-'));
  const stop = new AbortController();
  const command = runCommand({
    entry: fileURLToPath(new URL('./fixtures/command.ts', import.meta.url)),
    args: ['learn', '--data', 'hang.jsonl', '--out', folder],
    env: { MASKROUTE_JOB_FOLDER: folder },
    logFile: join(folder, 'log'),
    signal: stop.signal,
  });
  let step = command.next();
  stop.abort();
  while (!(await step).done) step = command.next();
  expect((await step).value).toEqual({ kind: 'stopped' });
  rmSync(folder, { recursive: true });
});

it('a command that had done its work when it was to stop is done', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-command-'));
  const entry = join(folder, 'command.js');
  writeFileSync(
    entry,
    `process.once('SIGTERM', () => console.log('live') ?? process.exit(0));
    setInterval(() => {}, 1000);
    console.log(JSON.stringify({ progress: { stage: 's', done: 1, total: 1, left_s: null, detail: '' } }));`,
  );
  const stop = new AbortController();
  const run = { entry, args: [], env: {}, logFile: join(folder, 'log'), signal: stop.signal };
  const command = runCommand(run);
  await command.next();
  stop.abort();
  expect((await command.next()).value).toEqual({ kind: 'done', lastLine: 'live' });
  rmSync(folder, { recursive: true });
});

it('a command gets none of the keys that a backend has', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-command-'));
  const entry = join(folder, 'command.js');
  const keys = ['MASKROUTE_BACKEND_KEY', 'MASKROUTE_BACKEND_KEY_2', 'MASKROUTE_METRICS_KEY'];
  const found = `${JSON.stringify(keys)}.map((name) => process.env[name])`;
  writeFileSync(entry, `console.log(JSON.stringify(${found})); process.disconnect();`);
  for (const name of keys) vi.stubEnv(name, `secret of ${name}`);
  const signal = new AbortController().signal;
  const end = await runCommand({ entry, args: [], env: {}, logFile: join(folder, 'log'), signal }).next();
  vi.unstubAllEnvs();
  expect(end).toEqual({ done: true, value: { kind: 'done', lastLine: '["","",""]' } });
  rmSync(folder, { recursive: true });
});

it.each([
  ['an uncaught error', 'throw Object.assign(new RangeError("That is no number."), { code: 7 });'],
  ['an error with its stack', 'console.error(new RangeError("That is no number.")); process.exit(1);'],
])('%s ends a command with its message, not with its stack', async (_what, code) => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-command-'));
  const entry = join(folder, 'command.js');
  writeFileSync(entry, code);
  const signal = new AbortController().signal;
  const end = await runCommand({ entry, args: [], env: {}, logFile: join(folder, 'log'), signal }).next();
  const reason = 'RangeError: That is no number. (exit code 1)';
  expect(end).toEqual({ done: true, value: { kind: 'failed', reason } });
  rmSync(folder, { recursive: true });
});

it('a job says that it waits for an earlier run, begins at its end, and ends with its parent meanwhile', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-command-'));
  const entry = fileURLToPath(new URL('./fixtures/command.ts', import.meta.url));
  const data = join(folder, 'ok.jsonl');
  writeFileSync(data, '');
  const args = ['learn', '--data', data, '--out', folder];
  const env = { MASKROUTE_JOB_FOLDER: folder };
  const unlock = tryLock(join(folder, 'lock'))!;
  const orphan = fork(entry, args, {
    env: { ...process.env, ...env, MASKROUTE_PROGRESS: 'json' },
    stdio: 'pipe',
  });
  await once(orphan.stdout!, 'data');
  orphan.disconnect();
  expect(await once(orphan, 'exit')).toEqual([null, 'SIGKILL']);
  const signal = new AbortController().signal;
  const command = runCommand({ entry, args, env, logFile: join(folder, 'log'), signal });
  expect((await command.next()).value).toMatchObject({ stage: expect.stringContaining('an earlier run') });
  unlock();
  let step = await command.next();
  while (!step.done) step = await command.next();
  expect(step.value).toMatchObject({ kind: 'done' });
  rmSync(folder, { recursive: true });
});

it('a job whose parent went before it could listen goes, too', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'maskroute-command-'));
  const entry = join(folder, 'job.mjs');
  const terminal = new URL('../../../gpu-backend/cli/terminal.ts', import.meta.url).href;
  writeFileSync(
    entry,
    `await new Promise((gone) => process.once('disconnect', gone));
    const { becomeJob } = await import(${JSON.stringify(terminal)});
    becomeJob(${JSON.stringify(folder)});`,
  );
  const child = fork(entry);
  child.disconnect();
  expect(await once(child, 'exit')).toEqual([null, 'SIGKILL']);
  rmSync(folder, { recursive: true });
});
