/** Children of `npm start` that are killed, refuse, hang or lose their parent: nothing stays behind. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { type Supervised, supervise } from '../../../gpu-backend/dev/children.ts';
import type { ServiceConfig } from './fixtures/service.ts';

const STOP_ms = 5000;
let folder: string;
let running: Supervised | undefined;
let said: string[];
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'supervise-'));
  said = [];
});
afterEach(async () => {
  await running?.stop(STOP_ms);
  running = undefined;
  rmSync(folder, { recursive: true });
});

const logFile = () => path.join(folder, 'service.log');
async function start(
  config: Partial<ServiceConfig> = {},
  log = logFile(),
  { start_ms = 20_000, signal }: { start_ms?: number; signal?: AbortSignal } = {},
): Promise<Supervised> {
  const entry = new URL('./fixtures/service.ts', import.meta.url);
  const full: ServiceConfig = { port: 0, refuse: false, closes: true, hangs: 'never', ...config };
  const probe = { every_ms: 50, timeout_ms: 1000, failuresMax: 2 };
  const options = { name: 'service', entry, config: full, logFile: log, probe, start_ms };
  running = await supervise(options, (line) => said.push(line), signal);
  return running;
}

type Pids = { pid: number; below: number };
const pidsAt = async (url: string): Promise<Pids> => (await fetch(url)).json() as Promise<Pids>;
/** Without those that have ended and that their new parent has not heard of yet: process 1 may look every two seconds only. */
const isAlive = (pid: number): boolean => {
  try {
    process.kill(pid, 0);
    return process.platform !== 'linux' || !readFileSync(`/proc/${pid}/stat`, 'utf8').includes(') Z ');
  } catch {
    return false;
  }
};
const allGone = (pids: Pids) =>
  vi.waitFor(() => expect([isAlive(pids.pid), isAlive(pids.below)]).toEqual([false, false]), 20_000);

test('a child that was killed comes back on its port; what it had started is gone', async () => {
  const { url } = await start();
  const first = await pidsAt(url);
  process.kill(first.pid, 'SIGKILL');
  await allGone(first);
  const second = await vi.waitFor(() => pidsAt(url), 20_000);
  expect(second.pid).not.toBe(first.pid);
  await vi.waitFor(() => expect(said.at(-1)).toMatch(/service runs again/), 20_000);
  expect(said[0]).toMatch(/service ended \(signal SIGKILL\)/);
});

test.each(['hangs', 'says that it is not well'])('a child that %s is killed and comes back', async (how) => {
  const { url } = await start();
  const first = await pidsAt(url);
  if (how === 'hangs') process.kill(first.pid, 'SIGSTOP');
  else await fetch(`${url}/fail`);
  await vi.waitFor(() => expect(said.at(-1)).toMatch(/service runs again/), 20_000);
  expect(said[0]).toMatch(/service ended \(it no longer answered\)/);
  await allGone(first);
  expect((await pidsAt(url)).pid).not.toBe(first.pid);
});

test('a child that can no longer work ends by itself and comes back', async () => {
  const { url } = await start();
  const first = await pidsAt(url);
  await fetch(`${url}/go`);
  await vi.waitFor(() => expect(said.at(-1)).toMatch(/service runs again/), 20_000);
  expect(said[0]).toMatch(/service ended \(exit code 1\)/);
  expect(readFileSync(logFile(), 'utf8')).toContain('it can no longer work');
  await allGone(first);
});

test.runIf(process.platform === 'linux')('a full disk costs the log and not the child', async () => {
  const { url } = await start({}, '/dev/full');
  const { pid } = await pidsAt(url);
  for (let i = 0; i < 5; i++) expect((await pidsAt(url)).pid).toBe(pid);
  expect(said).toEqual([]);
});

test.runIf(process.platform === 'linux').each([
  ['a backend’s log', 'main.ts', 'openLog', 'const log = openLog();', "log.info('a line')"],
  ['lines of npm start', 'dev/children.ts', 'outliveOutput', 'outliveOutput();', "console.log('a line')"],
])(
  'a full disk costs %s, and it still ends',
  async (_, file, name, begin, write) => {
    const script = `
    import { setTimeout as sleep } from 'node:timers/promises';
    import { ${name} } from ${JSON.stringify(path.resolve('gpu-backend', file))};
    ${begin}
    for (let i = 0; i < 5; i++) { ${write}; await sleep(20); }
    process.exit(7);`;
    const full = openSync('/dev/full', 'w');
    const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
      stdio: ['ignore', full, 'ignore'],
      timeout: 20_000,
      killSignal: 'SIGKILL',
    });
    expect(await once(child, 'exit')).toEqual([7, null]);
    closeSync(full);
  },
  30_000,
);

test('a stop of a child that hangs does not bring it back', async () => {
  const { url, stop } = await start();
  const pids = await pidsAt(url);
  process.kill(pids.pid, 'SIGSTOP');
  await stop(100);
  await allGone(pids);
  expect(said).toEqual([]);
});

test('a stop ends the child and its group', async () => {
  const { url, stop } = await start();
  const pids = await pidsAt(url);
  await stop(STOP_ms);
  await allGone(pids);
  expect(said).toEqual([]);
});

test.each(['stop', 'drain'] as const)('a %s while the child is down does not bring it back', async (what) => {
  const service = await start();
  const { url } = service;
  process.kill((await pidsAt(url)).pid, 'SIGKILL');
  await vi.waitFor(() => expect(said.length).toBe(1), 20_000);
  await service[what](STOP_ms);
  await sleep(1000);
  await expect(fetch(url)).rejects.toThrow();
});

test('a child that dies while it drains stays down', async () => {
  const { url, drain, stop } = await start();
  const { pid } = await pidsAt(url);
  process.kill(pid, 'SIGSTOP');
  const drained = drain(STOP_ms);
  process.kill(pid, 'SIGKILL');
  await drained;
  await vi.waitFor(() => expect(said).toEqual([expect.stringMatching(/service ended \(signal SIGKILL\)/)]));
  expect(said[0]).not.toMatch(/again/);
  await stop(STOP_ms);
  expect(said.length).toBe(1);
});

test.each(['drain', 'stop'] as const)('a child that has just died is no trouble to a %s', async (what) => {
  const service = await start();
  const { pid } = await pidsAt(service.url);
  process.kill(pid, 'SIGKILL');
  // So long nothing of its end can be heard here.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300);
  await service[what](STOP_ms);
});

test('a start that takes its time ends when it is called off, and so does what it has begun', async () => {
  const stop = new AbortController();
  const starting = start({ hangs: 'first' }, logFile(), { signal: stop.signal });
  starting.catch(() => undefined);
  const pids = await vi.waitFor(() => {
    const said = /^process (\d+), below it (\d+)$/m.exec(readFileSync(logFile(), 'utf8'))!;
    return { pid: Number(said[1]), below: Number(said[2]) };
  }, 20_000);
  stop.abort(new Error('called off'));
  await expect(starting).rejects.toThrow('called off');
  await allGone(pids);
});

test('a child that does not close is killed after the limit', async () => {
  const { url, stop } = await start({ closes: false });
  const pids = await pidsAt(url);
  await stop(100);
  await allGone(pids);
});

test('the reason of a refused start is the child’s own', async () => {
  await expect(start({ refuse: true })).rejects.toMatchObject({
    code: 'invalid_argument',
    message: 'This service was told to refuse.',
  });
});

test('a child that hangs while it starts is given up', async () => {
  await expect(start({ hangs: 'first' }, logFile(), { start_ms: 500 })).rejects.toMatchObject({
    code: 'start_failed',
    message: expect.stringMatching(/^The service did not start within 0\.5 s; see /),
  });
});

test('a stop does not wait for a child that hangs while it starts again', async () => {
  const { url, stop } = await start({ hangs: 'again' });
  process.kill((await pidsAt(url)).pid, 'SIGKILL');
  await vi.waitFor(() => expect(said.length).toBe(1), 20_000);
  await new Promise((resolve) => setTimeout(resolve, 1000));
  await stop(100);
  expect(said.length).toBe(1);
});

test.each(['', 'stuck'])('a killed parent takes everything along %s', async (how) => {
  const entry = path.resolve(import.meta.dirname, 'fixtures/parent.ts');
  const parent = spawn(process.execPath, [entry, logFile(), how], { stdio: ['ignore', 'pipe', 'inherit'] });
  const [line] = (await once(parent.stdout, 'data')) as [Buffer];
  const pids = await pidsAt(line.toString().trim());
  parent.kill('SIGKILL');
  await allGone(pids);
});
