/** The upstream of `bench edge` under an edge whose clients leave, and what is left of the benches of the edge when they are stopped. */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { text } from 'node:stream/consumers';
import { afterAll, expect, test } from 'vitest';
import { startUpstream } from '../../../gpu-backend/bench/edge-peers.ts';
import { DEFAULT_MODEL } from '../../../gpu-backend/model/sources/resolve.ts';
import { cpuTime_ms, processTree } from '../../../gpu-backend/processes.ts';
import { readMaskSet } from '../../../gpu-backend/publication/publish.ts';
import { eventually } from '../api/harness.ts';

const upstream = await startUpstream(await readMaskSet(`gpu-backend/presets/${DEFAULT_MODEL}/mask-set.json`));
afterAll(() => upstream.stop());

const ask = (stream: boolean) =>
  fetch(upstream.target.url, { method: 'POST', body: JSON.stringify({ stream }) });

test('it goes on answering when a client hangs up, half-way through its question or in the answer', async () => {
  const { port } = new URL(upstream.url);
  const socket = connect(Number(port), '127.0.0.1');
  await once(socket, 'connect');
  socket.write('POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"stream"');
  socket.resetAndDestroy();
  await once(socket, 'close');
  const stream = await ask(true);
  await stream.body?.cancel();
  expect(await (await ask(true)).text()).toMatch(/data: \[DONE\]\n\n$/);
});

test('it does not know what an answer cost', async () => {
  const cost = await fetch(`${upstream.url}/v1/answers/0123456789`);
  expect(cost.status).toBe(404);
  expect(await (await ask(false)).json()).toMatchObject({ object: 'chat.completion' });
});

/** Empty once the process is gone. */
function commandOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8');
  } catch {
    return '';
  }
}

/** Whether a bench has started the last of its parts, or its workerd has computed for longer than it takes to start. */
function isUnderWay(name: string, parts: readonly number[]): boolean {
  if (name === 'edge') return parts.some((pid) => commandOf(pid).includes('portkey'));
  const runtime = parts.filter((pid) => commandOf(pid).includes('workerd'));
  return runtime.length > 0 && cpuTime_ms(runtime)! > 1000;
}

const stopped = [(bench: ChildProcess) => bench.kill('SIGTERM'), [130, null]] as const;
const left = [(bench: ChildProcess) => bench.disconnect(), [130, null]] as const;
const killed = [(bench: ChildProcess) => bench.kill('SIGKILL'), [null, 'SIGKILL']] as const;

test.skipIf(process.platform !== 'linux').each([
  ['edge', 'is stopped', ...stopped],
  ['edge', 'loses its parent', ...left],
  ['edge', 'is killed', ...killed],
  ['route', 'is stopped', ...stopped],
  ['route', 'is killed', ...killed],
  ['publish', 'is stopped', ...stopped],
  ['publish', 'is killed', ...killed],
] as const)(
  'a bench %s that %s ends what it started, and leaves no folder if it can',
  async (name, _, end, exit) => {
    const folder = mkdtempSync(path.join(tmpdir(), 'bench-stopped-'));
    const words = ['bench', name, '--requests', '1000000', '--json'];
    const bench = fork('bin/maskroute.js', words, { env: { ...process.env, TMPDIR: folder }, silent: true });
    const said = Promise.all([text(bench.stdout!), text(bench.stderr!)]);
    const ended = once(bench, 'exit');
    const parts = () => processTree(bench.pid!);
    await eventually(() => isUnderWay(name, parts()), 60_000);
    const started = parts();
    end(bench);
    expect(await ended).toEqual(exit);
    await eventually(() => started.every((pid) => commandOf(pid) === ''));
    if (exit[0] !== null) {
      expect(await said).toEqual(['', 'Stopped.\n']);
      expect(readdirSync(folder)).toEqual([]);
    }
    rmSync(folder, { recursive: true });
  },
  120_000,
);
