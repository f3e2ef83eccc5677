/** What is scored never calibrates, and nothing that a set was learned on is scored. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readData } from '../../../gpu-backend/calibration/read-data.ts';
import { splitRows } from '../../../gpu-backend/calibration/split.ts';
import { pickRows, readEvaluationData } from '../../../gpu-backend/evaluation/data.ts';

let folder = '';
const file = (name: string) => join(folder, `${name}.jsonl`);
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'maskroute-data-'));
  for (const name of ['a', 'b']) {
    const rows = Array.from({ length: 200 }, (_, i) => JSON.stringify({ text: `${name} says ${i}` }));
    writeFileSync(file(name), rows.join('\n'));
  }
});
afterAll(() => rmSync(folder, { recursive: true }));

const texts = (rows: readonly { routeText: string }[]) => rows.map(({ routeText }) => routeText);
const overlap = (a: readonly string[], b: readonly string[]) => a.filter((text) => b.includes(text));

describe('rows of an evaluation', () => {
  it('without calibration files: half of them calibrate, the other half is scored', async () => {
    const found = await readEvaluationData({ data: [file('a')], calibration: [], learnedOn: [] });
    expect(overlap(texts(found.scored), texts(found.calibration))).toEqual([]);
    expect(found.scored.length + found.calibration.length).toBe(200);
    expect(found.scored.length).toBeGreaterThan(70);
  });

  it('of files that a set was learned on, only what learning held out is scored', async () => {
    const { rows } = await readData([file('a')]);
    const { heldOut } = splitRows(rows, 0.1);
    const options = { data: [file('a'), file('b')], learnedOn: ['a.jsonl'] };
    for (const calibration of [[], [file('b')]]) {
      const found = await readEvaluationData({ ...options, calibration });
      const ofA = texts(found.scored).filter((text) => text.startsWith('a'));
      expect(ofA.sort()).toEqual(texts(heldOut).sort());
      expect(overlap(texts(found.scored), texts(found.calibration))).toEqual([]);
    }
  });

  it('says when nothing is left to score', async () => {
    const all = { data: [file('a')], calibration: [file('a')], learnedOn: [] };
    await expect(readEvaluationData(all)).rejects.toThrow(/No row is left to score/);
  });

  it('are picked evenly over kinds, equally for equal seeds', async () => {
    const { rows } = await readData([file('a'), file('b')]);
    const picked = pickRows(rows, 30, 7);
    expect(picked.filter(({ kind }) => kind === 'a')).toHaveLength(15);
    expect(pickRows(rows, 30, 7)).toEqual(picked);
    expect(pickRows(rows, 30, 8)).not.toEqual(picked);
    expect(pickRows(rows, 1000, 7)).toHaveLength(400);
  });
});
