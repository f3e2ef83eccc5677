/** What killed runs and evaluations go on from: torn lines, foreign runs, numbers to the last bit. */
import { spawnSync } from 'node:child_process';
import {
  appendFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { z } from 'zod';
import { openKeptResults, openRunJournal } from '../../../gpu-backend/learning/journal.ts';
import { openUnitJournal } from '../../../gpu-backend/learning/units/unit-journal.ts';

let folder = '';
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'maskroute-journal-'));
});
afterEach(() => rmSync(folder, { recursive: true }));
const path = () => join(folder, 'deeper', 'state.jsonl');

async function ask(
  names: readonly string[],
  key = 'key',
): Promise<{ computed: string[]; values: number[][]; said: string[] }> {
  const said: string[] = [];
  const journal = await openRunJournal(path(), key, (line) => said.push(line));
  const computed: string[] = [];
  const values: number[][] = [];
  for (const name of names) {
    const found = await journal.result(name, async () => {
      computed.push(name);
      return [name.length / 3, Math.fround(1 / 7), 5e-324];
    });
    values.push([...found]);
  }
  return { computed, values, said };
}

it('computes each result once, and reads back the same bits', async () => {
  const first = await ask(['a', 'bb', 'a']);
  expect(first.computed).toEqual(['a', 'bb']);
  const again = await ask(['a', 'bb', 'ccc']);
  expect(again.computed).toEqual(['ccc']);
  expect(again.values.slice(0, 2)).toEqual(first.values.slice(0, 2));
});

it('cut anywhere, it keeps the whole lines before the cut and goes on', async () => {
  await ask(['a', 'bb', 'ccc']);
  const whole = readFileSync(path(), 'utf8');
  for (let length = 0; length < whole.length; length += 7) {
    writeFileSync(path(), whole);
    truncateSync(path(), length);
    const kept = Math.max(0, whole.slice(0, length).split('\n').length - 2);
    expect((await ask(['a', 'bb', 'ccc'])).computed).toEqual(['a', 'bb', 'ccc'].slice(kept));
    expect(readFileSync(path(), 'utf8')).toBe(whole);
  }
});

it('drops a damaged line and everything behind it', async () => {
  await ask(['a', 'bb', 'ccc']);
  writeFileSync(path(), readFileSync(path(), 'utf8').replace('["bb",[', '["bb",[null,'));
  expect((await ask(['a', 'bb', 'ccc'])).computed).toEqual(['bb', 'ccc']);
});

it('is begun anew for other inputs, and says so, refuses what is no number, and can be removed', async () => {
  expect(await ask(['a'])).toMatchObject({ computed: ['a'], said: [] });
  const said = [expect.stringContaining(`${path()} has is of a run with other data or flags`)];
  expect(await ask(['a'], 'other')).toMatchObject({ computed: ['a'], said });
  expect(await ask(['a'], 'other')).toMatchObject({ computed: [], said: [] });
  const journal = await openRunJournal(path(), 'other', () => {});
  await expect(journal.result('nan', async () => [Number.NaN])).rejects.toThrow(/nan gave NaN/);
  await journal.remove();
  expect((await ask(['a'], 'other')).computed).toEqual(['a']);
});

it('computes once for all who ask at the same time, and again after it failed', async () => {
  const journal = await openRunJournal(path(), 'key', () => {});
  let computed = 0;
  const compute = async () => {
    const isFirst = ++computed === 1;
    await sleep(1);
    if (isFirst) throw new Error('out of memory');
    return [1];
  };
  const both = () => Promise.allSettled([journal.result('a', compute), journal.result('a', compute)]);
  expect(await both()).toMatchObject(Array(2).fill({ status: 'rejected' }));
  expect(computed).toBe(1);
  expect(await both()).toEqual(Array(2).fill({ status: 'fulfilled', value: [1] }));
  expect(computed).toBe(2);
});

it('kept results are shared by all who ask the same question, and lose no line but a damaged one', async () => {
  const ask = (question: unknown) => openKeptResults(folder, question, z.strictObject({ kl: z.number() }));
  const [one, other] = [await ask({ model: 1, text: 'a' }), await ask({ text: 'a', model: 1 })];
  await one.set('x', { kl: 1 / 3 });
  await other.set('y', { kl: 2 });
  const [file] = readdirSync(join(folder, 'evaluations'));
  expect(readdirSync(join(folder, 'evaluations'))).toEqual([file]);
  // A line of another form, and one that a kill tore.
  appendFileSync(join(folder, 'evaluations', file!), '["x",{"loss":1}]\n["z",{"kl"');
  await (await ask({ model: 1, text: 'a' })).set('w', { kl: 3 });
  const again = await ask({ model: 1, text: 'a' });
  expect(['x', 'y', 'z', 'w'].map((name) => again.get(name)?.kl)).toEqual([1 / 3, 2, undefined, 3]);
  expect((await ask({ model: 2, text: 'a' })).size).toBe(0);
  await expect(again.set('nan', { kl: Number.NaN })).rejects.toThrow(RangeError);
});

it('clears what killed runs and workers left of unfinished files, but not what others are writing', async () => {
  const units = join(folder, 'units');
  mkdirSync(join(units, 'ab'), { recursive: true });
  mkdirSync(join(folder, 'deeper'));
  const hour_s = 3600;
  for (const [file, age_s] of [
    [join(units, 'ab', '.abc.json.0123abcd'), 2 * hour_s],
    [join(units, 'ab', '.abc.json.4567abcd'), 0],
    [join(units, 'ab', 'abd.json'), 2 * hour_s],
    [join(folder, 'deeper', '.state.jsonl.0123abcd'), 2 * hour_s],
  ] as const) {
    writeFileSync(file, '');
    utimesSync(file, Date.now() / 1000, Date.now() / 1000 - age_s);
  }
  await openUnitJournal(units, () => {});
  expect(readdirSync(join(units, 'ab')).sort()).toEqual(['.abc.json.4567abcd', 'abd.json']);
  await openRunJournal(path(), 'key', () => {});
  expect(readdirSync(join(folder, 'deeper'))).toEqual(['state.jsonl']);
});

it('on a full disk names the file that cannot be written, and resumes', async () => {
  const module = new URL('../../../gpu-backend/learning/journal.ts', import.meta.url).href;
  const write = `const journal = await (await import('${module}')).openRunJournal('${path()}', 'key', () => {});
    for (let i = 0; i < 9; i++) await journal.result('result ' + i, async () => Array(100).fill(1 / 3));`;
  // No file may have more than 8 KB.
  const shell = `ulimit -f 8; exec "${process.execPath}" --input-type=module -e "${write}"`;
  const { stderr } = spawnSync('sh', ['-c', shell], { encoding: 'utf8' });
  expect(stderr).toContain(`EFBIG: file too large, write '${path()}'`);
  const journal = await openRunJournal(path(), 'key', () => {});
  expect(journal.get('result 0')).toHaveLength(100);
  expect(journal.size).toBeLessThan(9);
});

it('a journal of units whose head could not be written is begun anew by the next one', async () => {
  const module = new URL('../../../gpu-backend/learning/units/unit-journal.ts', import.meta.url).href;
  const open = `(await import('${module}')).openUnitJournal('${folder}', () => {})`;
  // No file may have a byte, as on a full disk.
  const shell = `ulimit -f 0; exec "${process.execPath}" --input-type=module -e "await ${open}"`;
  const { status, stderr } = spawnSync('sh', ['-c', shell], { encoding: 'utf8' });
  expect([status, stderr]).toEqual([1, expect.stringContaining('cannot be used: EFBIG')]);
  expect(readdirSync(folder)).toEqual([]);
  expect((await openUnitJournal(folder, () => expect.unreachable())).id).toMatch(/^[0-9a-f-]{36}$/);
  expect(readdirSync(folder)).toEqual(['journal.json']);
});

it('a journal of units whose head another machine just writes is waited for; a damaged one is refused', async () => {
  const head = join(folder, 'journal.json');
  const say = () => expect.unreachable();
  writeFileSync(head, '');
  const opened = openUnitJournal(folder, say);
  await sleep(50);
  const id = '2f1a5c1e-7c1b-4d52-9a55-0d8f0d1f6a11';
  writeFileSync(head, JSON.stringify({ id }));
  expect((await opened).id).toBe(id);
  writeFileSync(head, '{');
  await expect(openUnitJournal(folder, say)).rejects.toMatchObject({
    code: 'storage_failed',
    message: expect.stringMatching(/journal\.json is damaged; delete it/),
  });
});
