/**
 * What every measurement shares: rounds in which everything measured takes its turn, so that whatever slows the machine
 * for a while slows all of it, and the figures that are made of the times.
 */
import { setTimeout as sleep } from 'node:timers/promises';

/**
 * What each subject gives in `rounds` rounds, by its name. Each takes its turn, in reversed order every second round.
 */
export async function inTurns<S extends { readonly name: string }, T>(
  subjects: readonly S[],
  rounds: number,
  measure: (subject: S) => Promise<T>,
): Promise<Map<string, T[]>> {
  const found = new Map<string, T[]>(subjects.map(({ name }) => [name, []]));
  for (let turn = 0; turn < rounds; turn++) {
    for (const subject of turn % 2 === 0 ? subjects : subjects.toReversed()) {
      found.get(subject.name)!.push(await measure(subject));
    }
  }
  return found;
}

/** A thing to measure: gives one figure a call. */
export type Subject = { readonly name: string; measure(): Promise<number> };

/** The median of every subject over `rounds` turns, after a first turn that does not count. */
export async function interleaved(
  subjects: readonly Subject[],
  rounds: number,
): Promise<Map<string, number>> {
  const found = await interleavedRounds(subjects, rounds);
  return new Map([...found].map(([name, values]) => [name, median(values)]));
}

/** The same, with the figure of every turn. */
export async function interleavedRounds(
  subjects: readonly Subject[],
  rounds: number,
): Promise<Map<string, number[]>> {
  for (const { measure } of subjects) await measure();
  return await inTurns(subjects, rounds, ({ measure }) => measure());
}

/** After a rest: the threads of what was measured before spin on for a while, on the cores that this one needs. */
export const rested = ({ name, measure }: Subject, rest_ms: number): Subject => ({
  name,
  async measure() {
    await sleep(rest_ms);
    return await measure();
  },
});

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** The value that `share` of the values are below. */
export const quantile = (values: readonly number[], share: number): number =>
  values.toSorted((a, b) => a - b)[Math.floor(share * values.length)]!;

export const round = (value: number, digits = 3): number => Number(value.toFixed(digits));
