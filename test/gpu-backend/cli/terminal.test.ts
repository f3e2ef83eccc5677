/** Progress lines of a long pipeline, as a log file gets them. */
import { expect, test } from 'vitest';
import { createStages, duration, secondsLeft } from '../../../gpu-backend/cli/terminal.ts';

function logged(run: (stages: ReturnType<typeof createStages>) => void): string[] {
  const lines: string[] = [];
  const out = { isTTY: false, write: (text: string) => lines.push(text) } as unknown as NodeJS.WriteStream;
  run(createStages(out));
  return lines;
}

test('a stage of many steps is told in about twenty lines, the last one included', () => {
  const lines = logged((stages) => {
    for (let done = 0; done <= 1000; done++) stages.update('search', done, 1000);
  });
  expect(lines).toHaveLength(21);
  expect(lines[0]).toBe('search: 0 of 1000\n');
  expect(lines.at(-1)).toBe('search: 1000 of 1000, 0 s left\n');
});

test('stages and details follow each other', () => {
  const lines = logged((stages) => {
    stages.update('teacher', 1, 1);
    stages.update('fit', 0, 0, 'loss 0.5');
  });
  expect(lines).toEqual(['teacher: 1 of 1\n', 'fit: 0 of 0 (loss 0.5)\n']);
});

test('the time left is at the pace so far, work done before a restart left out', () => {
  expect(secondsLeft(10_000, 5, 15)).toBe(30);
  expect(secondsLeft(10_000, 0, 15)).toBeUndefined();
  expect([duration(5), duration(65), duration(3725)]).toEqual(['5 s', '1 min 5 s', '1 h 2 min']);
});
