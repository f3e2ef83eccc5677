/** What is scored never calibrates, and nothing that a set was learned on is scored. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { finish } from '../../../../gpu-backend/event-loop.ts';
import { readData } from '../../../../gpu-backend/learning/data/read-data.ts';
import { splitRows } from '../../../../gpu-backend/learning/data/samples.ts';
import type { DataOptions } from '../../../../gpu-backend/learning/evaluation/scored-rows.ts';
import { pickRows, readEvaluationData } from '../../../../gpu-backend/learning/evaluation/scored-rows.ts';

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

const options = (changes: Partial<DataOptions>): DataOptions => ({
  data: [file('a')],
  calibration: [],
  facts: [],
  learnedOn: [],
  calibrates: true,
  ...changes,
});
const heldOutOf = async (name: string) => texts(finish(splitRows(await readData([file(name)]), 0.1)).heldOut);
/** Writes rows of text, in that order. */
const write = (name: string, rows: readonly string[]) =>
  writeFileSync(file(name), rows.map((text) => JSON.stringify({ text })).join('\n'));

describe('rows of an evaluation', () => {
  it('without calibration files: half of them calibrate, the other half is scored', async () => {
    const found = await readEvaluationData(options({}));
    expect(overlap(texts(found.scored), texts(found.calibration))).toEqual([]);
    expect(found.scored.length + found.calibration.length).toBe(200);
    expect(found.scored.length).toBeGreaterThan(70);
  });

  it('of files that a set was learned on, only what learning held out is scored', async () => {
    const data = [file('a'), file('b')];
    for (const calibration of [[], [file('b')]]) {
      const found = await readEvaluationData(options({ data, calibration, learnedOn: ['a.jsonl'] }));
      const ofA = texts(found.scored).filter((text) => text.startsWith('a'));
      expect(ofA.sort()).toEqual((await heldOutOf('a')).sort());
      expect(overlap(texts(found.scored), texts(found.calibration))).toEqual([]);
    }
  });

  it('of files that share nothing, all of one is scored and all of the other calibrates, as they stand', async () => {
    const found = await readEvaluationData(options({ calibration: [file('b')] }));
    expect(texts(found.scored)).toEqual(texts(await readData([file('a')])));
    expect(texts(found.calibration)).toEqual(texts(await readData([file('b')])));
  });

  it('count once, in one file or in several', async () => {
    write('twice', ['b says 1', 'new', 'b says 2', 'new']);
    const found = await readEvaluationData(
      options({ data: [file('b'), file('twice')], calibration: [file('a')] }),
    );
    expect(texts(found.scored)).toEqual([...texts(await readData([file('b')])), 'new']);
    expect(found.counts).toEqual({ read: 204, repeated: 3, calibrating: 0, learnedOn: 0, left: 201 });
  });

  it('that calibrate are known under another name; the tenth that learning held out is scored instead', async () => {
    write('renamed', ['unseen', ...texts(await readData([file('a')])).reverse()]);
    const found = await readEvaluationData(
      options({ data: [file('renamed')], calibration: [file('a'), file('b')] }),
    );
    const heldOut = await heldOutOf('a');
    expect(heldOut.length).toBeGreaterThan(5);
    expect(texts(found.scored)).toEqual(['unseen', ...heldOut.toReversed()]);
    expect(overlap(texts(found.scored), texts(found.calibration))).toEqual([]);
    expect(found.calibration).toHaveLength(400 - heldOut.length);
    const calibrating = 200 - heldOut.length;
    expect(found.counts).toMatchObject({ read: 201, calibrating, learnedOn: 0, left: heldOut.length + 1 });
  });

  it('that a set was learned on are known in other files as well', async () => {
    write('copy', texts(await readData([file('a')])));
    const data = [file('copy'), file('a')];
    for (const calibration of [[], [file('b')]]) {
      const found = await readEvaluationData(options({ data, calibration, learnedOn: ['a.jsonl'] }));
      expect(texts(found.scored)).toEqual(await heldOutOf('a'));
      expect(overlap(texts(found.scored), texts(found.calibration))).toEqual([]);
      const gone = 200 - found.scored.length;
      expect(found.counts).toMatchObject(
        calibration.length === 0 ? { calibrating: gone, learnedOn: 0 } : { calibrating: 0, learnedOn: gone },
      );
    }
  });

  it('that are facts neither calibrate nor were learned on', async () => {
    write('facts', ['a says 1', 'a fact', 'a fact', ...(await heldOutOf('b')), 'b says 1', 'b says 2']);
    const facts = [file('facts')];
    const unseen = ['a fact', ...(await heldOutOf('b'))];
    const found = await readEvaluationData(
      options({ data: [file('b')], calibration: [file('a')], facts, learnedOn: ['b.jsonl'] }),
    );
    expect(texts(found.facts)).toEqual(unseen);
    await expect(
      readEvaluationData(options({ facts: [file('a')], learnedOn: ['a.jsonl'] })),
    ).resolves.toMatchObject({
      facts: { length: (await heldOutOf('a')).length },
    });
    write('facts', ['b says 1']);
    await expect(readEvaluationData(options({ facts, calibration: [file('b')] }))).rejects.toThrow(
      /No row of --facts is left/,
    );
  });

  it('says when nothing is left, of one row too', async () => {
    const [first] = finish(splitRows(await readData([file('a')]), 0.5)).fit;
    write('one', [first!.routeText]);
    const one = options({ data: [file('one')] });
    const why = 'No row is left to score: of 1 rows 0 are repeated, 1 calibrate, 0 were learned on';
    await expect(readEvaluationData(one)).rejects.toThrow(why);
    await expect(readEvaluationData({ ...one, calibration: [file('a')] })).rejects.toThrow(why);
    const [heldOut] = await heldOutOf('a');
    write('one', [heldOut!]);
    await expect(readEvaluationData(one)).rejects.toThrow(/No row is left to calibrate on.*--calibration/);
    expect(await readEvaluationData({ ...one, calibrates: false })).toMatchObject({ scored: { length: 1 } });
    write('one', []);
    await expect(readEvaluationData(one)).rejects.toThrow(/no row with a prompt in .*one\.jsonl/);
  });

  it('are picked evenly over kinds, equally for equal seeds', async () => {
    const rows = await readData([file('a'), file('b')]);
    const picked = pickRows(rows, 30, 7);
    expect(picked.filter(({ kind }) => kind === 'a')).toHaveLength(15);
    expect(pickRows(rows, 30, 7)).toEqual(picked);
    expect(pickRows(rows, 30, 8)).not.toEqual(picked);
    expect(pickRows(rows, 1000, 7)).toHaveLength(400);
  });

  it('are picked in no time from many of one kind', async () => {
    const [row] = await readData([file('a')]);
    const picked = pickRows(new Array(250_000).fill(row), 64, 1);
    expect(picked).toHaveLength(64);
  });
});
