/** Patterns as grammars: the same texts, with no more ways to read one than there need be. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { oneReading, type Room, type State, takesStates } from '../../../gpu-backend/grammar/automaton.ts';
import { type Expression, printGrammar, sizeOf } from '../../../gpu-backend/grammar/ebnf.ts';
import { separated } from '../../../gpu-backend/grammar/separated-choices.ts';
import { patternGrammar } from '../../../gpu-backend/grammar/text-pattern.ts';

/** An expression as a regular expression of JavaScript. */
function source(expression: Expression): string {
  switch (expression.kind) {
    case 'text':
      return expression.text;
    case 'chars':
      return `[${expression.ranges.map(([from, to]) => `${String.fromCodePoint(from)}-${String.fromCodePoint(to)}`).join('')}]`;
    case 'sequence':
      return expression.parts.map(source).join('');
    case 'choice':
      return `(?:${expression.options.map(source).join('|')})`;
    case 'repeat':
      return `(?:${source(expression.part)}){${expression.min},${expression.max ?? ''}}`;
    default:
      throw new Error('a pattern has no rules');
  }
}

const words = (letters: string, most: number): string[] =>
  most === 0
    ? ['']
    : ['', ...words(letters, most - 1).flatMap((rest) => [...letters].map((one) => one + rest))];
const WORDS = [...new Set(words('ab', 7))];
const matches = (pattern: string): string[] =>
  WORDS.filter((word) => new RegExp(`^(?:${pattern})$`).test(word));

const patterns = fc.letrec<{ pattern: string }>((tie) => ({
  pattern: fc.oneof(
    { maxDepth: 4, withCrossShrink: true },
    fc.constantFrom('a', 'b', '[ab]', '(?:)'),
    fc
      .tuple(tie('pattern'), fc.constantFrom('*', '+', '?', '{2}', '{0,2}', '{1,3}', '{2,4}', '{2,}', '{0}'))
      .map(([one, often]) => `(?:${one})${often}`),
    fc.array(tie('pattern'), { minLength: 2, maxLength: 3 }).map((all) => all.join('')),
    fc.array(tie('pattern'), { minLength: 2, maxLength: 3 }).map((all) => `(?:${all.join('|')})`),
  ),
})).pattern;

/** Counted groups in counted groups: the generator draws few of them. */
const COUNTED = [
  '(?:a{1,2}b?){1,3}',
  '(?:b?a{0,3}b?){0,2}',
  '(?:b*a{0,2}){1,3}',
  '(?:a{1,3}b?){2,3}',
  '(?:[ab]{1,2}a?){1,3}',
  '(?:(?:a{1,2}b?){1,2}b?){1,2}',
  '(?:a{1,2}(?:ba|b)?){1,3}',
  '(?:a{1,2}b?){2,4}',
  '(?:a{1,2}b?){3}',
  '(?:a{1,3}b?){2}',
  '(?:b?a{1,2}){3,4}',
  '(?:a{2,3}b?){1,2}',
  '(?:a{2,3}b?){2,3}',
  '(?:a{2,4}b?){2}',
  '(?:b?a{2,3}b?){2,3}',
  '(?:a{3,5}){2}',
  '(?:a{0,2}b?){3}',
  '(?:[ab]{2,3}b?){2}',
  '(?:(?:a{2,3}b?){2}b?){1,2}',
  '(?:(?:a|ab)(?:b|ba)?)*',
];

/** Longer than the words of all letters: a letter with a gap after some of them. */
const LONG = fc
  .array(fc.constantFrom('a', 'a', 'a', 'a', 'aaa', 'b'), { maxLength: 24 })
  .map((all) => all.join(''));

/** What the states of `oneReading` match, by following the only way. */
function readsOnce(states: readonly State[], word: string): boolean {
  let at = 0;
  for (const letter of word) {
    const code = letter.codePointAt(0)!;
    const led = states[at]!.edges.filter(({ ranges }) =>
      ranges.some(([low, high]) => low <= code && code <= high),
    );
    expect(led.length).toBeLessThan(2);
    if (led.length === 0) return false;
    at = led[0]!.to;
  }
  return states[at]!.isEnd;
}
const statesOf = (pattern: string) =>
  oneReading(patternGrammar(pattern), 10_000, { left: Number.POSITIVE_INFINITY }).states!;

describe('the grammar of a pattern', () => {
  test('has the texts that the pattern matches', () => {
    fc.assert(
      fc.property(patterns, (pattern) => {
        expect(matches(source(patternGrammar(pattern)))).toEqual(matches(pattern));
      }),
      { seed: 4, numRuns: 400, examples: COUNTED.map((pattern) => [pattern]) },
    );
  });

  test('has the same texts with one reading of each', () => {
    fc.assert(
      fc.property(patterns, (pattern) => {
        const states = statesOf(pattern);
        expect(WORDS.filter((word) => readsOnce(states, word))).toEqual(matches(pattern));
      }),
      { seed: 5, numRuns: 400, examples: COUNTED.map((pattern) => [pattern]) },
    );
  });

  test('has the long texts of counted words, too', () => {
    const bounds = fc.tuple(fc.integer({ min: 0, max: 4 }), fc.integer({ min: 0, max: 4 }));
    fc.assert(
      fc.property(
        bounds,
        bounds,
        fc.array(LONG, { minLength: 40, maxLength: 40 }),
        ([m, n], [least, more], all) => {
          const pattern = `(?:b?a{${m},${m + n}}b?){${least},${least + more}}`;
          const grammar = new RegExp(`^(?:${source(patternGrammar(pattern))})$`);
          const states = statesOf(pattern);
          for (const word of all) {
            const isMatch = new RegExp(`^(?:${pattern})$`).test(word);
            expect([pattern, word, grammar.test(word), readsOnce(states, word)]).toEqual([
              ...[pattern, word, isMatch, isMatch],
            ]);
          }
        },
      ),
      { seed: 6, numRuns: 300 },
    );
  });

  test('has as few states with one reading as it needs', () => {
    expect(statesOf('(?:.*a.*|.*b.*)*')).toHaveLength(3);
    expect(statesOf('(?:[a-z]{1,20} ?){9}')).toHaveLength(310);
    expect(statesOf('[ab]*a[ab]{6}')).toHaveLength(128);
    expect(statesOf('(?:ab|ac|ad)')).toHaveLength(3);
  });

  test('takes room for the states of automata with one state for each text, by rule', () => {
    const takes = (pattern: string, room: Room, effort = { left: 20_000 }) => {
      const { rules, root } = separated(new Map(), patternGrammar(pattern));
      return takesStates([root, ...rules.values()], room, effort);
    };
    const taken = (pattern: string) => {
      const room = { all: 10_000, wide: 1000 };
      expect(takes(pattern, room)).toBe(true);
      return [10_000 - room.all, 1000 - room.wide];
    };
    // A rule that begins with a loop has a state before it.
    expect(taken('[ab]*a[ab]{6}')).toEqual([129, 0]);
    // A state has a place for the loop and for half of the count, on the mean.
    expect(taken('[a-z]*a[a-z]{6}')).toEqual([129, 512]);
    // What a count allows beyond its minimum, and each choice, is a rule: one edge, and nothing itself without a loop.
    expect(taken('[ab]*a[ab]{0,30}')).toEqual([4, 0]);
    expect(taken('[ab]*(?:a[ab]{30}|b)')).toEqual([3, 0]);
    expect(taken('[a-z]{2,}a[a-z]{60}')).toEqual([0, 0]);
    expect(taken('[ab]*b{2,}[ab]{60}')).toEqual([65, 0]);
    expect(taken('(?:c|[ab]*(?:c|[ab]*a[ab]{6}))')[0]).toBeGreaterThan(128);
    expect(takes('[ab]*a[ab]{6}', { all: 100, wide: 100 })).toBe(false);
    expect(takes('[ab]*a[ab]{6}', { all: 128, wide: 0 }, { left: 1 })).toBe(false);
  });

  test('has no states where they would be too many, found out at once', () => {
    const effort = { left: 20_000 };
    expect(oneReading(patternGrammar('(?:[ab]*a[ab]{30})*'), 640, effort).states).toBeUndefined();
    expect(oneReading(patternGrammar('(?:[a-z]{1,20} ?){20,40}'), 640, effort).states).toBeUndefined();
    expect(effort.left).toBeGreaterThan(0);
    const whole = statesOf('(?:[a-c]{2,3} ?){2}');
    const tried = Array.from({ length: 128 }, (_, i) =>
      oneReading(patternGrammar('(?:[a-c]{2,3} ?){2}'), 640, { left: i / 8 }),
    ).map(({ states }) => states);
    for (const states of tried) expect([undefined, whole]).toContainEqual(states);
    expect([tried[0], tried.at(-1)]).toEqual([undefined, whole]);
    const empty = `(?:(?:b${'|'.repeat(300)})a){300}`;
    expect(
      oneReading(patternGrammar(empty), 10_000, { left: Number.POSITIVE_INFINITY }).states,
    ).toBeUndefined();
    const little = { left: 10 };
    expect(oneReading(patternGrammar('(?:[a-z]{1,20} ?){9}'), 640, little).states).toBeUndefined();
    expect(little.left).toBeGreaterThan(-10);
  });

  test.each([
    ['(?:[a-z]+ ?)+', '[a-z]+(?: [a-z]+)* ?'],
    ['(?: *[a-z]+)*', '(?: *[a-z]+(?: +[a-z]+)*)?'],
    ['(?:[a-z]+ ?){3,}', '(?:[a-z]+ ?){2}[a-z]+(?: [a-z]+)* ?'],
    ['(?:[a-z]+ ?){1,60}', '[a-z]+(?: [a-z]+){0,59} ?'],
    ['(?: *[a-z]+){0,9}', '(?: *[a-z]+(?: +[a-z]+){0,8})?'],
    ['(?:[a-z]+ ?){3,9}', '(?:[a-z]+ ?){2}[a-z]+(?: [a-z]+){0,6} ?'],
    ['(?:[a-z]+[,;]? ?){1,20}', '[a-z]+(?:(?:[,;] ?| )[a-z]+){0,19}[,;]? ?'],
    ['(?: ?[a-z]+,?)+', ' ?[a-z]+(?:(?:, ?| )[a-z]+)*,?'],
    ['(?:[a-z]* ?){1,20}', '[a-z]*(?: [a-z]*){0,19} ?'],
    ['(?:[a-z]* ?){0,20}', '[a-z]*(?: [a-z]*){0,19} ?'],
    ['(?:[a-z]* ?){3,20}', '[a-z]*(?: [a-z]*){0,19} ?'],
    ['(?:[a-z]+ ?){3}', '(?:[a-z]+ ?){3}'],
    ['(?:[a-z]{1,20} ?){1,9}', '(?:[a-z]{1,20} |[a-z]{20}){0,8}[a-z]{1,20} ?'],
    ['(?:[a-z]{0,20} ?){0,9}', '(?:[a-z]{0,20} |[a-z]{20}){0,8}[a-z]{0,20} ?'],
    [
      '(?:[a-z]{1,5} ?){2,9}',
      '(?:(?:[a-z]{1,5} |[a-z]{5})(?:[a-z]{1,5} |[a-z]{5}){0,7}[a-z]{1,5}|[a-z]{1,5}(?: [a-z]|[a-z])) ?',
    ],
    ['(?:(?:ab)?){1,9}', '(?:ab){0,9}'],
    ['(?:[a-z]{2,5} ?){1,9}', '(?:[a-z]{2,5} |[a-z]{4,5}){0,8}[a-z]{2,5} ?'],
    ['(?:[a-z]{4,5} ?){1,9}', '(?:[a-z]{4,5} ?){1,9}'],
    ['(?:(?:[a-z]+ ?)+,?)+', '(?:[a-z] ?,?)+'],
    ['(?:(?:[a-z]*)*[0-9]*)*', '[a-z0-9]*'],
    ['(?:(?:[a-z]+)+)+', '[a-z]+'],
    ['(?:[a-z]{1,20})*', '[a-z]*'],
    ['(?:a{0})*', 'a{0}'],
    ['[a-z]+(?:,[a-z]+)*', '[a-z]+(?:,[a-z]+)*'],
    ['[a-z]{2,}', '[a-z]{2,}'],
  ])('has no loop in a loop where one is enough: %s', (pattern, simple) => {
    expect(source(patternGrammar(pattern))).toBe(source(patternGrammar(simple)));
  });

  test('is refused at once where groups would double its work, level by level', () => {
    const nested = (begin: string, end: string) => begin.repeat(30) + end.repeat(30);
    for (const pattern of [nested('(?:[a-z]+', '){0,3}'), nested('(?:a', 'b?){2,}')])
      expect(() => patternGrammar(pattern)).toThrow('it has more than 2048 characters');
    const signs = `(?:[a-z]+${',?'.repeat(200)}){1,9}`;
    expect(sizeOf(patternGrammar(signs))).toBe(9 * 201);
  });

  test('has its limit by what the pattern says, not by what makes it cheaper', () => {
    expect(sizeOf(patternGrammar('(?:[a-z]{1,20} ?){1,90}'))).toBe(89 * 41 + 21);
    expect(() => patternGrammar('(?:[a-z]{1,20} ?){1,98}')).toThrow('it has more than 2048 characters');
  });

  test('repeats a class without a rule of the library, which would try all tokens at each place of it', () => {
    const printed = printGrammar(new Map(), patternGrammar('[a-c]+(?:\\s+[a-c]+)*'));
    const letters = '([\\u0061-\\u0063] [\\u0061-\\u0063]*)';
    expect(printed).toBe(`root ::= (${letters} ((([\\u0020] [\\u0020]*) ${letters}))*)`);
  });
});
