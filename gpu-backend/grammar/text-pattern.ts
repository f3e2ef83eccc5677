/**
 * Converts regular expressions to grammars for the text inside a JSON string, where quotes, backslashes and control
 * characters are escaped. @eslint-community/regexpp reads the expressions. Not supported: look-around, back-references, word
 * boundaries, Unicode properties.
 */
import { type AST, RegExpParser } from '@eslint-community/regexpp';
import {
  type CharRange,
  chars,
  choice,
  complement,
  type Expression,
  LAST,
  repeat,
  sequence,
  sizeOf,
  text,
} from './ebnf.ts';
import { unnested } from './readings.ts';

/** Why a pattern has no grammar; the message is for users. */
export class PatternError extends Error {}

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
/** ASCII characters that a JSON string does not escape. */
const PLAIN_ASCII: readonly CharRange[] = [
  [0x20, 0x21],
  [0x23, 0x5b],
  [0x5d, 0x7f],
];
/** Without surrogates: half of a pair is no character. */
const BEYOND_ASCII: readonly CharRange[] = [
  [0x80, 0xd7ff],
  [0xe000, LAST],
];
export const PLAIN: readonly CharRange[] = [...PLAIN_ASCII, [0x80, LAST]];
const ESCAPES: readonly (readonly [code: number, text: string])[] = [
  [QUOTE, '\\"'],
  [BACKSLASH, '\\\\'],
  [0x0a, '\\n'],
  [0x09, '\\t'],
  [0x0d, '\\r'],
];

/** Characters of `.`, `\d`, `\s` and `\w`. */
const SETS: Readonly<Record<'any' | 'digit' | 'space' | 'word', readonly CharRange[]>> = {
  any: complement([
    [0x0a, 0x0a],
    [0x0d, 0x0d],
    [0x2028, 0x2029],
  ]),
  digit: [[0x30, 0x39]],
  space: [
    [0x09, 0x0d],
    [0x20, 0x20],
    [0xa0, 0xa0],
  ],
  word: [
    [0x30, 0x39],
    [0x41, 0x5a],
    [0x5f, 0x5f],
    [0x61, 0x7a],
  ],
};

function overlap(a: readonly CharRange[], b: readonly CharRange[]): CharRange[] {
  return a.flatMap(([low, high]) =>
    b.flatMap(([from, to]): CharRange[] =>
      Math.max(low, from) <= Math.min(high, to) ? [[Math.max(low, from), Math.min(high, to)]] : [],
    ),
  );
}

const SURROGATES: readonly CharRange[] = [[0xd800, 0xdfff]];
const NO_CHARACTER = 'a character class has no character that can be generated';
const HALF =
  'half of a surrogate pair is no character; with an emoji, the pattern has to be valid with the flag u';
/** Most non-ASCII characters that are listed one by one. */
const NAMED_MAX = 64;

/**
 * One character of `ranges`, in JSON's notation. If a class has characters without escapes, its escaped characters are left
 * out, and so are non-ASCII characters unless it has all of them.
 */
function character(ranges: readonly CharRange[]): Expression {
  const all = overlap(ranges, [[0x80, LAST]]).some(([from, to]) => from === 0x80 && to === LAST);
  const plain = [...overlap(ranges, PLAIN_ASCII), ...(all ? [[0x80, LAST] as const] : [])];
  if (plain.length > 0) return chars(...plain);
  const escapes = ESCAPES.filter(([code]) => ranges.some(([low, high]) => code >= low && code <= high));
  if (escapes.length > 0) return choice(...escapes.map(([, written]) => text(written)));
  const beyond = overlap(ranges, BEYOND_ASCII);
  const named = beyond.reduce((sum, [from, to]) => sum + to - from + 1, 0);
  if (named === 0) throw new PatternError(overlap(ranges, SURROGATES).length > 0 ? HALF : NO_CHARACTER);
  if (named > NAMED_MAX)
    throw new PatternError('a range of non-ASCII characters is only supported if it has all of them');
  const codes = beyond.flatMap(([from, to]) => Array.from({ length: to - from + 1 }, (_, i) => from + i));
  return choice(...codes.map((code) => text(String.fromCodePoint(code))));
}

const PATTERN_CHARS_MAX = 2000;
const GROUPS_MAX = 32;
/** Most characters of a pattern with its repetitions written out. */
const STATES_MAX = 2048;
/** The same before loops are simplified. `unnested` writes some parts twice, so each level of groups could double its work. */
const WRITTEN_MAX = 4 * STATES_MAX;

/**
 * The texts that the pattern matches as a whole. A pattern without `^` or `$` also allows other text around them, so this
 * is a subset of what the pattern allows. @throws PatternError.
 */
export function patternGrammar(pattern: string): Expression {
  if (pattern.length > PATTERN_CHARS_MAX)
    throw new PatternError(`it is longer than ${PATTERN_CHARS_MAX} characters`);
  const written = ofAlternatives(parse(pattern), { isBegin: true, isEnd: true, groups: 0 });
  const size = sizeOf(written);
  const found = size > WRITTEN_MAX ? undefined : unnested(written);
  // Counted words are written several times: that makes them cheaper, so it does not count against the pattern.
  if (found !== undefined && sizeOf(found) <= (size > STATES_MAX ? STATES_MAX : 2 * STATES_MAX)) return found;
  if (size <= STATES_MAX) return written;
  throw new PatternError(`it has more than ${STATES_MAX} characters, with its repetitions written out`);
}

const parser = new RegExpParser();

/** As an expression with the flag `u`, as JSON Schema has it, or else without, since many patterns need that. */
function parse(pattern: string): AST.Pattern {
  const parseAs = (unicode: boolean) =>
    parser.parsePattern(pattern, undefined, undefined, { unicode, unicodeSets: false });
  try {
    return parseAs(true);
  } catch {
    try {
      return parseAs(false);
    } catch (error) {
      // Its message repeats the whole pattern.
      throw new PatternError((error as SyntaxError).message.split(': ').at(-1)!);
    }
  }
}

/** Whether a part is at the beginning or the end of the text, where `^` and `$` are allowed; and how many groups it is in. */
type Place = { readonly isBegin: boolean; readonly isEnd: boolean; readonly groups: number };

function ofAlternatives({ alternatives }: { alternatives: readonly AST.Alternative[] }, place: Place) {
  if (place.groups > GROUPS_MAX) throw new PatternError(`its groups are nested more than ${GROUPS_MAX} deep`);
  return choice(...alternatives.map(({ elements }) => ofElements(elements, place)));
}

function ofElements(elements: readonly AST.Element[], place: Place): Expression {
  const isAnchor = (element: AST.Element, kind: 'start' | 'end') =>
    element.type === 'Assertion' && element.kind === kind;
  const first = elements.findIndex((element) => !isAnchor(element, 'start'));
  const last = elements.findLastIndex((element) => !isAnchor(element, 'end'));
  const parts = elements.flatMap((element, i): Expression[] => {
    const isBegin = place.isBegin && (first === -1 || i <= first);
    const isEnd = place.isEnd && i >= last;
    if (element.type !== 'Assertion') return [ofElement(element, { ...place, isBegin, isEnd })];
    if (isAnchor(element, 'start') && isBegin) return [];
    if (isAnchor(element, 'end') && isEnd) return [];
    throw new PatternError(ASSERTIONS[element.kind]);
  });
  return sequence(...parts);
}

const LOOK_AROUND = 'look-ahead and look-behind are not supported';
const ASSERTIONS: Readonly<Record<AST.Assertion['kind'], string>> = {
  start: '`^` is only supported at the start',
  end: '`$` is only supported at the end',
  word: '\\b and \\B are not supported',
  lookahead: LOOK_AROUND,
  lookbehind: LOOK_AROUND,
};

function ofElement(element: Exclude<AST.Element, AST.Assertion>, place: Place): Expression {
  switch (element.type) {
    case 'Group':
    case 'CapturingGroup':
      if (element.type === 'Group' && element.modifiers !== null)
        throw new PatternError('flags of a group are not supported');
      return ofAlternatives(element, { ...place, groups: place.groups + 1 });
    case 'Quantifier':
      return repeated(element, place);
    case 'Character':
    case 'CharacterSet':
      return character(rangesOf(element));
    case 'CharacterClass': {
      const parts: readonly AST.CharacterClassElement[] = element.elements;
      const ranges = parts.flatMap(rangesOf);
      return character(element.negate ? complement(ranges) : ranges);
    }
    default:
      throw unsupported(element);
  }
}

function repeated({ element, min, max }: AST.Quantifier, place: Place): Expression {
  if (element.type === 'Assertion') throw new PatternError(ASSERTIONS[element.kind]);
  const within = max > 1 ? { ...place, isBegin: false, isEnd: false } : place;
  return repeat(ofElement(element, within), min, max === Number.POSITIVE_INFINITY ? undefined : max);
}

function rangesOf(part: AST.CharacterClassElement | AST.CharacterSet): readonly CharRange[] {
  switch (part.type) {
    case 'Character':
      return [[codeOf(part), codeOf(part)]];
    case 'CharacterClassRange':
      return [[codeOf(part.min), codeOf(part.max)]];
    case 'CharacterSet': {
      if (part.kind === 'property') throw unsupported(part);
      const ranges = SETS[part.kind];
      return part.kind !== 'any' && part.negate ? complement(ranges) : ranges;
    }
    default:
      throw unsupported(part);
  }
}

/** Escapes that the flag `u` refuses: without it they are the letter itself, or an octal number. */
const AMBIGUOUS = /^\\(?:[1-9]|(?![bfnrtv])[A-Za-z]$)/;

function codeOf(character: AST.Character): number {
  if (AMBIGUOUS.test(character.raw)) throw unsupported(character);
  return character.value;
}

const unsupported = ({ raw }: AST.Node) => new PatternError(`${raw} is not supported`);

const HEX = '[0-9a-f]';
const DATE =
  '[0-9]{3}[1-9]-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))';
const TIME = '(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]';
const BYTE = '(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])';
const LABEL = '[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?';
/** Patterns narrower than each format, so that all common validators accept their texts. */
export const FORMATS: Readonly<Record<string, string>> = {
  'date-time': `${DATE}T${TIME}Z`,
  date: DATE,
  time: `${TIME}Z`,
  duration: 'P(?:[0-9]{1,3}D|[0-9]{1,3}W|(?:[0-9]{1,3}D)?T[0-9]{1,3}[HMS])',
  uuid: `${HEX}{8}-${HEX}{4}-4${HEX}{3}-[89ab]${HEX}{3}-${HEX}{12}`,
  email: `[a-z0-9]{1,20}(?:[._+-][a-z0-9]{1,20}){0,2}@(?:${LABEL}\\.){1,3}[a-z]{2,10}`,
  hostname: `${LABEL}(?:\\.${LABEL}){1,3}`,
  ipv4: `${BYTE}(?:\\.${BYTE}){3}`,
  ipv6: `(?:${HEX}{1,4}:){7}${HEX}{1,4}`,
  uri: `https?://${LABEL}(?:\\.${LABEL}){1,3}(?:/[A-Za-z0-9_.~-]{1,30}){0,4}/?`,
};

/** By format, zod's pattern for it. These patterns use look-ahead, and match all texts of the format above. */
export const HELD_BY_FORMATS: Readonly<Record<string, string>> = {
  email:
    "^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$",
  duration:
    '^P(?:(\\d+W)|(?!.*W)(?=\\d|T\\d)(\\d+Y)?(\\d+M)?(\\d+D)?(T(?=\\d)(\\d+H)?(\\d+M)?(\\d+([.,]\\d+)?S)?)?)$',
  hostname:
    '^(?=.{1,253}\\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\\.?$',
};
