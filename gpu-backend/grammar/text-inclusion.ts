/** Language inclusion: whether all texts of one expression are texts of another. Checks a `format` against a `pattern`. */
import { closure, type Effort, statesOf } from './automaton.ts';
import type { CharRange, Expression } from './ebnf.ts';

/**
 * Whether every text of `inner` is a text of `outer`; neither may have rules. False also if `effort` does not suffice to find
 * out. Walks the states of `inner` together with the set of states that `outer` may be in after the same characters.
 */
export function isWithin(inner: Expression, outer: Expression, effort: Effort): boolean {
  const [from, among] = [statesOf(inner), statesOf(outer)];
  const seen = new Set<string>();
  const open = [{ state: from.start, others: closure(among, [among.start]) }];
  for (let next = open.pop(); next !== undefined; next = open.pop()) {
    const { state, others } = next;
    effort.left -= 1 + others.length;
    const key = `${state}:${others.join(',')}`;
    if (seen.has(key)) continue;
    seen.add(key);
    if (state === from.end && !others.includes(among.end)) return false;
    for (const to of from.free[state]!) open.push({ state: to, others });
    const edges = others.flatMap((other) => among.edges[other]!);
    for (const { ranges, to } of from.edges[state]!) {
      effort.left -= ranges.length * edges.length;
      for (const letter of firstLetters(ranges, edges)) {
        effort.left -= edges.length;
        if (effort.left < 0) return false;
        const led = edges.filter((edge) =>
          edge.ranges.some(([low, high]) => low <= letter && letter <= high),
        );
        if (led.length === 0) return false;
        open.push({
          state: to,
          others: closure(
            among,
            led.map((edge) => edge.to),
          ),
        });
      }
    }
  }
  return true;
}

/** One character from each part of `ranges` whose characters all match the same edges. */
function firstLetters(
  ranges: readonly CharRange[],
  edges: readonly { ranges: readonly CharRange[] }[],
): Set<number> {
  const cuts = edges.flatMap((edge) => edge.ranges.flatMap(([low, high]) => [low, high + 1]));
  return new Set(ranges.flatMap(([low, high]) => [low, ...cuts.filter((cut) => low < cut && cut <= high)]));
}
