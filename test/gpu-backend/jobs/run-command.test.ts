import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';
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
