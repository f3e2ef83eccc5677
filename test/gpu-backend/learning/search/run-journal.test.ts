/** The journal that a killed run goes on from: torn lines, foreign runs, numbers to the last bit. */
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { openJournal } from '../../../../gpu-backend/learning/search/run-journal.ts';

let folder = '';
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'maskroute-journal-'));
});
afterEach(() => rmSync(folder, { recursive: true }));
const path = () => join(folder, 'deeper', 'state.jsonl');

async function ask(
  names: readonly string[],
  key = 'key',
): Promise<{ computed: string[]; values: number[][] }> {
  const journal = await openJournal(path(), key);
  const computed: string[] = [];
  const values: number[][] = [];
  for (const name of names) {
    const found = await journal.numbers(name, async () => {
      computed.push(name);
      return [name.length / 3, Math.fround(1 / 7), 5e-324];
    });
    values.push([...found]);
  }
  await journal.close();
  return { computed, values };
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

it('is begun anew for other inputs, refuses what is no number, and can be removed', async () => {
  await ask(['a']);
  expect((await ask(['a'], 'other')).computed).toEqual(['a']);
  const journal = await openJournal(path(), 'other');
  await expect(journal.numbers('nan', async () => [Number.NaN])).rejects.toThrow(/nan gave NaN/);
  await journal.remove();
  expect((await ask(['a'], 'other')).computed).toEqual(['a']);
});
