/** Numbers between bounds as grammars of their digits. */
import { chars, choice, type Expression, optional, repeat, sequence, text } from './ebnf.ts';

type Bounds = {
  readonly min: number | undefined;
  readonly max: number | undefined;
  /** Whether the bound itself is out. */
  readonly minIsOut: boolean;
  readonly maxIsOut: boolean;
};

/** Enough for every whole number that JavaScript holds exactly. */
const DIGITS_MAX = 15;
const LARGEST = 10 ** DIGITS_MAX - 1;
/** Of a number's fraction. */
const FRACTION_DIGITS_MAX = 9;
const DIGIT = chars([0x30, 0x39]);
const digits = (low: number, high: number): Expression => chars([0x30 + low, 0x30 + high]);

/** Without bounds; no value is out of JavaScript's reach. */
export const INTEGER = choice(
  text('0'),
  sequence(optional(text('-')), digits(1, 9), repeat(DIGIT, 0, DIGITS_MAX - 1)),
);
export const NUMBER = sequence(
  optional(text('-')),
  choice(text('0'), sequence(digits(1, 9), repeat(DIGIT, 0, DIGITS_MAX - 1))),
  optional(sequence(text('.'), repeat(DIGIT, 1, DIGITS_MAX))),
  optional(
    sequence(
      chars([0x45, 0x45], [0x65, 0x65]),
      optional(chars([0x2b, 0x2b], [0x2d, 0x2d])),
      repeat(DIGIT, 1, 2),
    ),
  ),
);

/** Undefined when there is no such number, or none of at most 15 digits. */
export const integersBetween = (bounds: Bounds): Expression | undefined => decimalsBetween(bounds, 0, false);

/** As `integersBetween`. Numbers have as many decimals as the bounds, and two more. */
export function numbersBetween(bounds: Bounds): Expression | undefined {
  const places = Math.max(
    0,
    ...[bounds.min, bounds.max].flatMap((bound) => (bound === undefined ? [] : [decimalPlaces(bound)])),
  );
  const most = Math.min(FRACTION_DIGITS_MAX, places + 2);
  const options = Array.from({ length: most + 1 }, (_, count) =>
    decimalsBetween(bounds, count, count === most),
  );
  const found = options.filter((option) => option !== undefined);
  return found.length === 0 ? undefined : choice(...found);
}

function decimalPlaces(value: number): number {
  const [mantissa, exponent = '0'] = String(value).split('e');
  return Math.max(0, (mantissa!.split('.')[1]?.length ?? 0) - Number(exponent));
}

/** `value · 10^places` by its decimal digits: a product would be off by its last bits. */
function shifted(value: number, places: number): number {
  const [mantissa, exponent = '0'] = String(value).split('e');
  return Number(`${mantissa}e${Number(exponent) + places}`);
}

/** All numbers with exactly so many decimals; `more`: and those with some digits behind them. */
function decimalsBetween(bounds: Bounds, places: number, more: boolean): Expression | undefined {
  const low = bounds.min === undefined ? -LARGEST : lowest(bounds.min, places, bounds.minIsOut);
  const high = bounds.max === undefined ? LARGEST : -lowest(-bounds.max, places, bounds.maxIsOut);
  const options: Expression[] = [];
  const [from, to] = [Math.max(low, -LARGEST), Math.min(high, LARGEST)];
  if (from > to) return undefined;
  if (to >= 0) options.push(...counted(Math.max(0, from), to, places));
  if (from < 0)
    options.push(...counted(Math.max(1, -to), -from, places).map((one) => sequence(text('-'), one)));
  if (more) {
    // Digits behind a number lead away from zero, and never as far as the next one.
    const tail = repeat(DIGIT, 1, 4);
    if (to >= 1 && to - 1 >= Math.max(0, from))
      options.push(...counted(Math.max(0, from), to - 1, places).map((one) => sequence(one, tail)));
    if (from <= -2 && -from - 1 >= Math.max(1, -to))
      options.push(
        ...counted(Math.max(1, -to), -from - 1, places).map((one) => sequence(text('-'), one, tail)),
      );
  }
  return choice(...options);
}

/** The least whole n whose n / 10^places is not below `bound`, nor `bound` itself where that is out. */
function lowest(bound: number, places: number, isOut: boolean): number {
  const near = Math.ceil(shifted(bound, places));
  const value = shifted(near, -places);
  return value < bound || (isOut && value === bound) ? near + 1 : near;
}

/** Whole numbers from `low` to `high`, neither below 0, the last `places` digits of each behind a point. */
function counted(low: number, high: number, places: number): Expression[] {
  const options: Expression[] = [];
  for (let length = 1; length <= DIGITS_MAX; length++) {
    const least = length <= places + 1 ? 0 : 10 ** (length - 1);
    // Below 1 a number has one zero before the point.
    if (length < places + 1) continue;
    const [from, to] = [Math.max(low, least), Math.min(high, 10 ** length - 1)];
    if (from > to) continue;
    for (const places_ of sameLength(padded(from, length), padded(to, length))) {
      const point = length - places;
      options.push(
        sequence(...places_.slice(0, point), ...(places === 0 ? [] : [text('.')]), ...places_.slice(point)),
      );
    }
  }
  return options;
}

const padded = (value: number, length: number): number[] =>
  [...String(value).padStart(length, '0')].map(Number);

/** Rows of digit classes for the numbers between two of the same length. */
function sameLength(low: readonly number[], high: readonly number[]): Expression[][] {
  if (low.length === 0) return [[]];
  const [[first, ...lowRest], [last, ...highRest]] = [low, high] as [number[], number[]];
  if (low.every((digit) => digit === 0) && high.every((digit) => digit === 9)) return [low.map(() => DIGIT)];
  if (first === last) return sameLength(lowRest, highRest).map((rest) => [digits(first!, first!), ...rest]);
  const nines = lowRest.map(() => 9);
  const zeros = lowRest.map(() => 0);
  const lowIsWhole = lowRest.every((digit) => digit === 0);
  const highIsWhole = highRest.every((digit) => digit === 9);
  const [from, to] = [lowIsWhole ? first! : first! + 1, highIsWhole ? last! : last! - 1];
  return [
    ...(lowIsWhole ? [] : sameLength(lowRest, nines).map((rest) => [digits(first!, first!), ...rest])),
    ...(from > to ? [] : [[digits(from, to), ...lowRest.map(() => DIGIT)]]),
    ...(highIsWhole ? [] : sameLength(zeros, highRest).map((rest) => [digits(last!, last!), ...rest])),
  ];
}
