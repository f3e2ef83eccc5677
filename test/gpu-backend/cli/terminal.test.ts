/** Progress of imports and of long pipelines, as a log file gets it. */
import { expect, test } from 'vitest';
import { createReporter, duration, type Reporter, secondsLeft } from '../../../gpu-backend/cli/terminal.ts';

function logged(run: (reporter: Reporter) => void): string[] {
  const lines: string[] = [];
  const out = { isTTY: false, write: (text: string) => lines.push(text) } as unknown as NodeJS.WriteStream;
  run(createReporter(out));
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
  expect([duration(5), duration(65), duration(3725)]).toEqual(['5 s', '1 min 5 s', '1 h 2 min']);
});
