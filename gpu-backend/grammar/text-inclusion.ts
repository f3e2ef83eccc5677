/** Language inclusion: whether all texts of one expression are texts of another. Checks a `format` against a `pattern`. */
import type { CharRange, Expression } from './ebnf.ts';

/** An expression as an NFA: by state, its edges with a character and its edges without (`free`). */
type States = {
  readonly edges: { readonly ranges: readonly CharRange[]; readonly to: number }[][];
  readonly free: number[][];
  readonly start: number;
  end: number;
};

/** How many states and edges may still be looked at, some microseconds each. */
export type Effort = { left: number };

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

/** All states reachable from `states` without a character, sorted. */
function closure({ free }: States, states: readonly number[]): readonly number[] {
  const found = new Set(states);
  for (const state of found) for (const to of free[state]!) found.add(to);
  return [...found].sort((a, b) => a - b);
}

function statesOf(expression: Expression): States {
  const states: States = { edges: [[]], free: [[]], start: 0, end: 0 };
  states.end = extend(states, 0, expression);
  return states;
}

function newState({ edges, free }: States): number {
  free.push([]);
  return edges.push([]) - 1;
}

/** Adds the expression's states after `from`. @returns its end state. */
function extend(states: States, from: number, expression: Expression): number {
  switch (expression.kind) {
    case 'text':
      return [...expression.text].reduce((at, letter) => {
        const code = letter.codePointAt(0)!;
        return extend(states, at, { kind: 'chars', ranges: [[code, code]] });
      }, from);
    case 'chars': {
      const to = newState(states);
      states.edges[from]!.push({ ranges: expression.ranges, to });
      return to;
    }
    case 'sequence':
      return expression.parts.reduce((at, part) => extend(states, at, part), from);
    case 'choice': {
      const to = newState(states);
      for (const option of expression.options) {
        const begin = newState(states);
        states.free[from]!.push(begin);
        states.free[extend(states, begin, option)]!.push(to);
      }
      return to;
    }
    case 'repeat':
      return extendRepeated(states, from, expression);
    case 'rule':
      throw new Error(`the rule ${expression.name} has no states of its own`);
  }
}

function extendRepeated(
  states: States,
  from: number,
  { part, min, max }: Extract<Expression, { readonly kind: 'repeat' }>,
): number {
  let at = from;
  for (let i = 0; i < min; i++) at = extend(states, at, part);
  const to = newState(states);
  states.free[at]!.push(to);
  if (max === undefined) {
    const begin = newState(states);
    states.free[to]!.push(begin);
    states.free[extend(states, begin, part)]!.push(to);
    return to;
  }
  for (let i = min; i < max; i++) {
    at = extend(states, at, part);
    states.free[at]!.push(to);
  }
  return to;
}
