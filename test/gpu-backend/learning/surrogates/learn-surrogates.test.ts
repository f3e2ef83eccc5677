/** Learning a table, whole: what it writes, the same again by seed, and the same after it was stopped half-way. */
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { deserialize, serialize } from 'node:v8';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { pullModel } from '../../../../gpu-backend/cli/models.ts';
import { finish } from '../../../../gpu-backend/event-loop.ts';
import { parseRow } from '../../../../gpu-backend/learning/data/read-data.ts';
import { HELD_OUT_SHARE, splitRows } from '../../../../gpu-backend/learning/data/samples.ts';
import { fastestRounding, ROUNDINGS } from '../../../../gpu-backend/learning/gates/rounding.ts';
import { drawAround, drawMask, rankedMask } from '../../../../gpu-backend/learning/surrogates/draw-mask.ts';
import type { LearnSurrogatesOptions } from '../../../../gpu-backend/learning/surrogates/learn-surrogates.ts';
import { learnSurrogates } from '../../../../gpu-backend/learning/surrogates/learn-surrogates.ts';
import { type InstalledModel, sha256OfFiles } from '../../../../gpu-backend/model/store.ts';
import { readSurrogates } from '../../../../gpu-backend/model/surrogates.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { tinyLlama, writeGguf } from '../../../support/gguf.ts';
import { installTinyModel } from '../../../support/tiny-model.ts';

let home: string;
let model: InstalledModel;
let data: string;
beforeAll(async () => {
  home = await mkdtemp(path.join(tmpdir(), 'maskroute-learn-surrogates-'));
  const source = path.join(home, 'tiny.gguf');
  await writeFile(source, writeGguf(tinyLlama()));
  model = await pullModel(source, { home, weights: 'f32', log: () => {}, onProgress: () => {} });
  data = path.join(home, 'rows.jsonl');
  const random = createRandom(5);
  const words = 'the ship came back in spring with salt and seven letters from a harbour far away'.split(' ');
  const row = () => Array.from({ length: 16 }, () => words[random.below(words.length)]).join(' ');
  await writeFile(data, Array.from({ length: 1200 }, () => JSON.stringify({ text: row() })).join('\n'));
}, 60_000);
afterAll(() => rm(home, { recursive: true }));

/** The state is saved at the tenth. */
const STEPS = 14;
type Changes = Pick<Partial<LearnSurrogatesOptions>, 'model' | 'data'> & {
  readonly start?: Partial<LearnSurrogatesOptions['start']>;
  readonly steps?: number;
  readonly stopAt?: number;
  readonly onStep?: (step: number) => void;
  /** The run is told to stop soon after the first block is fitted. */
  readonly stopsInFit?: boolean;
};
const learn = (
  out: string,
  { start, steps = STEPS, stopAt, onStep, stopsInFit = false, ...changes }: Changes = {},
) => {
  const stop = new AbortController();
  let fitted = 0;
  return learnSurrogates({
    model,
    data: { files: [data] },
    start: { rank: 32, fitSequences: 48, ...start },
    distillation: { steps },
    seed: 3,
    out: path.join(home, out),
    threads: 1,
    onProgress: (stage, done) => {
      if (stage === 'fit') fitted = done;
      if (stopsInFit && fitted > 0) setImmediate(() => stop.abort(new Error(`stopped at ${fitted}`)));
      if (stage !== 'distil') return;
      if (done === stopAt) stop.abort(new Error('stopped'));
      onStep?.(done);
    },
    log: () => {},
    signal: stop.signal,
    ...changes,
  });
};
/** Hashed: a runner takes minutes to print how so many bytes differ. */
const bytes = (out: string) => sha256OfFiles([path.join(home, out)]);

test('distillation lowers the held-out KL; stopped and started again it ends with the same bytes', async () => {
  const whole = await learn('whole.safetensors');
  expect(whole.steps).toBe(STEPS);
  expect(whole.distilled).toBeLessThan(whole.start);
  const { model: hash, table, fitted } = await readSurrogates(path.join(home, 'whole.safetensors'));
  expect(hash).toBe(model.manifest.hash);
  expect(table).toMatchObject({ blockCount: 4, hiddenSize: 64, rank: 32 });
  expect(fitted).toMatch(/^closed form, 14 steps of distillation$/);
  const from = path.join(home, 'whole.safetensors');
  const more = await learn('more.safetensors', { steps: 1, start: { from } });
  expect(Math.abs(more.start - whole.distilled)).toBeLessThan(0.02);
  await expect(learn('stopped.safetensors', { stopAt: 12 })).rejects.toThrow('stopped');
  expect(existsSync(path.join(home, 'stopped.safetensors'))).toBe(false);
  expect(await learn('stopped.safetensors')).toEqual(whole);
  expect(await bytes('stopped.safetensors')).toEqual(await bytes('whole.safetensors'));
  expect(existsSync(path.join(home, 'stopped.safetensors.state'))).toBe(false);
});

test('the fit of a table stops between two blocks', async () => {
  await expect(learn('unfitted.safetensors', { stopsInFit: true })).rejects.toThrow('stopped at 1');
});

test('two runs do not write one table: the second would drop what the first has saved', async () => {
  let second: Promise<unknown> | undefined;
  const first = learn('one.safetensors', {
    steps: 12,
    onStep: (step) => {
      // Early: on a busy machine the second reads its rows for some steps of the first.
      if (step === 1) second ??= learn('one.safetensors', { steps: 0 }).catch((error) => error);
    },
  });
  expect(await first).toMatchObject({ steps: 12 });
  expect(await second).toMatchObject({
    code: 'conflict',
    message: expect.stringMatching(/^Another run writes .*one\.safetensors: .*--out/),
  });
  expect((await readSurrogates(path.join(home, 'one.safetensors'))).fitted).toMatch(/12 steps/);
});

test('a run rounds as the machine did that began it', async () => {
  const rounded = await installTinyModel(path.join(home, 'rounded'), 'q8', { contextTokens: 128 });
  const asked = { model: rounded, steps: 12 };
  await learn('own.safetensors', asked);
  await expect(learn('moved.safetensors', { ...asked, stopAt: 11 })).rejects.toThrow('stopped');
  const file = path.join(home, 'moved.safetensors.state');
  const state = deserialize(await readFile(file));
  expect(state.run.rounding).toBe(await fastestRounding());
  state.run.rounding = ROUNDINGS.find((rounding) => rounding !== state.run.rounding);
  await writeFile(file, serialize(state));
  await learn('moved.safetensors', asked);
  expect(await bytes('moved.safetensors')).not.toEqual(await bytes('own.safetensors'));
});

test('a damaged state, or that of other inputs, is begun anew', async () => {
  await writeFile(path.join(home, 'closed.safetensors.state'), 'no state');
  // A kill left half of one, too.
  const half = path.join(home, '.closed.safetensors.state.0123abcd');
  await writeFile(half, 'no st');
  await utimes(half, 0, 0);
  const closed = await learn('closed.safetensors', { steps: 0 });
  expect(existsSync(half)).toBe(false);
  expect(closed).toMatchObject({ steps: 0, distilled: closed.start });
  expect((await readSurrogates(path.join(home, 'closed.safetensors'))).fitted).toBe('closed form');
});

test('the same rows as other kinds are other inputs: a run that was stopped does not go on with them', async () => {
  const lines = (await readFile(data, 'utf8')).split('\n');
  const half = async (name: string, from: number) => {
    const file = path.join(home, name);
    await mkdir(path.dirname(file), { recursive: true });
    await writeFile(file, `${lines.slice(from, from + 600).join('\n')}\n`);
    return file;
  };
  const [two, one] = [
    [await half('letters.jsonl', 0), await half('logs.jsonl', 600)],
    [await half('first/rows.jsonl', 0), await half('second/rows.jsonl', 600)],
  ];
  await expect(learn('kinds.safetensors', { data: { files: two }, stopAt: 12 })).rejects.toThrow('stopped');
  await learn('kinds.safetensors', { data: { files: one } });
  await learn('fresh.safetensors', { data: { files: one } });
  expect(await bytes('kinds.safetensors')).toEqual(await bytes('fresh.safetensors'));
});

test('nothing is fitted on prompts that masks are judged by, and no row counts twice', async () => {
  const chat = await installTinyModel(path.join(home, 'chat'), 'f32', { contextTokens: 128 });
  const random = createRandom(8);
  const letters = (count: number) =>
    Array.from({ length: count }, () => 'abcdefgh '[random.below(9)]).join('');
  const rows = Array.from({ length: 100 }, (_, i) => ({
    question: `${i} ${letters(30)}`,
    answer: letters(60),
  }));
  const parsed = rows.map((row) => parseRow(JSON.stringify(row), 'k', 'f:1'));
  const { heldOut } = finish(splitRows(parsed, HELD_OUT_SHARE));
  const judged = new Set(heldOut.map(({ routeText }) => routeText));
  const fitOn = async (name: string, some: readonly object[]) => {
    const file = path.join(home, `${name}.jsonl`);
    await writeFile(file, some.map((row) => JSON.stringify(row)).join('\n'));
    await learn(name, { steps: 0, model: chat, data: { files: [file] }, start: { fitSequences: 200 } });
    return bytes(name);
  };
  const table = await fitOn('as-it-is', rows);
  const others = rows.map((row) => (judged.has(row.question) ? { ...row, answer: letters(60) } : row));
  expect(judged.size).toBeGreaterThan(5);
  expect(others).not.toEqual(rows);
  expect(await fitOn('others', others)).toEqual(table);
  expect(await fitOn('twice', [...rows, ...rows])).toEqual(table);
  expect(await fitOn('fewer', rows.slice(0, 75))).not.toEqual(table);
});

test('what cannot be is refused before the work', async () => {
  await expect(learn('')).rejects.toMatchObject({
    code: 'invalid_argument',
    message: expect.stringMatching(/ is a folder, not a regular file\.$/),
  });
  await expect(learn('wide.safetensors', { start: { rank: 96 } })).rejects.toThrow(
    /at most 64, its hidden size, not 96/,
  );
  await expect(learn('odd.safetensors', { start: { rank: 33 } })).rejects.toThrow(/multiple of 32/);
  await expect(learn('from.safetensors', { start: { from: data } })).rejects.toThrow(
    /rows\.jsonl is no table of surrogates/,
  );
  await expect(learn('from-nowhere.safetensors', { start: { from: '/nowhere' } })).rejects.toThrow(
    /^\/nowhere cannot be read: there is no such file\.$/,
  );
  await expect(learn('few.safetensors', { data: { files: [data], rowsMax: 20 } })).rejects.toMatchObject({
    code: 'invalid_data',
  });
});

test('masks are drawn within their bounds, the dear blocks never, the cheap ones more often', () => {
  const costs = Array.from({ length: 60 }, (_, i) => (i === 1 ? 1.3 : 0.01 + 0.002 * i));
  const random = createRandom(9);
  const counts = Array<number>(60).fill(0);
  for (let draw = 0; draw < 600; draw++) {
    const runs = drawMask(costs, random);
    const skipped = runs.reduce((sum, value) => sum + 1 - value, 0);
    expect(skipped).toBeGreaterThanOrEqual(6);
    expect(skipped).toBeLessThanOrEqual(21);
    runs.forEach((value, block) => {
      counts[block]! += 1 - value;
    });
  }
  expect(counts[1]).toBe(0);
  expect(counts[0]! + counts[2]!).toBeGreaterThan(2 * (counts[56]! + counts[58]!));
  expect(Math.min(...counts.filter((_, block) => block !== 1))).toBeGreaterThan(10);
});

test('a mask near one in use has as many blocks of each kind out, and few others', () => {
  const costs = Array.from({ length: 60 }, (_, i) => (i === 1 ? 1.3 : 0.01 + 0.002 * i));
  const inUse = rankedMask(costs, 5, 3);
  const random = createRandom(4);
  const outOf = (runs: Uint8Array, kind: number) => runs.filter((r, b) => b % 2 === kind && r === 0).length;
  const changes = new Set<number>();
  for (let draw = 0; draw < 200; draw++) {
    const runs = drawAround([inUse], costs, random);
    expect([outOf(runs, 0), outOf(runs, 1)]).toEqual([5, 3]);
    expect(runs[1]).toBe(1);
    changes.add(runs.filter((value, block) => value !== inUse[block]).length / 2);
  }
  expect([...changes].sort()).toEqual([0, 1, 2, 3]);
  expect([...inUse]).toEqual([...rankedMask(costs, 5, 3)]);
});

test('a ranked mask skips the cheapest of each kind', () => {
  expect([...rankedMask([5, 1, 3, 2, 4, 9], 2, 1)]).toEqual([1, 0, 0, 1, 0, 1]);
});
