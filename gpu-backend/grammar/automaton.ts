/** Expressions as automata, with the states that a text may lead to: many (`statesOf`), or one (`oneReading`). */
import { type CharRange, chars, choice, type Expression, LAST, lettersOf, repeat, sequence } from './ebnf.ts';

/** An expression as an NFA: by state, its edges with a character and its edges without (`free`). */
export type Nfa = {
  readonly edges: { readonly ranges: readonly CharRange[]; readonly to: number }[][];
  readonly free: number[][];
  readonly start: number;
  end: number;
};

/** How many states and edges may still be looked at, some microseconds each. */
export type Effort = { left: number };

/** All states reachable from `states` without a character, sorted. */
export function closure({ free }: Nfa, states: readonly number[]): readonly number[] {
  const found = new Set(states);
  for (const state of found) for (const to of free[state]!) found.add(to);
  return [...found].sort((a, b) => a - b);
}

export function statesOf(expression: Expression): Nfa {
  const states: Nfa = { edges: [[]], free: [[]], start: 0, end: 0 };
  states.end = extend(states, 0, expression);
  return states;
}

function newState({ edges, free }: Nfa): number {
  free.push([]);
  return edges.push([]) - 1;
}

/** Adds the expression's states after `from`. @returns its end state. */
function extend(states: Nfa, from: number, expression: Expression): number {
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
  states: Nfa,
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

/** A state of an automaton in which a text leads to one state at most. */
export type State = {
  readonly edges: readonly { readonly ranges: readonly CharRange[]; readonly to: number }[];
  readonly isEnd: boolean;
};

export type OneReading = {
  /**
   * Most states of the expression itself with a wide class of characters that one text leads to: many tokens go on there.
   * Infinity where nothing was tried.
   */
  readonly readings: number;
  /** The first is where texts begin; undefined where they are more than allowed or `effort` does not suffice. */
  readonly states: readonly State[] | undefined;
};

/** The fewest states that match an expression without rules, by the powerset construction and Hopcroft's algorithm (1971). */
export function oneReading(expression: Expression, statesMax: number, effort: Effort): OneReading {
  const nfa = affordable(expression, effort);
  if (nfa === undefined) return { readings: Number.POSITIVE_INFINITY, states: undefined };
  const kinds = kindsOfLetters(nfa);
  const { sets, next, readings, isWhole } = powerset(
    nfa,
    kinds,
    (found) => found.sets.length > RAW_PER_STATE * statesMax,
    effort,
  );
  if (!isWhole) return { readings, states: undefined };
  const isEnd = sets.map((set) => set.includes(nfa.end));
  const states = merged(next, isEnd, kinds);
  return { readings, states: states.length > statesMax ? undefined : states };
}

/**
 * How many states may still be made, and of how many places in the expression with a wide class of characters they may consist: the
 * library checks most tokens at each.
 */
export type Room = { all: number; wide: number };

/**
 * Takes room for the states of automata in which a text leads to one state: the library makes such an automaton of each rule. A
 * loop before an exact count needs a state for each way in which the last letters may have begun the count, so `^.*a.{20}$` has a
 * million. False where there is too little room, or too little effort to tell.
 * @param bodies of rules, `separated`.
 */
export function takesStates(bodies: Iterable<Expression>, room: Room, effort: Effort): boolean {
  const open = [...bodies];
  for (const body of open) {
    const options = body.kind === 'choice' ? body.options : [body];
    const own = choice(...options.map((option) => inOneRule(option, open)));
    // Without an endless loop the library makes no more states than there are characters.
    if (lettersOf(own)[1] < Number.POSITIVE_INFINITY) continue;
    const nfa = affordable(own, effort);
    if (nfa === undefined) return false;
    const { sets, wide, isWhole } = powerset(
      nfa,
      kindsOfLetters(nfa),
      (found) => found.sets.length > room.all || found.wide > room.wide,
      effort,
    );
    room.all -= sets.length;
    room.wide -= wide;
    if (!isWhole) return false;
  }
  return true;
}

/** The use of another rule: one edge in an automaton, and no letter. */
const USE = chars([LAST + 1, LAST + 1]);

/**
 * As the library has it in the automaton of one rule: inner choices, repeated groups and what a count allows beyond its minimum
 * are rules of their own. Adds the choices to `open`; the groups are rules already, and the others have no loop, or one alone.
 */
function inOneRule(expression: Expression, open: Expression[]): Expression {
  switch (expression.kind) {
    case 'sequence':
      return sequence(...expression.parts.map((part) => inOneRule(part, open)));
    case 'choice':
      open.push(expression);
      return USE;
    case 'repeat': {
      const { part, min, max } = expression;
      if (part.kind !== 'chars') return USE;
      // `x{2,}` is two, and any number more by a rule of their own; but `x+` is printed as `x x*`.
      const isLoop = max === undefined && min < 2;
      if (isLoop || max === min) return expression;
      return sequence(repeat(part, min, min), USE);
    }
    case 'rule':
      return USE;
    default:
      return expression;
  }
}

/** The automaton of an expression, if there is effort for it. */
function affordable(expression: Expression, effort: Effort): Nfa | undefined {
  const size = nfaSizeOf(expression);
  if (size > NFA_STATES_MAX || size / PER_STATE > effort.left) return undefined;
  effort.left -= size / PER_STATE;
  return statesOf(expression);
}

/** Sets of states that a text may lead to. */
type Powerset = {
  readonly sets: readonly Uint16Array[];
  /** By set, the number of the set behind each kind of letters. */
  readonly next: readonly (readonly number[])[];
  /** Most states with a wide class of characters in one set. */
  readonly readings: number;
  /** How many such states all sets have together. */
  readonly wide: number;
  /** Whether all sets were found: there were not too many, and `effort` was enough. */
  readonly isWhole: boolean;
};

function powerset(
  nfa: Nfa,
  kinds: readonly Kind[],
  areTooMany: (found: Pick<Powerset, 'sets' | 'wide'>) => boolean,
  effort: Effort,
): Powerset {
  const after = closuresOf(nfa, effort);
  const known = new Map<string, number>();
  const sets: Uint16Array[] = [];
  const idOf = (set: Uint16Array): number => {
    const key = String.fromCharCode(...set);
    const id = known.get(key) ?? sets.push(set) - 1;
    known.set(key, id);
    return id;
  };
  idOf(Uint16Array.from(after(nfa.start)));
  const next: number[][] = [];
  let [readings, wide] = [0, 0];
  const isWide = nfa.edges.map((edges) => edges.some(({ ranges }) => lettersIn(ranges) > NARROW_MAX));
  const seen = new Uint32Array(nfa.edges.length);
  let round = 0;
  for (let i = 0; i < sets.length; i++) {
    const set = sets[i]!;
    const count = set.filter((state) => isWide[state]).length;
    readings = Math.max(readings, count);
    wide += count;
    if (effort.left < 0 || areTooMany({ sets, wide })) return { sets, next, readings, wide, isWhole: false };
    next.push(
      kinds.map(({ edges }) => {
        const led: number[] = [];
        round++;
        for (const state of set) {
          const ends = edges[state];
          if (ends === undefined) continue;
          for (const to of ends) {
            for (const one of after(to)) {
              if (seen[one] === round) continue;
              seen[one] = round;
              led.push(one);
            }
          }
        }
        effort.left -= (PER_KIND + set.length + led.length) / PER_EFFORT;
        return led.length === 0 ? NONE : idOf(Uint16Array.from(led).sort());
      }),
    );
  }
  // What was found last may lack states.
  return { sets, next, readings, wide, isWhole: effort.left >= 0 };
}

const NONE = -1;
/** How many states the powerset may have for each that is left when equal ones are one. */
const RAW_PER_STATE = 8;
/** A state in a set takes less time than a state and edge of `isWithin`. */
const PER_EFFORT = 64;
const PER_CLOSURE = 8;
const PER_STATE = 16;
/** Letters that lead nowhere take time, too. */
const PER_KIND = 4;
/** A set has the number of each of its states in 16 bits. */
const NFA_STATES_MAX = 2 ** 16;
/** A class of more characters lets many tokens through. */
const NARROW_MAX = 16;

export const lettersIn = (ranges: readonly CharRange[]): number =>
  ranges.reduce((sum, [low, high]) => sum + high - low + 1, 0);

/** The states of `statesOf`, or a few more: also those of empty texts, which no limit on characters counts. */
function nfaSizeOf(expression: Expression): number {
  const sum = (parts: readonly Expression[]) => parts.reduce((all, part) => all + nfaSizeOf(part), 1);
  switch (expression.kind) {
    case 'text':
      return 1 + expression.text.length;
    case 'sequence':
      return sum(expression.parts);
    case 'choice':
      return sum(expression.options) + expression.options.length;
    case 'repeat':
      return 2 + nfaSizeOf(expression.part) * (expression.max ?? expression.min + 1);
    default:
      return 1;
  }
}

/** By state, the states with edges that it leads to without a character, and the end. */
function closuresOf(nfa: Nfa, effort: Effort): (state: number) => readonly number[] {
  const known: (readonly number[] | undefined)[] = [];
  return (state) => {
    const found = known[state];
    if (found !== undefined) return found;
    const all = effort.left < 0 ? [] : closure(nfa, [state]);
    effort.left -= all.length / PER_CLOSURE;
    known[state] = all.filter((one) => nfa.edges[one]!.length > 0 || one === nfa.end);
    return known[state];
  };
}

/** Letters that all edges treat alike, with the states behind these edges, by state. */
type Kind = { readonly ranges: CharRange[]; readonly edges: (number[] | undefined)[] };

function kindsOfLetters({ edges }: Nfa): readonly Kind[] {
  const all = edges.flatMap((some, from) => some.map(({ ranges, to }) => ({ ranges, from, to })));
  const classes = [...Map.groupBy(all, ({ ranges }) => JSON.stringify(ranges)).values()];
  const bounds = classes.flatMap(([one]) => one!.ranges.flatMap(([low, high]) => [low, high + 1]));
  const cuts = [...new Set(bounds)].sort((a, b) => a - b);
  const places = new Map(cuts.map((cut, at) => [cut, at]));
  /** By cut, the classes that have the letters from there to the next cut. */
  const having = cuts.map(() => new Set<number>());
  for (const [i, [one]] of classes.entries())
    for (const [low, high] of one!.ranges)
      for (let at = places.get(low)!; at < places.get(high + 1)!; at++) having[at]!.add(i);
  const kinds = new Map<string, Kind>();
  for (const [at, some] of having.entries()) {
    if (some.size === 0) continue;
    const range: CharRange = [cuts[at]!, cuts[at + 1]! - 1];
    const key = [...some].join();
    const known = kinds.get(key);
    if (known !== undefined) known.ranges.push(range);
    else {
      const kind: Kind = { ranges: [range], edges: [] };
      for (const edge of [...some].flatMap((i) => classes[i]!))
        kind.edges[edge.from] = [...(kind.edges[edge.from] ?? []), edge.to];
      kinds.set(key, kind);
    }
  }
  return [...kinds.values()];
}

/** States that go on alike become one. */
function merged(
  next: readonly (readonly number[])[],
  isEnd: readonly boolean[],
  kinds: readonly Kind[],
): readonly State[] {
  const before = kinds.map((_, kind) => Map.groupBy(next.keys(), (state) => next[state]![kind]!));
  const groupOf: number[] = isEnd.map(Number);
  const groups = [0, 1].map(
    (group) => new Set([...groupOf.keys()].filter((state) => groupOf[state] === group)),
  );
  const open = new Set([0, 1]);
  for (const group of open) {
    open.delete(group);
    const members = [...groups[group]!];
    for (const led of before) {
      const leading = members.flatMap((state) => led.get(state) ?? []);
      for (const [split, states] of Map.groupBy(leading, (state) => groupOf[state]!)) {
        if (states.length === groups[split]!.size) continue;
        const added = groups.push(new Set(states)) - 1;
        for (const state of states) {
          groups[split]!.delete(state);
          groupOf[state] = added;
        }
        open.add(open.has(split) || states.length <= groups[split]!.size ? added : split);
      }
    }
  }
  return inOrder(groupOf, next, isEnd, kinds);
}

/** The groups that texts lead to, that of the first state first. */
function inOrder(
  groupOf: readonly number[],
  next: readonly (readonly number[])[],
  isEnd: readonly boolean[],
  kinds: readonly Kind[],
): readonly State[] {
  const ids = new Map([[groupOf[0]!, 0]]);
  const firsts = [0];
  const states: State[] = [];
  for (const first of firsts) {
    const edges = new Map<number, CharRange[]>();
    for (const [kind, state] of next[first]!.entries()) {
      if (state === NONE) continue;
      const group = groupOf[state]!;
      const to = ids.get(group) ?? firsts.push(state) - 1;
      ids.set(group, to);
      edges.set(to, [...(edges.get(to) ?? []), ...kinds[kind]!.ranges]);
    }
    states.push({ edges: [...edges].map(([to, ranges]) => ({ ranges, to })), isEnd: isEnd[first]! });
  }
  return states;
}
