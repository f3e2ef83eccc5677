/**
 * The grammars of JSON strings: of any, of a bounded length, of a `pattern` and of a `format`. Lengths and patterns cost
 * states for which all tokens are checked, so the schemas of a request have limits for these together.
 */
import { lettersIn, oneReading, type State, takesStates } from './automaton.ts';
import {
  type CharRange,
  chars,
  choice,
  type Expression,
  LAST,
  lettersOf,
  repeat,
  repeatsGroups,
  rule,
  sequence,
  sizeOf,
  sumOfLeaves,
  text,
} from './ebnf.ts';
import { COUNTED, PATTERN_STATES, PATTERN_TEXT, READ_STATES_MAX } from './schema-limits.ts';
import type { Path, SchemaObject, SchemaReader } from './schema-reader.ts';
import { separated } from './separated-choices.ts';
import { isWithin } from './text-inclusion.ts';
import { FORMATS, HELD_BY_FORMATS, PatternError, PLAIN, patternGrammar } from './text-pattern.ts';

/** Up to so many readings of a text, tokens of a pattern stay quick. */
const READINGS_QUICK = 8;
/** Up to so many characters, with repetitions written out, more readings are tried; the library ends what turns out slow. */
const SEVERAL_READINGS_MAX = 1024;
/** A pattern of so few states is written with one reading even if its own tokens are quick enough. */
const STATES_SMALL = 8;

const ASCII_LAST = 0x7f;

const HEX = chars([0x30, 0x39], [0x41, 0x46], [0x61, 0x66]);
const letters = (all: string): CharRange[] =>
  [...all].map((letter) => [letter.charCodeAt(0), letter.charCodeAt(0)]);

/** `json_string`, any string, and the rule that it uses. */
export const STRING_RULES: readonly (readonly [string, Expression])[] = [
  ['json_string', sequence(text('"'), rule('json_string_rest'))],
  // Right recursion instead of a repetition: tokens of several characters are then checked at compile time, not per answer.
  [
    'json_string_rest',
    choice(
      text('"'),
      sequence(chars(...PLAIN), rule('json_string_rest')),
      sequence(text('\\'), chars(...letters('"\\/bfnrt')), rule('json_string_rest')),
      // No surrogates (\ud800 to \udfff), since a lone one is not valid text.
      sequence(
        text('\\u'),
        chars([0x30, 0x39], [0x41, 0x43], [0x61, 0x63]),
        ...[HEX, HEX, HEX],
        rule('json_string_rest'),
      ),
    ),
  ],
];

/** The grammar of a schema of the type `string`; it may add to `rules`. @throws MaskrouteError `invalid_schema`. */
export function stringGrammar(
  reader: SchemaReader,
  schema: SchemaObject,
  path: Path,
  rules: Map<string, Expression>,
): Expression {
  const { format, pattern } = schema;
  const { isStrict } = reader;
  const known = typeof format === 'string' && Object.hasOwn(FORMATS, format) ? FORMATS[format]! : undefined;
  if (format !== undefined && known === undefined && isStrict)
    throw reader.refusal(`${path}/format`, `expected one of ${Object.keys(FORMATS).join(', ')}`);
  const min = reader.count('minLength', schema, path) ?? 0;
  const max = reader.count('maxLength', schema, path);
  const hasLengths = min > 0 || max !== undefined;
  if (pattern !== undefined && typeof pattern !== 'string')
    throw reader.refusal(`${path}/pattern`, 'expected a string');
  const place = `${path}/${known === undefined ? 'pattern' : 'format'}`;
  const written = known ?? pattern;
  if (written !== undefined) {
    if (hasLengths && isStrict && known === undefined)
      throw reader.refusal(place, 'beside a length it cannot be enforced; write the length into the pattern');
    const found = matching(reader, written, place);
    if (found !== undefined) {
      if (known !== undefined && isStrict) {
        requireLengths(reader, found, { min, max }, path);
        if (pattern !== undefined) requireWithin(reader, found, { format: format as string, pattern }, path);
      }
      // Formats are quick as they are.
      if (known !== undefined || pattern === undefined) return sequence(text('"'), found, text('"'));
      const rest = refusing(reader, place, () => restOf(reader, { pattern, found }, rules));
      if (rest !== undefined) return sequence(text('"'), rest);
    }
  }
  return hasLengths ? counted(reader, min, max, path) : rule('json_string');
}

/* In strict mode, every text of a format's grammar must satisfy the other keywords beside it. */

function requireLengths(
  reader: SchemaReader,
  found: Expression,
  { min, max = Number.POSITIVE_INFINITY }: { readonly min: number; readonly max: number | undefined },
  path: Path,
): void {
  const [least, most] = lettersOf(found);
  if (least >= min && most <= max) return;
  throw reader.refusal(
    `${path}/format`,
    `its generated texts have ${least} to ${most} characters, so this length cannot be enforced`,
  );
}

function requireWithin(
  reader: SchemaReader,
  found: Expression,
  { format, pattern }: { readonly format: string; readonly pattern: string },
  path: Path,
): void {
  const { spent } = reader;
  const key = `${format} ${pattern}`;
  if (HELD_BY_FORMATS[format] === pattern || spent.within.has(key)) return;
  const outer = refusing(reader, `${path}/pattern`, () => readPattern(reader, pattern));
  if (outer !== undefined && isWithin(found, outer, spent.inclusion)) {
    spent.within.add(key);
    return;
  }
  throw reader.refusal(
    `${path}/pattern`,
    'it is not known to match every text that is generated for this `format`; leave one of them out',
  );
}

function counted(reader: SchemaReader, min: number, max: number | undefined, path: Path): Expression {
  if (max !== undefined && max < min) throw reader.refusal(path, 'its `maxLength` is below its `minLength`');
  if (!takesCounted(reader, max ?? min)) {
    if (!reader.isStrict) return rule('json_string');
    throw reader.refusal(path, COUNTED.message);
  }
  return sequence(text('"'), repeat(chars(...PLAIN), min, max), text('"'));
}

function takesCounted({ spent }: SchemaReader, count: number): boolean {
  if (spent.countedChars + count > COUNTED.max) return false;
  spent.countedChars += count;
  return true;
}

/** What a pattern matches, between the quotes; undefined where it is ignored. */
function matching(reader: SchemaReader, pattern: string, path: Path): Expression | undefined {
  const { spent } = reader;
  return refusing(reader, path, () => {
    const found = readPattern(reader, pattern);
    const states = sizeOf(found);
    if (spent.patternStates + states > PATTERN_STATES.max) throw new PatternError(PATTERN_STATES.message);
    if (!takesCounted(reader, Math.ceil(wideSizeOf(found)))) throw new PatternError(COUNTED.message);
    spent.patternStates += states;
    return found;
  });
}

/**
 * A pattern's texts and the closing quote. Where a text has many readings, by an automaton that has one of each: a rule for each
 * of its states. @throws PatternError.
 */
function restOf(
  { spent }: SchemaReader,
  { pattern, found }: { readonly pattern: string; readonly found: Expression },
  rules: Map<string, Expression>,
): Expression {
  const plain = () => {
    // Others have few states, so their rules need not be written for this.
    const isEndless = lettersOf(found)[1] === Number.POSITIVE_INFINITY;
    if (isEndless && !takesStates(rulesOf(found), spent.loopStates, spent.counting))
      throw new PatternError(TOO_MANY_BEGINNINGS);
    return sequence(found, text('"'));
  };
  // The library reads what repeats no groups without following its readings.
  if (!repeatsGroups(found)) return plain();
  const number = spent.patternNumbers.get(pattern) ?? spent.patternNumbers.size;
  spent.patternNumbers.set(pattern, number);
  const name = `text_${number}`;
  const begin = rule(`${name}_0`);
  if (rules.has(begin.name)) return begin;
  const left = READ_STATES_MAX - spent.readStates;
  const { readings, states } = oneReading(found, left, spent.reading);
  const isQuick = readings <= READINGS_QUICK;
  if (isQuick && (states === undefined || states.length > STATES_SMALL)) return plain();
  const bodies = states?.map((state) => bodyOf(state, name));
  if (bodies?.every((body) => body !== undefined)) {
    spent.readStates += bodies.length;
    for (const [i, body] of bodies.entries()) rules.set(`${name}_${i}`, body);
    return begin;
  }
  if (sizeOf(found) > SEVERAL_READINGS_MAX) throw new PatternError(TOO_MANY_READINGS);
  return plain();
}

/** The bodies of the rules that an expression without rules is written with. */
function rulesOf(expression: Expression): Iterable<Expression> {
  const { rules, root } = separated(new Map(), expression);
  return [root, ...rules.values()];
}

/** Undefined where the library cannot write its characters: it knows single ones beyond ASCII, and all of them. */
function bodyOf({ edges, isEnd }: State, name: string): Expression | undefined {
  const options: Expression[] = isEnd ? [text('"')] : [];
  for (const { ranges, to } of edges) {
    const named = ranges.filter(([from, last]) => from > ASCII_LAST && from === last);
    const others = ranges.filter((range) => !named.includes(range));
    if (others.some(([from, last]) => last > ASCII_LAST && (last !== LAST || from > ASCII_LAST + 1)))
      return undefined;
    const next = rule(`${name}_${to}`);
    for (const [code] of named) options.push(sequence(text(String.fromCodePoint(code)), next));
    if (others.length > 0) options.push(sequence(chars(...others), next));
  }
  return choice(...options);
}

/** @throws PatternError. */
function readPattern({ spent }: SchemaReader, pattern: string): Expression {
  if (spent.patternChars + pattern.length > PATTERN_TEXT.max) throw new PatternError(PATTERN_TEXT.message);
  spent.patternChars += pattern.length;
  return patternGrammar(pattern);
}

/** `read()`; a PatternError becomes a refusal if strict, else undefined. */
function refusing(reader: SchemaReader, path: Path, read: () => Expression): Expression | undefined {
  try {
    return read();
  } catch (error) {
    if (!(error instanceof PatternError)) throw error;
    if (reader.isStrict) throw reader.refusal(path, error.message);
    return undefined;
  }
}

const TOO_MANY_READINGS =
  'it allows one text in too many ways: repeat groups less often, or so that one ends where the next begins';
const TOO_MANY_BEGINNINGS =
  'behind an endless loop, a part of exact length may begin at too many places: write the loop without the characters that the part begins with';

/** Number of states with a wide character class, where most tokens match. */
const wideSizeOf = (expression: Expression): number =>
  sumOfLeaves(expression, (leaf) => {
    if (leaf.kind !== 'chars') return 0;
    return lettersIn(leaf.ranges) > 64 ? 1 : 0;
  });
