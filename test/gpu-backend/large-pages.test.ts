import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { withLargePages } from '../../gpu-backend/large-pages.js';

const ON_REQUEST = 'always [madvise] never\n';
const ASKED = 'glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1';

test.each([
  [{}, ASKED],
  [{ GLIBC_TUNABLES: '' }, ASKED],
  [{ GLIBC_TUNABLES: 'glibc.malloc.check=0' }, `glibc.malloc.check=0:${ASKED}`],
  [{ GLIBC_TUNABLES: 'glibc.malloc.arena_max=2' }, 'glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1'],
])('a process asks for large pages where Linux gives them on request: %o', (env, tunables) => {
  const other = { ...env, PATH: '/bin' };
  expect(withLargePages(other, ON_REQUEST)).toEqual({ PATH: '/bin', GLIBC_TUNABLES: tunables });
  expect(other).toEqual({ ...env, PATH: '/bin' });
});

test.each([
  ['the user has decided', { GLIBC_TUNABLES: 'glibc.malloc.hugetlb=0' }, ON_REQUEST],
  ['all memory has them', {}, '[always] madvise never\n'],
  ['nothing has them', {}, 'always madvise [never]\n'],
  ['the system has none', {}, ''],
])('the environment stays if %s', (_, env, setting) => {
  expect(withLargePages(env, setting)).toBe(env);
});

/** Prints its variable and its arguments when it ends. */
const PRINT =
  'data:text/javascript,process.on("exit",()=>console.log(process.env.GLIBC_TUNABLES,process.argv.slice(2)))';

test('a command has large pages from its start, and its flags and output as given', () => {
  const env = { ...process.env };
  delete env.GLIBC_TUNABLES;
  const words = ['--import', PRINT, 'bin/maskroute.js', '--version'];
  const { stdout, status } = spawnSync(process.execPath, words, { env, encoding: 'utf8' });
  const expected = withLargePages(env).GLIBC_TUNABLES;
  expect(stdout.split('\n').slice(1)).toEqual([`${expected} [ '--version' ]`, '']);
  expect(status).toBe(0);
});

/** The C library hides the variable from a program that has privileges of its own, such as the right to use low ports. */
const HIDE = 'data:text/javascript,delete process.env.GLIBC_TUNABLES';

test('a command whose process is not given the variable starts once more and not for ever', () => {
  const words = ['--import', HIDE, '--import', PRINT, 'bin/maskroute.js', '--version'];
  const { stdout } = spawnSync(process.execPath, words, { encoding: 'utf8', timeout: 20_000 });
  expect(stdout.split('\n').slice(1)).toEqual(["undefined [ '--version' ]", '']);
});

/** Reserves 512 MB for keys and values, writes a value in each 2 MB, and prints what became resident, in MB. */
const RESERVE = `
  import { roomFor } from './gpu-backend/engine/kv-cache.ts';
  import { readFileSync } from 'node:fs';
  const resident_MB = () => Number(/Rss:\\s+(\\d+)/.exec(readFileSync('/proc/self/smaps_rollup', 'utf8'))[1]) / 1024;
  const before_MB = resident_MB();
  const buffers = Array.from({ length: 8 }, () => roomFor('f32', 2 ** 24));
  for (const buffer of buffers) for (let i = 0; i < buffer.length; i += 2 ** 19) buffer[i] = 1;
  console.log(resident_MB() - before_MB, buffers.length);`;

/** In another thread, as the engine is: allocates 900 blocks of 100 kB and prints how much is in large pages, in MB. */
const ALLOCATE = `
  import { readFileSync } from 'node:fs';
  import { Worker } from 'node:worker_threads';
  const blocks = \`
    import { parentPort } from 'node:worker_threads';
    const kept = Array.from({ length: 900 }, () => Buffer.allocUnsafeSlow(100_000).fill(1));
    parentPort.postMessage(kept.length);
    setInterval(() => kept, 1000);\`;
  new Worker(blocks, { eval: true }).once('message', () => {
    console.log(/AnonHugePages:\\s+(\\d+)/.exec(readFileSync('/proc/self/smaps_rollup', 'utf8'))[1] / 1024);
    process.exit();
  });`;

const givesOnRequest = (() => {
  try {
    return readFileSync('/sys/kernel/mm/transparent_hugepage/enabled', 'utf8') === ON_REQUEST;
  } catch {
    return false;
  }
})();

test.skipIf(!givesOnRequest)('room for keys and values is not resident before it is used', () => {
  expect(megabytesOf(RESERVE)).toBeLessThan(100);
});

test.skipIf(!givesOnRequest)('what another thread allocates is in large pages', () => {
  expect(megabytesOf(ALLOCATE)).toBeGreaterThan(60);
});

function megabytesOf(program: string): number {
  const env = { ...process.env, GLIBC_TUNABLES: ASKED };
  const words = ['--input-type=module', '-e', program];
  const { stdout, stderr } = spawnSync(process.execPath, words, { env, encoding: 'utf8' });
  expect(stderr).toBe('');
  return Number.parseFloat(stdout);
}
