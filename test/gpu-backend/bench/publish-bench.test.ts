/** A small round of the bench: requests during publications, gradual ones and rollbacks; and what it would find. */
import { describe, expect, test } from 'vitest';
import { type Answer, benchPublish, type Change, isWrong } from '../../../gpu-backend/bench/publish-bench.ts';
import { readMaskSet } from '../../../gpu-backend/publication/publish.ts';

test('every answer names one version that was live, with its own mask, and none fails', async () => {
  const preset = await readMaskSet('gpu-backend/presets/smollm2-135m-instruct/mask-set.json');
  const lines: string[] = [];
  const result = await benchPublish(
    preset,
    { requests: 600, changes: 8 },
    { say: (line) => lines.push(line) },
  );
  expect(lines).toEqual([]);
  expect(result).toMatchObject({ requests: 600, failed: 0, wrong: 0 });
  expect(result.publications + result.gradual + result.rollbacks).toBe(8);
  // A change may be over before a request meets it, or take longer than those around it, on a machine that does other
  // things.
  expect(result.versionsSeen).toBeGreaterThan(3);
  expect(result.oneRight).toBeGreaterThan(30);
}, 180_000);

describe('an answer', () => {
  const changes: Change[] = [
    { asked_ms: 0, done_ms: 10, versions: ['a'] },
    { asked_ms: 100, done_ms: 120, versions: ['b', 'a'] },
    { asked_ms: 200, done_ms: 220, versions: ['c'] },
  ];
  const maskOf = new Map([...'abc'].map((version) => [version, `mask of ${version}`]));
  const wrong = (from_ms: number, to_ms: number, version: string, change: Partial<Answer> = {}) =>
    isWrong({ from_ms, to_ms, version, mask: `mask of ${version}`, ...change }, changes, maskOf);

  test('may name what was live at some moment of it', () => {
    expect(wrong(50, 60, 'a')).toBe(false);
    expect(wrong(90, 105, 'a')).toBe(false);
    expect(wrong(90, 105, 'b')).toBe(false);
    expect(wrong(150, 160, 'a')).toBe(false);
    expect(wrong(215, 300, 'b')).toBe(false);
    expect(wrong(90, 300, 'c')).toBe(false);
  });

  test('that names a version before its time, or a moment after it, is wrong', () => {
    expect(wrong(50, 99, 'b')).toBe(true);
    expect(wrong(121, 199, 'c')).toBe(true);
    expect(wrong(221, 300, 'a')).toBe(true);
    expect(wrong(221, 300, 'b')).toBe(true);
  });

  test('with the mask of another version is wrong', () => {
    expect(wrong(50, 60, 'a', { mask: 'mask of b' })).toBe(true);
    expect(wrong(50, 60, 'x')).toBe(true);
  });
});
