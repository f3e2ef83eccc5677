/**
 * Grammars as data, and the EBNF that xgrammar reads: what a grammar costs and whether it can end is asked here, before
 * the library spends time on it.
 */

/** Inclusive, in code points: of ASCII, and `[0x80, 0x10ffff]` for all others as a whole. */
export type CharRange = readonly [from: number, to: number];

export type Expression =
  | { readonly kind: 'text'; readonly text: string }
  | { readonly kind: 'chars'; readonly ranges: readonly CharRange[] }
  | { readonly kind: 'rule'; readonly name: string }
  | { readonly kind: 'sequence'; readonly parts: readonly Expression[] }
  | { readonly kind: 'choice'; readonly options: readonly Expression[] }
  /** `max` undefined: without end. */
  | {
      readonly kind: 'repeat';
      readonly part: Expression;
      readonly min: number;
      readonly max: number | undefined;
    };

export const text = (value: string): Expression => ({ kind: 'text', text: value });
export const chars = (...ranges: readonly CharRange[]): Expression => ({ kind: 'chars', ranges });
export const rule = (name: string): Expression => ({ kind: 'rule', name });
export const sequence = (...parts: readonly Expression[]): Expression =>
  parts.length === 1 ? parts[0]! : { kind: 'sequence', parts };
export const choice = (...options: readonly Expression[]): Expression =>
  options.length === 1 ? options[0]! : { kind: 'choice', options };
export const repeat = (part: Expression, min: number, max?: number): Expression =>
  min === 1 && max === 1 ? part : { kind: 'repeat', part, min, max };
export const optional = (part: Expression): Expression => repeat(part, 0, 1);

/** Of all that an expression is made of, repetitions written out. */
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

/** How many letters the texts of an expression without rules have, at least and at most. */
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
      return [min * least, max * most];
    }
  }
}

type Rules = ReadonlyMap<string, Expression>;

/** The EBNF of `rules`, which begins at `root`. */
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
      // Repeated as it is, a class of characters needs no rule of its own: tokens of several characters stay inside.
      const isPlain = part.kind === 'chars' || part.kind === 'rule';
      return `${isPlain ? print(part) : `(${print(part)})`}${suffix(min, max)}`;
    }
  }
}

const LAST = 0x10ffff;

/** Everything but `ranges`, in order. */
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
 * The library knows ASCII in classes, and all that is not ASCII as a whole, where a class says what it does not hold. Other
 * ranges beyond ASCII match anything there.
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

/** As a code where EBNF means something by the letter. */
const escaped = (letter: string): string =>
  /^[ !#-[\]-~]$/.test(letter) ? letter : code(letter.codePointAt(0)!);
const code = (point: number): string =>
  point > 0xffff ? `\\U${point.toString(16).padStart(8, '0')}` : `\\u${point.toString(16).padStart(4, '0')}`;

type Leaf = Extract<Expression, { readonly kind: 'text' | 'chars' | 'rule' }>;

/** What an expression is made of; nothing for a leaf. */
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

const rulesIn = (expression: Expression): string[] =>
  expression.kind === 'rule' ? [expression.name] : partsOf(expression).flatMap(rulesIn);

/** Whether some text of the expression is made of leaves of which `isSo` is true. */
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
 * The rules for which `holds` is true, given those for which it was found true before. Once a rule is found, those that name it are
 * looked at again, so a long chain costs no more in one order than in another.
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

/** The rules from which no text comes that ends: each needs itself, or another such rule. */
export function endlessRules(rules: Rules): string[] {
  const ending = rulesThat(rules, (body, found) =>
    canBe(body, (leaf) =>
      leaf.kind === 'rule' ? found.has(leaf.name) : leaf.kind === 'text' || leaf.ranges.length > 0,
    ),
  );
  return [...rules.keys()].filter((name) => !ending.has(name));
}

/** The rules that come to themselves again before a letter was written: left recursion. */
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
  // What is left without the rules that begin with letters, or with such rules, goes in circles.
  const firsts = new Map([...rules].map(([name, body]) => [name, first(body)]));
  const begun = rulesThat(rules, (_, found, name) => firsts.get(name)!.every((one) => found.has(one)));
  return [...rules.keys()].filter((name) => !begun.has(name));
}
