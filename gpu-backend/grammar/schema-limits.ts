/**
 * How much the schemas of a request may have together: beyond these limits, reading them or compiling their grammar would take
 * seconds.
 */
import type { Effort, Room } from './automaton.ts';

/** How much of its limits the schemas of a request have used: the limits hold for all of them together. */
export type Spent = {
  nodes: number;
  literalChars: number;
  countedChars: number;
  patternStates: number;
  patternChars: number;
  items: number;
  /** Schemas that were joined for `allOf`. */
  joined: number;
  /** A schema without `strict` did not fit, so the next ones are not tried: a request may have 128 of them. */
  isFull: boolean;
  readonly inclusion: Effort;
  /** To write patterns with one reading, and the states of those that are. */
  readonly reading: Effort;
  readStates: number;
  /** For patterns with endless loops: how many states they may still have, and the effort to count them. */
  readonly loopStates: Room;
  readonly counting: Effort;
  /** The number of each pattern. Its rules are named by it, so a pattern that comes again uses the same rules. */
  readonly patternNumbers: Map<string, number>;
  /** Patterns that are known to match all texts of a format, each behind the format's name. */
  readonly within: Set<string>;
};

/** For all patterns beside formats together: a tenth of a second. A usual pattern takes some thousands. */
const INCLUSION_EFFORT = 40_000;
/** For all patterns that repeat groups, together: less than a tenth of a second. */
const READING_EFFORT = 20_000;
/** What the library makes in some four seconds: a place with a wide class takes 2 ms, a state without one less than 0.2. */
const LOOP_STATES_MAX: Readonly<Room> = { all: 8192, wide: 2048 };
/** Less than a tenth of a second. A usual pattern takes ten. */
const COUNTING_EFFORT = 20_000;

export const nothingSpent = (): Spent => ({
  nodes: 0,
  literalChars: 0,
  countedChars: 0,
  patternStates: 0,
  patternChars: 0,
  items: 0,
  joined: 0,
  isFull: false,
  inclusion: { left: INCLUSION_EFFORT },
  reading: { left: READING_EFFORT },
  readStates: 0,
  loopStates: { ...LOOP_STATES_MAX },
  counting: { left: COUNTING_EFFORT },
  patternNumbers: new Map(),
  within: new Set(),
});

type Limit = { readonly max: number; readonly message: string };
const limit = (whose: string, max: number, what: string): Limit => ({
  max,
  message: `${whose} have more than ${max} ${what}`,
});

export const PARTS = limit('schemas', 2000, 'parts together');
export const LITERALS = limit('names and values', 64 * 1024, 'characters together');
export const ITEMS = limit('lists of limited length', 2000, 'items together');
/** Nested `$ref`s can make their number grow exponentially. */
export const JOINED = limit('its `allOf`', 2000, 'schemas in total');
/** Each character is a state for which all tokens are checked. */
export const COUNTED = limit('strings of limited length', 256, 'characters together');
/** With repetitions written out. */
export const PATTERN_STATES = limit('patterns and formats', 16_384, 'characters together');
/** Also of those that are refused or ignored: reading a character takes some microseconds. */
export const PATTERN_TEXT = limit(
  'patterns and formats',
  64 * 1024,
  'characters together, as they are written',
);
/** Most states of patterns that are written with one reading: each is a rule for which all tokens are checked, some 5 to 10 ms. */
export const READ_STATES_MAX = 640;
