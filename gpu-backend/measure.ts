/** Small pieces that measurements share: medians, and rounds in which everything measured takes its turn. */
import { setTimeout as sleep } from 'node:timers/promises';

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

export const round = (value: number, digits = 3): number => Number(value.toFixed(digits));

/** A thing to measure: gives one figure a call. */
export type Subject = { readonly name: string; measure(): Promise<number> };

/** After a rest: the threads of what was measured before spin on for a while, on the cores that this one needs. */
export const rested = ({ name, measure }: Subject, rest_ms: number): Subject => ({
  name,
  async measure() {
    await sleep(rest_ms);
    return await measure();
  },
});

/**
 * The median of every subject over `rounds`, each in turn, in reversed order every second round: whatever slows
 * the machine for a while slows all of them.
 */
export async function interleaved(
  subjects: readonly Subject[],
  rounds: number,
): Promise<Map<string, number>> {
  const found = new Map<string, number[]>(subjects.map(({ name }) => [name, []]));
  for (const { measure } of subjects) await measure();
  for (let turn = 0; turn < rounds; turn++) {
    for (const { name, measure } of turn % 2 === 0 ? subjects : subjects.toReversed()) {
      found.get(name)!.push(await measure());
    }
  }
  return new Map([...found].map(([name, values]) => [name, median(values)]));
}
