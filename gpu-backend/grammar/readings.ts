/**
 * Writes patterns so that one text has few readings. The grammar library follows all readings of a text at the same time, and
 * with hundreds of them a token takes seconds.
 */
import { chars, choice, type Expression, lettersOf, optional, repeat, sequence, sizeOf } from './ebnf.ts';

/** Most characters between two repeated classes that are told apart, with repetitions written out. */
const BETWEEN_MAX = 32;

/**
 * The same texts without a loop that another loop repeats: `(?:[a-z]+ ?)+` has so many ways to read one text that a token
 * takes half a second. This is the star normal form of Brüggemann-Klein (1993), `(?:[a-z] ?)+`, except where a character
 * class is repeated with something between: the library is fast at loops of one class, and that becomes
 * `[a-z]+(?: [a-z]+)* ?`.
 */
export function unnested(expression: Expression, isInLoop = false): Expression {
  switch (expression.kind) {
    case 'sequence':
      return sequence(...expression.parts.map((part) => unnested(part, isInLoop)));
    case 'choice':
      return choice(...expression.options.map((option) => unnested(option, isInLoop)));
    case 'repeat': {
      const { min, max } = expression;
      const part = unnested(expression.part, isInLoop || max === undefined);
      if (max !== undefined)
        return (isInLoop ? undefined : spacedUpTo(part, min, max)) ?? withoutEmptyParts(part, min, max);
      const options = joined(unrepeated(part));
      if (options.length === 0) return part;
      const once = choice(...options);
      if (isNullable(part)) return repeat(once, 0);
      const often = isInLoop ? undefined : spaced(part);
      if (often !== undefined && min === 0) return optional(often);
      if (min < 2) return often ?? repeat(once, min);
      if (once === part) return repeat(part, min);
      return sequence(repeat(part, min - 1, min - 1), often ?? repeat(once, 1));
    }
    default:
      return expression;
  }
}

/**
 * `part` at least `min` and at most `max` times, if it is as `wordOf` has it. Otherwise a word could be read as any number of
 * parts, and a token would take seconds.
 */
function spacedUpTo(part: Expression, min: number, max: number): Expression | undefined {
  // Where a part may be empty, fewer parts have the same texts.
  const least = isNullable(part) ? 1 : min;
  if (max < 2) return undefined;
  const word = wordOf(part, isLoopOfClass);
  if (word === undefined) return undefined;
  if (isBounded(word.loop)) return least === 0 ? optional(counted(word, 1, max)) : counted(word, least, max);
  const before = Math.max(0, least - 1);
  if (max - before < 2) return undefined;
  const often = joinedBy(word, max - before);
  if (before === 0) return least === 0 ? optional(often) : often;
  return sequence(repeat(part, before, before), often);
}

/** Where a part may be empty, fewer parts have the same texts. */
function withoutEmptyParts(part: Expression, min: number, max: number): Expression {
  const there = max > 1 && isNullable(part) && sizeOf(part) <= BETWEEN_MAX ? present(part) : undefined;
  return there === undefined ? repeat(part, min, max) : repeat(there, 0, max);
}

/** One or more of `part`, if it is as `wordOf` has it, without bounds. */
function spaced(part: Expression): Expression | undefined {
  const word = wordOf(part, (one): one is Loop => isLoopOfClass(one) && !isBounded(one));
  return word && joinedBy(word);
}

type Loop = Extract<Expression, { readonly kind: 'repeat' }>;
/** `gap`: what may be between two loops, without the empty text. */
type Word = {
  readonly before: readonly Expression[];
  readonly loop: Loop;
  readonly after: readonly Expression[];
  readonly gap: Expression;
};

/** A repeated character class with something before or behind it that may be absent. */
function wordOf(part: Expression, isLoop: (one: Expression) => one is Loop): Word | undefined {
  if (part.kind !== 'sequence') return undefined;
  const { parts } = part;
  const isWord = (one: Expression, i: number) =>
    isLoop(one) && parts.every((other, j) => j === i || isNullable(other));
  const endless = parts.findIndex((one, i) => isWord(one, i) && !isBounded(one as Loop));
  const at = endless === -1 ? parts.findIndex(isWord) : endless;
  if (at === -1) return undefined;
  const [before, loop, after] = [parts.slice(0, at), parts[at] as Loop, parts.slice(at + 1)];
  const between = sequence(...after, ...before);
  const gap = sizeOf(between) > BETWEEN_MAX ? undefined : present(between);
  return gap && { before, loop, after, gap };
}

/** One to `max` words without bounds, or one or more: where the gap is absent, two of them are one. */
const joinedBy = ({ before, loop, after, gap }: Word, max?: number): Expression =>
  sequence(...before, loop, repeat(sequence(gap, loop), 0, max && max - 1), ...after);

/**
 * `least` to `max` parts of bounded length, `least` of 1 or more. Where no gap is between two parts, the first is as long as it
 * may be, so a word has few readings. Only if these are fewer than `least`, the last ones are as short as they may be.
 */
function counted({ before, loop, after, gap }: Word, least: number, max: number): Expression {
  const { part: letter, min } = loop;
  const most = loop.max!;
  const short = Math.max(1, min);
  // A part that is shorter lets the last one have the letters that it needs.
  const long = choice(sequence(loop, gap), repeat(letter, most - short + 1, most));
  const last = choice(sequence(gap, repeat(letter, short, 2 * short - 1)), repeat(letter, short, short));
  let all = sequence(repeat(long, 0, max - least), loop);
  for (let i = 1; i < least; i++) all = choice(sequence(long, all), sequence(loop, repeat(last, i, i)));
  return sequence(...before, all, ...after);
}

/** With all lengths from the least one on, if it is repeated. */
const isLoopOfClass = (one: Expression): one is Loop =>
  one.kind === 'repeat' &&
  one.max !== 1 &&
  one.part.kind === 'chars' &&
  (one.max === undefined || one.max >= 2 * one.min - 1);
const isBounded = ({ max }: Loop): boolean => max !== undefined;

/** The same texts without the empty one; undefined where there is no other. */
function present(expression: Expression): Expression | undefined {
  if (!isNullable(expression)) return expression;
  switch (expression.kind) {
    case 'sequence':
      return either(
        expression.parts.map((part, i) => {
          const first = present(part);
          return first && sequence(first, ...expression.parts.slice(i + 1));
        }),
      );
    case 'choice':
      return either(expression.options.map(present));
    case 'repeat': {
      const part = expression.max === 0 ? undefined : present(expression.part);
      return part && repeat(part, 1, expression.max);
    }
    default:
      return undefined;
  }
}

function either(options: readonly (Expression | undefined)[]): Expression | undefined {
  const there = options.filter((option) => option !== undefined);
  return there.length === 0 ? undefined : choice(...there);
}

/** The options, with one character class in the place of several. */
function joined(options: readonly Expression[]): readonly Expression[] {
  const classes = options.filter((option) => option.kind === 'chars');
  if (classes.length < 2) return options;
  const others = options.filter((option) => option.kind !== 'chars');
  return [chars(...classes.flatMap(({ ranges }) => ranges)), ...others];
}

/** Options that are no longer than needed: repeated as often as wanted, they give the same texts as `expression` does. */
function unrepeated(expression: Expression): Expression[] {
  switch (expression.kind) {
    case 'choice':
      return expression.options.flatMap(unrepeated);
    case 'sequence': {
      const [first, ...others] = expression.parts;
      if (first === undefined) return [];
      if (others.length === 0) return unrepeated(first);
      const rest = sequence(...others);
      if (isNullable(first))
        return isNullable(rest)
          ? [...unrepeated(first), ...unrepeated(rest)]
          : [sequence(first, choice(...unrepeated(rest)))];
      return isNullable(rest) ? [sequence(choice(...unrepeated(first)), rest)] : [expression];
    }
    case 'repeat': {
      const { part, min, max } = expression;
      if (max === 0) return [];
      return min < 2 || isNullable(part) ? unrepeated(part) : [expression];
    }
    default:
      return [expression];
  }
}

const isNullable = (expression: Expression): boolean => lettersOf(expression)[0] === 0;
