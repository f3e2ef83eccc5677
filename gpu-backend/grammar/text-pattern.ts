/**
 * Converts regular expressions to grammars for the text inside a JSON string, where quotes, backslashes and control
 * characters are escaped. Not supported: look-around, back-references, word boundaries.
 */
import {
  type CharRange,
  chars,
  choice,
  complement,
  type Expression,
  repeat,
  sequence,
  text,
} from './ebnf.ts';

/** Why a pattern has no grammar; the message is for users. */
export class PatternError extends Error {}

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const DASH = 0x2d;
const LAST = 0x10ffff;
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

const DIGITS: CharRange[] = [[0x30, 0x39]];
const WORD: CharRange[] = [
  [0x30, 0x39],
  [0x41, 0x5a],
  [0x5f, 0x5f],
  [0x61, 0x7a],
];
const SPACE: CharRange[] = [
  [0x09, 0x0d],
  [0x20, 0x20],
  [0xa0, 0xa0],
];
const CLASSES: Readonly<Record<string, readonly CharRange[]>> = {
  d: DIGITS,
  w: WORD,
  s: SPACE,
  D: complement(DIGITS),
  W: complement(WORD),
  S: complement(SPACE),
};
const HEXADECIMAL = {
  x: /^[0-9a-fA-F]{2}/,
  u: /^[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|^[0-9a-fA-F]{4}/,
} as const;
const CONTROLS: Readonly<Record<string, number>> = { n: 10, r: 13, t: 9, f: 12, v: 11, 0: 0 };

function overlap(a: readonly CharRange[], b: readonly CharRange[]): CharRange[] {
  return a.flatMap(([low, high]) =>
    b.flatMap(([from, to]): CharRange[] =>
      Math.max(low, from) <= Math.min(high, to) ? [[Math.max(low, from), Math.min(high, to)]] : [],
    ),
  );
}

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
  if (named === 0) throw new PatternError('a character class has no character that can be generated');
  if (named > NAMED_MAX)
    throw new PatternError('a range of non-ASCII characters is only supported if it has all of them');
  const codes = beyond.flatMap(([from, to]) => Array.from({ length: to - from + 1 }, (_, i) => from + i));
  return choice(...codes.map((code) => text(String.fromCodePoint(code))));
}

const PATTERN_CHARS_MAX = 2000;

/**
 * The texts that the pattern matches as a whole. A pattern without `^` or `$` also allows other text around them, so this
 * is a subset of what the pattern allows. @throws PatternError.
 */
export function patternGrammar(pattern: string): Expression {
  if (pattern.length > PATTERN_CHARS_MAX)
    throw new PatternError(`it is longer than ${PATTERN_CHARS_MAX} characters`);
  return new PatternReader(pattern).whole();
}

class PatternReader {
  readonly #letters: readonly string[];
  #at = 0;
  #depth = 0;
  /** The last part ended with `$`, so nothing may follow. */
  #isAtEnd = false;
  /** How many `^` and `$` were read. */
  #anchors = 0;

  constructor(pattern: string) {
    this.#letters = [...pattern];
  }

  whole(): Expression {
    const found = this.#alternatives(true);
    if (this.#at < this.#letters.length) throw new PatternError('`)` has no matching `(`');
    return found;
  }

  /** `isBegin`: at the start of the text, where `^` is allowed. */
  #alternatives(isBegin: boolean): Expression {
    if (++this.#depth > 32) throw new PatternError('its groups are nested more than 32 deep');
    const options = [this.#branch(isBegin)];
    let isAtEnd = this.#isAtEnd;
    while (this.#letters[this.#at] === '|') {
      this.#at++;
      options.push(this.#branch(isBegin));
      isAtEnd ||= this.#isAtEnd;
    }
    this.#isAtEnd = isAtEnd;
    this.#depth--;
    return choice(...options);
  }

  #branch(isBegin: boolean): Expression {
    const parts: Expression[] = [];
    this.#isAtEnd = false;
    while (
      this.#at < this.#letters.length &&
      this.#letters[this.#at] !== '|' &&
      this.#letters[this.#at] !== ')'
    ) {
      if (this.#isAtEnd) throw new PatternError('`$` is only supported at the end');
      const part = this.#quantified(isBegin && parts.length === 0);
      if (part !== undefined) parts.push(part);
    }
    return sequence(...parts);
  }

  /** Undefined for an anchor. */
  #quantified(isBegin: boolean): Expression | undefined {
    if (this.#letters[this.#at] === '^') {
      if (!isBegin) throw new PatternError('`^` is only supported at the start');
      this.#at++;
      this.#anchors++;
      return undefined;
    }
    if (this.#letters[this.#at] === '$') {
      this.#at++;
      this.#anchors++;
      this.#isAtEnd = true;
      return undefined;
    }
    const anchors = this.#anchors;
    const part = this.#atom(isBegin);
    // No more than a quantifier has: the rest of the pattern would be copied for each of its parts.
    const end = this.#letters[this.#at] === '{' ? this.#letters.indexOf('}', this.#at) : this.#at;
    const quantifier = this.#letters.slice(this.#at, end + 2).join('');
    const found = /^(?:[*+?]|\{(\d+)(,(\d*))?\})\??/.exec(quantifier);
    if (found === null) return part;
    this.#at += [...found[0]].length;
    const [mark, low, comma, high] = [found[0][0], found[1], found[2], found[3]];
    if (this.#anchors > anchors && mark !== '?')
      throw new PatternError('a group with `^` or `$` cannot be repeated');
    if (mark === '*') return repeat(part, 0);
    if (mark === '+') return repeat(part, 1);
    if (mark === '?') return repeat(part, 0, 1);
    const min = Number(low);
    const max = comma === undefined ? min : high === '' ? undefined : Number(high);
    if (max !== undefined && max < min)
      throw new PatternError(`${found[0]} has its numbers in the wrong order`);
    return repeat(part, min, max);
  }

  #atom(isBegin: boolean): Expression {
    const letter = this.#letters[this.#at++]!;
    switch (letter) {
      case '(': {
        if (this.#letters[this.#at] === '?') {
          const named = /^\?(?::|<[A-Za-z_]\w*>)/.exec(this.#letters.slice(this.#at, this.#at + 80).join(''));
          if (named === null) throw new PatternError('look-ahead and look-behind are not supported');
          this.#at += named[0].length;
        }
        const inner = this.#alternatives(isBegin);
        if (this.#letters[this.#at++] !== ')') throw new PatternError('a group is not closed');
        return inner;
      }
      case '[':
        return character(this.#characterClass());
      case '.':
        return character(
          complement([
            [0x0a, 0x0a],
            [0x0d, 0x0d],
            [0x2028, 0x2029],
          ]),
        );
      case '\\':
        return character(this.#escaped());
      case '*':
      case '+':
      case '?':
        throw new PatternError(`\`${letter}\` has nothing before it to repeat`);
      default:
        return character([[letter.codePointAt(0)!, letter.codePointAt(0)!]]);
    }
  }

  #escaped(): readonly CharRange[] {
    const letter = this.#letters[this.#at++];
    if (letter === undefined) throw new PatternError('it ends with a backslash');
    const known = CLASSES[letter];
    if (known !== undefined) return known;
    const control = CONTROLS[letter];
    if (control !== undefined) return [[control, control]];
    if (letter === 'x' || letter === 'u') {
      const code = this.#hexadecimal(letter);
      return [[code, code]];
    }
    if (/[A-Za-z1-9]/.test(letter)) throw new PatternError(`\\${letter} is not supported`);
    return [[letter.codePointAt(0)!, letter.codePointAt(0)!]];
  }

  /** The character of a `\x` or `\u`, or of the two `\u` of a surrogate pair. */
  #hexadecimal(letter: 'x' | 'u'): number {
    const digits = HEXADECIMAL[letter].exec(this.#letters.slice(this.#at, this.#at + 10).join(''))?.[0];
    if (digits === undefined)
      throw new PatternError(
        `\\${letter} without its ${letter === 'x' ? 2 : 4} hexadecimal digits is not supported`,
      );
    this.#at += digits.length;
    const units = digits.split('\\u').map((unit) => Number.parseInt(unit, 16));
    return String.fromCharCode(...units).codePointAt(0)!;
  }

  #characterClass(): CharRange[] {
    const isNegated = this.#letters[this.#at] === '^';
    if (isNegated) this.#at++;
    const ranges: CharRange[] = [];
    while (this.#letters[this.#at] !== ']') {
      if (this.#at >= this.#letters.length) throw new PatternError('a character class is not closed');
      const low = this.#member();
      if (this.#letters[this.#at] !== '-' || this.#letters[this.#at + 1] === ']') {
        ranges.push(...low);
        continue;
      }
      this.#at++;
      const high = this.#member();
      const [from, to] = [single(low), single(high)];
      // Next to a class such as \d the dash is a literal.
      if (from === undefined || to === undefined) ranges.push(...low, [DASH, DASH], ...high);
      else if (to < from) throw new PatternError('a character range is in the wrong order');
      else ranges.push([from, to]);
    }
    this.#at++;
    return isNegated ? complement(ranges) : ranges;
  }

  #member(): readonly CharRange[] {
    const letter = this.#letters[this.#at++];
    if (letter === undefined) throw new PatternError('a character class is not closed');
    if (letter !== '\\') return [[letter.codePointAt(0)!, letter.codePointAt(0)!]];
    if (this.#letters[this.#at] === 'b') {
      this.#at++;
      return [[8, 8]];
    }
    return this.#escaped();
  }
}

/** The character of `ranges` if there is exactly one. */
const single = ([first, ...others]: readonly CharRange[]): number | undefined =>
  first !== undefined && others.length === 0 && first[0] === first[1] ? first[0] : undefined;

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
