/** Progress of imports and of long pipelines, as a log file gets it; and what is asked before a change. */
import { PassThrough } from 'node:stream';
import { expect, test, vi } from 'vitest';
import { confirmChange } from '../../../gpu-backend/cli/edge-access.ts';
import {
  createEstimate,
  createReporter,
  duration,
  type Reporter,
  secondsLeft,
} from '../../../gpu-backend/cli/reporter.ts';

function logged(run: (reporter: Reporter) => void, clock?: () => number): string[] {
  const lines: string[] = [];
  const out = { isTTY: false, write: (text: string) => lines.push(text) } as unknown as NodeJS.WriteStream;
  run(createReporter(out, clock));
  return lines;
}

test('a stage of many steps is told in about twenty lines, the last one included', () => {
  const lines = logged((reporter) => {
    for (let done = 0; done <= 1000; done++) reporter.update('search', done, 1000);
  });
  expect(lines).toHaveLength(21);
  expect(lines[0]).toBe('search: 0 of 1000\n');
  expect(lines.at(-1)).toBe('search: 1000 of 1000, 0 s left\n');
});

test('stages and details follow each other', () => {
  const lines = logged((reporter) => {
    reporter.update('teacher', 1, 1);
    reporter.update('fit', 0, 0, 'loss 0.5');
  });
  expect(lines).toEqual(['teacher: 1 of 1\n', 'fit: 0 of 0 (loss 0.5)\n']);
});

test('what still ends after the work was stopped is not told', () => {
  const lines = logged((reporter) => {
    reporter.update('search', 1, 2);
    reporter.stop();
    reporter.update('search', 2, 2);
    reporter.onProgress({ phase: 'download', done: 1, total: undefined, unit: 'bytes' });
    reporter.log('Stopped.');
  });
  expect(lines).toEqual(['search: 1 of 2\n', 'Stopped.\n']);
});

test('an import tells every tenth of a phase, and only the title of a phase without a known size', () => {
  const lines = logged(({ onProgress, log }) => {
    onProgress({ phase: 'download', done: 1e6, total: undefined, unit: 'bytes' });
    onProgress({ phase: 'download', done: 2e6, total: undefined, unit: 'bytes' });
    for (let done = 0; done <= 100; done++)
      onProgress({ phase: 'download', done: done * 1e5, total: 1e7, unit: 'bytes' });
    log('From the hub.');
    onProgress({ phase: 'convert', done: 50, total: 100, unit: 'percent' });
  });
  expect(lines).toHaveLength(14);
  expect(lines.slice(0, 3)).toEqual([
    'Downloading …\n',
    'Downloading 0% · 0.0 of 10.0 MB\n',
    'Downloading 10% · 1.0 of 10.0 MB\n',
  ]);
  expect(lines.slice(-3)).toEqual([
    'Downloading 100% · 10.0 of 10.0 MB\n',
    'From the hub.\n',
    'Converting 50%\n',
  ]);
});

test('the time left is at the pace so far, work done before a restart left out', () => {
  expect(secondsLeft(10_000, 5, 15)).toBe(30);
  expect(secondsLeft(10_000, 0, 15)).toBeUndefined();
  expect([5, 65, 128, 600, 1139, 3725].map(duration)).toEqual([
    ...['5 s', '1 min 5 s', '2 min 10 s', '10 min', '19 min', '1 h 2 min'],
  ]);
});

/**
 * A run of four stages on a scripted clock: each takes 300 s, and the second ends when half of what was planned is done.
 * What one result takes differs by stage from what the plan says.
 */
function* scriptedRun() {
  const STAGES = [
    { planned: 300, done: 300, result_s: 1 },
    { planned: 300, done: 150, result_s: 2 },
    { planned: 200, done: 200, result_s: 1.5 },
    { planned: 300, done: 300, result_s: 1 },
  ];
  let [at_s, worked] = [0, 0];
  for (const [index, { planned, done, result_s }] of STAGES.entries()) {
    const later = STAGES.slice(index + 1).reduce((sum, stage) => sum + stage.planned, 0);
    for (let i = 0; i <= done; i++) {
      const work = { done: worked + i, total: worked + planned + later, known: 0 };
      if (i > 0) at_s += result_s;
      const run = { stage: `stage ${index + 1} of 4`, unit: 'results', work };
      yield { at_s, stage: `stage ${index + 1}`, done: i, total: planned, run };
    }
    worked += done;
  }
}
const RUN_s = 1200;

test('one estimate is for the whole run, and does not jump when a stage ends early or the pace changes', () => {
  let clock_s = 0;
  const estimate = createEstimate(() => 1000 * clock_s);
  const said: { at_s: number; left_s: number }[] = [];
  for (const { at_s, ...step } of scriptedRun()) {
    clock_s = at_s;
    const { left_s } = estimate(step);
    if (left_s !== undefined) said.push({ at_s, left_s });
  }
  // It takes some time before anything is said, and then it is always said.
  expect(said[0]!.at_s).toBeGreaterThanOrEqual(5);
  expect(said[0]!.at_s).toBeLessThan(20);
  for (const [i, { at_s, left_s }] of said.entries()) {
    expect(Math.abs(left_s - (RUN_s - at_s))).toBeLessThan(0.3 * RUN_s);
    const before = said[i - 1];
    if (before === undefined) continue;
    const passed_s = at_s - before.at_s;
    // It falls as time passes; beyond that it moves by a tenth of what is left at most.
    expect(Math.abs(before.left_s - passed_s - left_s)).toBeLessThanOrEqual(2 + 0.1 * before.left_s);
  }
  expect(said.at(-1)!.left_s).toBeLessThan(30);
});

test('what an earlier run did says nothing of the pace', () => {
  let clock_s = 0;
  const estimate = createEstimate(() => 1000 * clock_s);
  const at = (now_s: number, done: number, known: number) => {
    clock_s = now_s;
    const run = { stage: 'stage 1 of 1', unit: 'results', work: { done, total: 1000, known } };
    return estimate({ stage: 'masks', done, total: 1000, run }).left_s;
  };
  // 500 results are read back in a moment, and say nothing of what is left.
  expect([at(0, 0, 0), at(0.1, 250, 250), at(0.2, 500, 500)]).toEqual([undefined, undefined, undefined]);
  expect(at(20.2, 520, 500)).toBe(480);
});

test('while the machine sleeps no time passes, and a slow machine does not count as asleep', () => {
  let clock_s = 0;
  const estimate = createEstimate(() => 1000 * clock_s);
  const at = (now_s: number, done: number) => {
    clock_s = now_s;
    const run = { stage: 'stage 1 of 1', unit: 'results', work: { done, total: 1000, known: 0 } };
    return estimate({ stage: 'masks', done, total: 1000, run }).left_s;
  };
  for (let done = 0; done <= 100; done++) at(done, done);
  expect(at(101, 101)).toBe(899);
  expect(at(4101, 102)).toBe(899);
  expect(at(4102, 103)).toBe(898);
  // From now on each result takes two minutes; the first of them may pass for sleep.
  at(4222, 104);
  expect(at(4342, 105)!).toBeGreaterThan(1500);
});

test('a line of a whole run has the stage, its number, the unit, and the time that is left in all', () => {
  let clock_s = 0;
  const lines = logged(
    ({ update }) => {
      for (const { at_s, stage, done, total, run } of scriptedRun()) {
        clock_s = at_s;
        update(stage, done, total, '', run);
      }
    },
    () => 1000 * clock_s,
  );
  expect(lines[0]).toBe('stage 1 of 4, stage 1: 0 of 300 results\n');
  expect(lines[2]).toMatch(/^stage 1 of 4, stage 1: 30 of 300 results, \d+ min left in all\n$/);
  expect(lines.some((line) => line.startsWith('stage 3 of 4, stage 3: 0 of 200 results, '))).toBe(true);
});

test.each([
  ['Ctrl-C', '\x03'],
  ['Ctrl-D', '\x04'],
  ['no', 'n\n'],
])('%s at a question changes nothing', async (_, keys) => {
  const terminal = () => Object.assign(new PassThrough(), { isTTY: true, columns: 80 });
  const [stdin, stderr] = [terminal(), terminal()];
  vi.spyOn(process, 'stdin', 'get').mockReturnValue(stdin as never);
  vi.spyOn(process, 'stderr', 'get').mockReturnValue(stderr as never);
  const asked = confirmChange('https://edge.example.com', async () => 'It will be otherwise.', false);
  setImmediate(() => stdin.write(keys));
  await expect(asked).rejects.toMatchObject({ code: 'cancelled', message: 'Nothing was changed.' });
  vi.restoreAllMocks();
  expect(String(stderr.read())).toContain('It will be otherwise.\nGo on? [y/N] ');
});
