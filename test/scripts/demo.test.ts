/** Columns of the demo. */
import { expect, test } from 'vitest';
import { sideBySide, wrap } from '../../scripts/demo.ts';

test('wraps at words, keeps paragraphs and indentation, cuts what is too long', () => {
  expect(wrap('one two three', 7)).toEqual(['one two', 'three']);
  expect(wrap('a\n\nb', 7)).toEqual(['a', '', 'b']);
  expect(wrap('    return fib(n)', 12)).toEqual(['    return', '    fib(n)']);
  expect(wrap('abcdefgh', 3)).toEqual(['abc', 'def', 'gh']);
  expect(wrap('', 5)).toEqual(['']);
});

test('no line is wider than it may be', () => {
  const text = `def f():\n${' '.repeat(90)}x = ${'y'.repeat(100)} 日本語のテキスト ${'word '.repeat(50)}`;
  for (const line of wrap(text, 20)) expect([...line].length).toBeLessThanOrEqual(20);
});

test('the shorter text is padded', () => {
  expect(sideBySide('left', 'a b c', 30)).toEqual(['left          │  a b c']);
  expect(sideBySide('l', '1\n2', 30).map((line) => line.split('│')[1]?.trim())).toEqual(['1', '2']);
});
