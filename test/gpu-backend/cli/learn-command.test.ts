/** `learn` and `surrogates` on the command line, where an installed model decides what may be asked. */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { tinyHome } from '../learning/evaluation/tiny.ts';
import { writeSmallData } from '../learning/small-run.ts';
import { saidInProcess } from './in-process.ts';

test.each([
  ['a sparsity of less than half a block', ['--sparsity', '0.05'], /less than half a block of 8/, 2],
  [
    'counts that cannot be',
    ['--sparsity', '0.5', '--attention', '1', '--ffn', '1'],
    /No mask leaves out 50/,
    1,
  ],
  [
    'a context that nothing is timed with',
    ['--sparsity', '0.5', '--context', '90'],
    /--context needs --cost/,
    2,
  ],
  [
    'a context beside an earlier set',
    ['--sparsity', '0.5', '--cost', 'time', '--context', '90', '--from', 'mask-set.json'],
    /--context has no effect with --from/,
    2,
  ],
  ['surrogates that the model lacks', ['--sparsity', '0.5', '--surrogate'], /tiny has no surrogates/, 2],
] as const)(
  'refuses %s in one line, and writes no mask set',
  async (_what, flags, reason, code) => {
    using tiny = await tinyHome();
    const data = await writeSmallData(join(tiny.home, 'data'));
    const out = join(tiny.home, 'out');
    const args = ['learn', '--model', 'tiny', '--data', ...data, '--clusters', '2', '--out', out, ...flags];
    const { status, stdout, stderr } = await saidInProcess({ MASKROUTE_HOME: tiny.home }, args);
    expect(stderr.trim().split('\n').at(-1)).toMatch(/^error: /);
    expect(stderr).toMatch(reason);
    expect([status, stdout]).toEqual([code, '']);
    expect(existsSync(join(out, 'mask-set.json'))).toBe(false);
  },
  60_000,
);

test('surrogates start from those that the model has', async () => {
  using tiny = await tinyHome();
  const data = join(tiny.home, 'rows.jsonl');
  const row = (i: number) =>
    JSON.stringify({ text: `${i} ships came back in spring with salt and letters. `.repeat(3) });
  writeFileSync(data, Array.from({ length: 150 }, (_, i) => row(i)).join('\n'));
  const run = (out: string, ...flags: string[]) => {
    const common = ['surrogates', '--model', 'tiny', '--data', data, '--steps', '0'];
    return saidInProcess({ MASKROUTE_HOME: tiny.home }, [...common, '--out', join(tiny.home, out), ...flags]);
  };
  const refused = await run('none', '--from', 'installed');
  expect(refused.stderr).toMatch(/tiny has no surrogates to start from/);
  expect(refused.status).toBe(2);
  expect(await run('first', '--rank', '32', '--install')).toMatchObject({ status: 0 });
  expect(await run('again', '--from', 'installed')).toMatchObject({ status: 0 });
  expect(readFileSync(join(tiny.home, 'again'))).toEqual(readFileSync(join(tiny.home, 'first')));
}, 60_000);

test('names a wrong path before it measures what the run will take', async () => {
  using tiny = await tinyHome();
  const [data] = await writeSmallData(join(tiny.home, 'data'));
  const file = join(tiny.home, 'a-file');
  writeFileSync(file, 'no folder, no mask set, no encoder');
  const nowhere = join(tiny.home, 'nowhere.jsonl');
  for (const [flags, reason] of [
    [['--data', nowhere], /nowhere\.jsonl cannot be read/],
    [['--data', data!, '--out', file], /a-file cannot be made/],
    [['--data', data!, '--from', file], /a-file: is not JSON/],
    [['--data', data!, '--encoder', 'nobody'], /nobody is neither all-minilm/],
  ] as const) {
    const args = ['learn', '--model', 'tiny', '--clusters', '2', '--sparsity', '0.5', '--out', tiny.home];
    // A folder for runs that have a queue means nothing to one without.
    const env = { MASKROUTE_HOME: tiny.home, MASKROUTE_JOURNAL: join(tiny.home, 'units') };
    const { status, stderr } = await saidInProcess(env, [...args, ...flags]);
    expect(stderr.trim().split('\n')).toEqual([expect.stringMatching(reason)]);
    expect(status).toBeGreaterThan(0);
  }
}, 60_000);

test('compares numbers of clusters with holes, held against the text, as the paper does', async () => {
  using tiny = await tinyHome();
  const data = await writeSmallData(join(tiny.home, 'data'));
  const out = join(tiny.home, 'out');
  const flags = [
    '--clusters',
    '1,2',
    '--rows',
    '20',
    '--no-surrogate',
    '--loss',
    'next-token',
    '--sparsity',
    '0.25',
  ];
  const args = ['learn', '--model', 'tiny', '--data', ...data, '--out', out, ...flags, '--quick', '--json'];
  const { status, stdout, stderr } = await saidInProcess({ MASKROUTE_HOME: tiny.home }, args);
  expect([status, stderr.includes('error:')]).toEqual([0, false]);
  const rows = stdout
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
  expect(rows.map(({ clusters }) => clusters)).toEqual([1, 2]);
  for (const { clusters, kl, oneMask_kl } of rows) {
    expect(kl).toBeGreaterThan(0);
    if (clusters === 1) expect(kl).toBe(oneMask_kl);
    const set = JSON.parse(readFileSync(join(out, `clusters-${clusters}`, 'mask-set.json'), 'utf8'));
    expect([set.surrogate, set.learned.effort.targets]).toEqual([false, 'next-token']);
    expect(set.clusters).toHaveLength(clusters);
  }
}, 180_000);

test('says of a set without held-out prompts that no edge makes it live', async () => {
  using tiny = await tinyHome();
  const [data] = await writeSmallData(join(tiny.home, 'data'));
  const out = join(tiny.home, 'out');
  const args = ['learn', '--model', 'tiny', '--data', data!, '--rows', '3', '--clusters', '1', '--out', out];
  const quick = ['--sparsity', '0.25', '--quick'];
  const { status, stdout, stderr } = await saidInProcess({ MASKROUTE_HOME: tiny.home }, [...args, ...quick]);
  expect([status, stdout.includes('publish')]).toEqual([0, false]);
  expect(stderr).toMatch(/too few prompts to hold any out, .* Learn it with more prompts\.\n$/);
}, 120_000);

test('makes a first set quickly, and says whether routing pays', async () => {
  using tiny = await tinyHome();
  const data = await writeSmallData(join(tiny.home, 'data'));
  const out = join(tiny.home, 'out');
  const args = ['learn', '--model', 'tiny', '--data', ...data, '--clusters', '4', '--out', out];
  const more = ['--rows', '20', '--masks', '2', '--sparsity', '0.25', '--quick'];
  const { status, stdout, stderr } = await saidInProcess({ MASKROUTE_HOME: tiny.home }, [...args, ...more]);
  expect([status, stderr.includes('error:')]).toEqual([0, false]);
  const set = JSON.parse(readFileSync(join(out, 'mask-set.json'), 'utf8'));
  const masks = new Set(set.clusters.map(({ bits }: { bits: string }) => bits));
  expect(set.clusters).toHaveLength(4);
  expect(set.learned.masks).toBe(masks.size);
  expect(masks.size).toBeLessThanOrEqual(2);
  expect(masks.has(set.learned.oneMask)).toBe(true);
  // Either several masks lead one, and the figures stand there, or the reason does.
  expect(stdout).toMatch(masks.size > 1 ? /routing +KL .* -\d/ : /All clusters share one mask: /);
  expect(set.learned.oneMaskReason === undefined).toBe(masks.size > 1);
}, 120_000);
