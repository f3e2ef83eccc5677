/**
 * Rewrites grammars so that xgrammar 0.1.27 compiles them right. In the automaton of a rule, it merges states with the same
 * beginning and states with the same end, and mixes both up: `"acc" | "cbba" | "bbc" | "ab" | "bbbcca"` matches `acbcca`, too
 * (mlc-ai/xgrammar, issue 618). It also merges the start of a rule with what follows a loop there: `[a]* "a" "b"` matches `b`
 * (pull request 911). So here no two options of a choice begin alike, and no rule begins with a loop. In the library, each
 * choice within an option is a rule of its own.
 */
import {
  type CharRange,
  chars,
  choice,
  complement,
  type Expression,
  hasRules,
  type Rules,
  repeat,
  rule,
  sequence,
  text,
} from './ebnf.ts';

/** The same texts, by choices whose options begin differently. `known`: further rules, separated already. */
export function separated(
  rules: Rules,
  root: Expression,
  known: Rules = new Map(),
): { readonly rules: Rules; readonly root: Expression } {
  const separator = new Separator(known);
  for (const [name, body] of rules) separator.add(name, body);
  return { root: separator.body(root), rules: separator.rules };
}

/** A rule for the empty text. */
const NOTHING = rule('nothing');

/** What follows each other; no part is a sequence or empty. */
type Parts = readonly Expression[];

class Separator {
  readonly rules: Map<string, Expression>;
  #groups: number;

  constructor(known: Rules) {
    this.rules = new Map([...known, ['nothing', text('')]]);
    this.#groups = known.size;
  }

  add(name: string, expression: Expression): void {
    const body = this.body(expression);
    // The library copies rules without references into choices that begin with them.
    this.rules.set(name, hasRules(body) ? body : sequence(body, NOTHING));
  }

  body(expression: Expression): Expression {
    switch (expression.kind) {
      case 'repeat': {
        const { part, min, max } = expression;
        return part.kind === 'chars' ? expression : repeat(this.#asRule(part), min, max);
      }
      case 'choice':
        return this.#choice(expression.options.flatMap(optionsOf));
      case 'sequence':
        return this.#sequence(inRow(expression));
      default:
        return expression;
    }
  }

  #asRule(body: Expression): Expression {
    if (body.kind === 'rule') return body;
    const name = `group_${this.#groups++}`;
    this.add(name, body);
    return rule(name);
  }

  #sequence(parts: Parts): Expression {
    if (parts.every(isLeaf)) return sequence(...parts);
    const [first] = parts;
    const isLoop = first?.kind === 'repeat' && first.part.kind === 'chars' && first.max === undefined;
    const written: Expression[] = isLoop ? [NOTHING] : [];
    for (const part of parts) {
      const body = this.body(part);
      for (const one of body.kind === 'sequence' ? body.parts : [body]) append(written, one);
    }
    return sequence(...written);
  }

  #choice(options: readonly Parts[]): Expression {
    const begun = options.filter((parts) => parts.length > 0);
    const groups = [...Map.groupBy(begun, beginningOf).values()].map(factored);
    const beginnings = groups.map(([beginning]) => beginning!);
    const written = groups.map(([beginning, ...rest]) => {
      const parts = [this.#opaque(beginning!), ...rest];
      return isMixedUp(beginning!, beginnings) ? this.#asRule(sequence(...parts)) : this.#sequence(parts);
    });
    return choice(...(begun.length < options.length ? [text('')] : []), ...written);
  }

  /** The library copies choices, and what comes once or more, into the choice that begins with it. */
  #opaque(beginning: Expression): Expression {
    const isCopied = beginning.kind === 'choice' || (beginning.kind === 'repeat' && beginning.min > 0);
    return isCopied ? this.#asRule(beginning) : beginning;
  }
}

const isLeaf = ({ kind }: Expression): boolean => kind === 'text' || kind === 'chars' || kind === 'rule';

/** Without nesting and empty parts; a class of a single letter is a text, and equal classes look alike. */
function inRow(expression: Expression): Parts {
  switch (expression.kind) {
    case 'sequence':
      return expression.parts.flatMap(inRow);
    case 'text':
      return expression.text === '' ? [] : [expression];
    case 'repeat':
      return expression.max === 0 ? [] : [expression];
    case 'chars': {
      const ranges = complement(complement(expression.ranges));
      const [first, ...others] = ranges;
      const isLetter = others.length === 0 && first?.[0] === first?.[1];
      return [isLetter ? text(String.fromCodePoint(first![0])) : chars(...ranges)];
    }
    default:
      return [expression];
  }
}

/** An option, or its own options if it is a choice. */
function optionsOf(option: Expression): readonly Parts[] {
  const parts = inRow(option);
  const [first] = parts;
  return parts.length === 1 && first!.kind === 'choice' ? first!.options.flatMap(optionsOf) : [parts];
}

/** Neighbouring texts become one. */
function append(parts: Expression[], part: Expression): void {
  const last = parts.at(-1);
  if (last?.kind === 'text' && part.kind === 'text') parts[parts.length - 1] = text(last.text + part.text);
  else parts.push(part);
}

const firstLetter = (all: string): string => String.fromCodePoint(all.codePointAt(0)!);

/** Equal for options that begin alike. */
function beginningOf([first]: Parts): string {
  switch (first!.kind) {
    case 'text':
      return `text ${firstLetter(first!.text)}`;
    case 'rule':
      return `rule ${first!.name}`;
    default:
      return JSON.stringify(first);
  }
}

/** Options that begin alike, as their beginning and the choice of how they go on. */
function factored(group: readonly Parts[]): Parts {
  if (group.length === 1) return group[0]!;
  const [[first]] = group as [[Expression]];
  if (first.kind !== 'text') return [first, choice(...group.map((parts) => sequence(...parts.slice(1))))];
  const texts = group.map(([one]) => (one as typeof first).text);
  const shared = commonBeginning(texts);
  const rests = group.map((parts, i) => sequence(text(texts[i]!.slice(shared.length)), ...parts.slice(1)));
  return [text(shared), choice(...rests)];
}

/** In whole characters. */
function commonBeginning([first = '', ...others]: readonly string[]): string {
  let length = 0;
  for (const letter of first) {
    if (!others.every((other) => other.startsWith(letter, length))) break;
    length += letter.length;
  }
  return first.slice(0, length);
}

/** Whether a beginning is several edges of the automaton, some of them equal to those of another beginning. */
function isMixedUp(beginning: Expression, all: readonly Expression[]): boolean {
  const ranges = firstRanges(beginning);
  const isWide = reachesBeyondAscii(ranges);
  if (!isWide && ranges.length < 2) return false;
  return all.some((other) => {
    if (other === beginning) return false;
    const others = firstRanges(other);
    return (
      (isWide && reachesBeyondAscii(others)) ||
      others.some(([low, high]) => ranges.some(([from, to]) => low <= to && from <= high))
    );
  });
}

function firstRanges(beginning: Expression): readonly CharRange[] {
  if (beginning.kind === 'chars') return beginning.ranges;
  if (beginning.kind !== 'text') return [];
  const code = beginning.text.codePointAt(0)!;
  return [[code, code]];
}

/** Such characters have several bytes, and may share the first of them. */
const reachesBeyondAscii = (ranges: readonly CharRange[]): boolean => ranges.some(([, high]) => high > 0x7f);
