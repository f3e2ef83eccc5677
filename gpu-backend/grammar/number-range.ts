/** Grammars for the decimal notation of numbers within bounds. */
import { chars, choice, type Expression, optional, repeat, sequence, text } from './ebnf.ts';

export type Bounds = {
  readonly min: number | undefined;
  readonly max: number | undefined;
  /** Whether the bound itself is excluded. */
  readonly minIsOut: boolean;
  readonly maxIsOut: boolean;
};

/** JavaScript represents all integers of up to 15 digits exactly. */
const DIGITS_MAX = 15;
const LARGEST = 10 ** DIGITS_MAX - 1;
/** Most digits of a fraction. */
const FRACTION_DIGITS_MAX = 9;
const DIGIT = chars([0x30, 0x39]);
const digits = (low: number, high: number): Expression => chars([0x30 + low, 0x30 + high]);

/** Any integer within `DIGITS_MAX`. */
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

/** Integers within the bounds; undefined when there are none of at most 15 digits. */
export const integersBetween = (bounds: Bounds): Expression | undefined => decimalsBetween(bounds, 0, false);

/** Numbers within the bounds, with up to two more decimals than the bounds have; undefined as for `integersBetween`. */
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

/** `value · 10^places`, by shifting the decimal point, since a product would have a rounding error. */
function shifted(value: number, places: number): number {
  const [mantissa, exponent = '0'] = String(value).split('e');
  return Number(`${mantissa}e${Number(exponent) + places}`);
}

/** Numbers with exactly `places` decimals; with `more`, also those with further digits. */
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
    // Further digits move a number away from zero, but not as far as the next number.
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

/** The least integer n with n / 10^places ≥ `bound`, or > `bound` if `isOut`. */
function lowest(bound: number, places: number, isOut: boolean): number {
  const near = Math.ceil(shifted(bound, places));
  const value = shifted(near, -places);
  return value < bound || (isOut && value === bound) ? near + 1 : near;
}

/** Integers from `low` to `high`, both ≥ 0, printed with a decimal point before the last `places` digits. */
function counted(low: number, high: number, places: number): Expression[] {
  const options: Expression[] = [];
  for (let length = 1; length <= DIGITS_MAX; length++) {
    const least = length <= places + 1 ? 0 : 10 ** (length - 1);
    // A number below 1 has exactly one zero before the point.
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

/** Sequences of digit classes for the numbers between two numbers of the same length. */
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
