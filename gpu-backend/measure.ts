/**
 * Figures: measured in interleaved rounds, so that a temporary slowdown of the machine affects all subjects alike; statistics
 * of them; and how they are written.
 */

/** `say` gets progress lines. When `signal` aborts, a bench stops before its next turn and ends what it started. */
export type BenchHooks = {
  readonly say: (line: string) => void;
  readonly signal?: AbortSignal | undefined;
};

/**
 * Measures every subject once in each of `rounds` rounds, in reversed order every second round.
 * @returns the results of each subject, by its name.
 * Rejects before the next turn once `signal` aborts.
 */
export async function inTurns<S extends { readonly name: string }, T>(
  subjects: readonly S[],
  rounds: number,
  measure: (subject: S) => Promise<T>,
  signal?: AbortSignal,
): Promise<Map<string, T[]>> {
  const found = new Map<string, T[]>(subjects.map(({ name }) => [name, []]));
  for (let turn = 0; turn < rounds; turn++) {
    for (const subject of turn % 2 === 0 ? subjects : subjects.toReversed()) {
      signal?.throwIfAborted();
      found.get(subject.name)!.push(await measure(subject));
    }
  }
  return found;
}

/** A thing to measure: one figure for each call. */
export type Subject = { readonly name: string; measure(): Promise<number> };

/** The median of every subject over `rounds` turns, after a first turn that does not count. */
export async function interleaved(
  subjects: readonly Subject[],
  rounds: number,
  signal?: AbortSignal,
): Promise<Map<string, number>> {
  const found = await interleavedRounds(subjects, rounds, signal);
  return new Map([...found].map(([name, values]) => [name, median(values)]));
}

/** As {@link interleaved}, but with the figure of every turn. */
export async function interleavedRounds(
  subjects: readonly Subject[],
  rounds: number,
  signal?: AbortSignal,
): Promise<Map<string, number[]>> {
  const take = ({ measure }: Subject) => measure();
  await inTurns(subjects, 1, take, signal);
  return await inTurns(subjects, rounds, take, signal);
}

/** How long `work` takes. */
export async function time_ms(work: () => Promise<unknown>): Promise<number> {
  const begun_ms = performance.now();
  await work();
  return performance.now() - begun_ms;
}

/** How long each of so many turns of `work` takes, one after the other. */
export async function times_ms(turns: number, work: (turn: number) => Promise<unknown>): Promise<number[]> {
  const times: number[] = [];
  while (times.length < turns) times.push(await time_ms(() => work(times.length)));
  return times;
}

export function sumOf(values: Iterable<number>): number {
  let sum = 0;
  for (const value of values) sum += value;
  return sum;
}

export const average = (values: ArrayLike<number> & Iterable<number>): number =>
  sumOf(values) / values.length;

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** The `share` quantile, 0 ≤ share < 1. */
export const quantile = (values: readonly number[], share: number): number =>
  values.toSorted((a, b) => a - b)[Math.floor(share * values.length)]!;

/** Items, such as blocks or units, by rising score. Where two have the same score, the lower one comes first. */
export const lowestFirst = (items: Iterable<number>, scoreOf: (item: number) => number): number[] =>
  [...items].sort((a, b) => scoreOf(a) - scoreOf(b) || a - b);

/** The same by falling score. */
export const highestFirst = (items: Iterable<number>, scoreOf: (item: number) => number): number[] =>
  lowestFirst(items, (item) => -scoreOf(item));

/** A share as people read it: 0.125 is '12.5 %'. */
export const percent = (share: number, digits = 1): string => `${(100 * share).toFixed(digits)} %`;

/** A change: 0.125 is '+12.5 %'. */
export const signedPercent = (share: number): string => `${share > 0 ? '+' : ''}${percent(share)}`;

export const round = (value: number, digits = 3): number => Number(value.toFixed(digits));
