/** A wish to stop that comes twice is one wish; what comes later is another. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';
import { eventually } from './api/harness.ts';

const MODULE = fileURLToPath(new URL('../../gpu-backend/stop-signals.ts', import.meta.url));
/** Needs 2.5 s to end once it is told to. */
const PROGRAM = `import { onStopSignal } from ${JSON.stringify(MODULE)};
const listenNoMore = onStopSignal(() => { console.log('stopping'); listenNoMore(); setTimeout(() => process.exit(0), 2500); });
setInterval(() => {}, 1000);
console.log('ready');`;

function start() {
  const child = spawn(process.execPath, ['--input-type=module-typescript', '-e', PROGRAM], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let said = '';
  child.stdout.on('data', (text) => {
    said += text;
  });
  return { child, said: () => said, ended: once(child, 'close') };
}

it('the same signal at once is the same wish, and another one is no more', async () => {
  const { child, said, ended } = start();
  await eventually(() => said().includes('ready'));
  child.kill('SIGINT');
  await eventually(() => said().includes('stopping'));
  child.kill('SIGINT');
  child.kill('SIGTERM');
  expect(await ended).toEqual([0, null]);
  expect(said().match(/stopping/g)).toHaveLength(1);
});

it('the same signal later ends it at once', async () => {
  const { child, said, ended } = start();
  await eventually(() => said().includes('ready'));
  child.kill('SIGTERM');
  await eventually(() => said().includes('stopping'));
  await sleep(1200);
  child.kill('SIGTERM');
  expect(await ended).toEqual([null, 'SIGTERM']);
});
