/**
 * Grammars as data, printed as EBNF for xgrammar. Their cost, left recursion and rules that never end are checked here,
 * before xgrammar compiles them.
 */

/** Inclusive, in code points. xgrammar knows ranges within ASCII, and only the whole range `[0x80, 0x10ffff]` beyond. */
export type CharRange = readonly [from: number, to: number];

export type Expression =
  | { readonly kind: 'text'; readonly text: string }
  | { readonly kind: 'chars'; readonly ranges: readonly CharRange[] }
  | { readonly kind: 'rule'; readonly name: string }
  | { readonly kind: 'sequence'; readonly parts: readonly Expression[] }
  | { readonly kind: 'choice'; readonly options: readonly Expression[] }
  /** `max` undefined: unbounded. */
  | {
      readonly kind: 'repeat';
      readonly part: Expression;
      readonly min: number;
      readonly max: number | undefined;
    };

export type Rule = Extract<Expression, { readonly kind: 'rule' }>;

export const text = (value: string): Expression => ({ kind: 'text', text: value });
export const chars = (...ranges: readonly CharRange[]): Expression => ({ kind: 'chars', ranges });
export const rule = (name: string): Rule => ({ kind: 'rule', name });
export const sequence = (...parts: readonly Expression[]): Expression =>
  parts.length === 1 ? parts[0]! : { kind: 'sequence', parts };
export const choice = (...options: readonly Expression[]): Expression =>
  options.length === 1 ? options[0]! : { kind: 'choice', options };
/** Repeating the empty text gives the empty text. It has no leaves, so no limit would count its repetitions. */
export const repeat = (part: Expression, min: number, max?: number): Expression =>
  (min === 1 && max === 1) || isEmpty(part) ? part : { kind: 'repeat', part, min, max };
export const optional = (part: Expression): Expression => repeat(part, 0, 1);

const isEmpty = (expression: Expression): boolean => sizeOf(expression) === 0;

/** Number of states of an expression, with repetitions written out. */
export const sizeOf = (expression: Expression): number => sumOfLeaves(expression, () => 1);

/** The sum of `of` over all leaves, with repetitions written out. */
export function sumOfLeaves(expression: Expression, of: (leaf: Expression) => number): number {
  const sum = (parts: readonly Expression[]) =>
    parts.reduce((total, part) => total + sumOfLeaves(part, of), 0);
  switch (expression.kind) {
    case 'sequence':
      return sum(expression.parts);
    case 'choice':
      return sum(expression.options);
    case 'repeat':
      return sumOfLeaves(expression.part, of) * Math.max(1, expression.max ?? expression.min);
    default:
      return of(expression);
  }
}

/** The least and greatest length of the texts of an expression without rules, in characters. */
export function lettersOf(expression: Expression): readonly [least: number, most: number] {
  switch (expression.kind) {
    case 'text':
      return [expression.text.length, expression.text.length];
    case 'chars':
      return [1, 1];
    case 'rule':
      return [0, Number.POSITIVE_INFINITY];
    case 'sequence': {
      const all = expression.parts.map(lettersOf);
      return [all.reduce((sum, [least]) => sum + least, 0), all.reduce((sum, [, most]) => sum + most, 0)];
    }
    case 'choice': {
      const all = expression.options.map(lettersOf);
      return [Math.min(...all.map(([least]) => least)), Math.max(...all.map(([, most]) => most))];
    }
    case 'repeat': {
      const { part, min, max = Number.POSITIVE_INFINITY } = expression;
      const [least, most] = lettersOf(part);
      // A part that never comes is endless no times, and no letters are as many without end.
      return [min * least, max === 0 || most === 0 ? 0 : max * most];
    }
  }
}

export type Rules = ReadonlyMap<string, Expression>;

/** Prints `rules` as EBNF with the start rule `root`. */
export function printGrammar(rules: Rules, root: Expression): string {
  const lines = [...rules].map(([name, body]) => `${name} ::= ${print(body)}`);
  return [`root ::= ${print(root)}`, ...lines].join('\n');
}

function print(expression: Expression): string {
  switch (expression.kind) {
    case 'text':
      return `"${[...expression.text].map(escaped).join('')}"`;
    case 'chars':
      return printChars(expression.ranges);
    case 'rule':
      return expression.name;
    case 'sequence':
      return expression.parts.length === 0 ? '""' : `(${expression.parts.map(print).join(' ')})`;
    case 'choice':
      return `(${expression.options.map(print).join(' | ')})`;
    case 'repeat': {
      const { part, min, max } = expression;
      if (max === 0) return '""';
      // Without parentheses a repeated character class needs no rule of its own, which makes long tokens fast to match. `+`
      // would get one: within a loop such as `([a-z]+ " "+)*` the library tries all tokens then, again at each place.
      if (part.kind === 'chars' && min === 1 && max === undefined) return `(${print(part)} ${print(part)}*)`;
      const isPlain = part.kind === 'chars' || part.kind === 'rule';
      return `${isPlain ? print(part) : `(${print(part)})`}${suffix(min, max)}`;
    }
  }
}

/** The last code point. */
export const LAST = 0x10ffff;

/** All code points that are not in `ranges`, as sorted ranges. */
export function complement(ranges: readonly CharRange[]): CharRange[] {
  const left: CharRange[] = [];
  let from = 0;
  for (const [low, high] of [...ranges].sort((a, b) => a[0] - b[0])) {
    if (low > from) left.push([from, low - 1]);
    from = Math.max(from, high + 1);
  }
  return from <= LAST ? [...left, [from, LAST]] : left;
}

/**
 * In the library, a negated class contains all of non-ASCII; other ranges beyond ASCII would match any non-ASCII character.
 */
function printChars(ranges: readonly CharRange[]): string {
  const isWide = ranges.some(([, high]) => high === LAST);
  const written = isWide ? complement(ranges) : ranges;
  const parts = written.map(([from, to]) => (from === to ? code(from) : `${code(from)}-${code(to)}`));
  return `[${isWide ? '^' : ''}${parts.join('')}]`;
}

function suffix(min: number, max: number | undefined): string {
  if (max === undefined) return min === 0 ? '*' : min === 1 ? '+' : `{${min},}`;
  return min === 0 && max === 1 ? '?' : `{${min},${max}}`;
}

/** A character of a quoted text; escaped if it has a meaning in EBNF. */
const escaped = (letter: string): string =>
  /^[ !#-[\]-~]$/.test(letter) ? letter : code(letter.codePointAt(0)!);
const code = (point: number): string =>
  point > 0xffff ? `\\U${point.toString(16).padStart(8, '0')}` : `\\u${point.toString(16).padStart(4, '0')}`;

type Leaf = Extract<Expression, { readonly kind: 'text' | 'chars' | 'rule' }>;

/** An expression's direct parts; none for a leaf. */
function partsOf(expression: Expression): readonly Expression[] {
  switch (expression.kind) {
    case 'sequence':
      return expression.parts;
    case 'choice':
      return expression.options;
    case 'repeat':
      return [expression.part];
    default:
      return [];
  }
}

/** Whether it refers to a rule. */
export const hasRules = (expression: Expression): boolean =>
  expression.kind === 'rule' || partsOf(expression).some(hasRules);

/** Whether something other than a single character is repeated. */
export const repeatsGroups = (expression: Expression): boolean =>
  (expression.kind === 'repeat' && expression.part.kind !== 'chars' && expression.max !== 1) ||
  partsOf(expression).some(repeatsGroups);

/** With repetitions. */
function rulesIn(expression: Expression, found: string[] = []): readonly string[] {
  if (expression.kind === 'rule') found.push(expression.name);
  else for (const part of partsOf(expression)) rulesIn(part, found);
  return found;
}

/** Whether the expression has a text whose leaves all satisfy `isSo`. */
function canBe(expression: Expression, isSo: (leaf: Leaf) => boolean): boolean {
  const alsoCan = (part: Expression) => canBe(part, isSo);
  switch (expression.kind) {
    case 'sequence':
      return expression.parts.every(alsoCan);
    case 'choice':
      return expression.options.some(alsoCan);
    case 'repeat':
      return expression.min === 0 || alsoCan(expression.part);
    default:
      return isSo(expression);
  }
}

/**
 * Least fixed point: the rules for which `holds` is true, given the rules found so far. When a rule is found, the rules that
 * refer to it are checked again, so the cost does not depend on the order of the rules.
 */
function rulesThat(
  rules: Rules,
  holds: (body: Expression, found: ReadonlySet<string>, name: string) => boolean,
): ReadonlySet<string> {
  const users = new Map<string, string[]>([...rules.keys()].map((name) => [name, []]));
  for (const [name, body] of rules) for (const used of rulesIn(body)) users.get(used)?.push(name);
  const found = new Set<string>();
  const open = [...rules.keys()];
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    if (found.has(name) || !holds(rules.get(name)!, found, name)) continue;
    found.add(name);
    for (const user of users.get(name)!) open.push(user);
  }
  return found;
}

/** Rules without any finite text: each needs itself or another such rule. */
export function endlessRules(rules: Rules): string[] {
  const ending = rulesThat(rules, (body, found) =>
    canBe(body, (leaf) =>
      leaf.kind === 'rule' ? found.has(leaf.name) : leaf.kind === 'text' || leaf.ranges.length > 0,
    ),
  );
  return [...rules.keys()].filter((name) => !ending.has(name));
}

/** Rules that may begin with something else than `letter`; what their sequences begin with must not be empty. */
export function otherRules(rules: Rules, letter: string): ReadonlySet<string> {
  const isOther = (expression: Expression, found: ReadonlySet<string>): boolean => {
    switch (expression.kind) {
      case 'text':
        return !expression.text.startsWith(letter);
      case 'chars':
        return true;
      case 'rule':
        return found.has(expression.name);
      case 'sequence':
        return expression.parts.slice(0, 1).some((part) => isOther(part, found));
      case 'choice':
        return expression.options.some((option) => isOther(option, found));
      case 'repeat':
        return isOther(expression.part, found);
    }
  };
  return rulesThat(rules, isOther);
}

/** Left-recursive rules: they reach themselves again without consuming a character. */
export function loopingRules(rules: Rules): string[] {
  const mayBeEmpty = (expression: Expression, found: ReadonlySet<string>): boolean =>
    canBe(expression, (leaf) =>
      leaf.kind === 'rule' ? found.has(leaf.name) : leaf.kind === 'text' && leaf.text === '',
    );
  const empty = rulesThat(rules, mayBeEmpty);
  const first = (expression: Expression): string[] => {
    if (expression.kind === 'rule') return [expression.name];
    const parts = partsOf(expression);
    const end = expression.kind === 'sequence' ? parts.findIndex((part) => !mayBeEmpty(part, empty)) : -1;
    return parts.slice(0, end === -1 ? undefined : end + 1).flatMap(first);
  };
  // A rule is fine if everything that it may begin with is a character or a fine rule; the remaining rules are cyclic.
  const firsts = new Map([...rules].map(([name, body]) => [name, first(body)]));
  const begun = rulesThat(rules, (_, found, name) => firsts.get(name)!.every((one) => found.has(one)));
  return [...rules.keys()].filter((name) => !begun.has(name));
}
