/**
 * Converts JSON schemas to grammars; `schema-reader.ts` reads the schemas. The grammar allows a subset of what the schema
 * allows: every text of it is valid, and where the schema leaves a choice the grammar fixes it (order of properties,
 * spaces, no properties beyond the named ones). A schema that a grammar cannot enforce is refused with the place in it.
 *
 * xgrammar can convert schemas, too, but it lets control characters into strings of a `maxLength`, does not escape patterns
 * for JSON, and ends its WebAssembly module at a wrong `$ref`.
 */
import {
  type CharRange,
  chars,
  choice,
  type Expression,
  endlessRules,
  lettersOf,
  loopingRules,
  optional,
  otherRules,
  printGrammar,
  type Rule,
  repeat,
  rule,
  sequence,
  sumOfLeaves,
  text,
} from './ebnf.ts';
import { INTEGER, integersBetween, NUMBER, numbersBetween } from './number-range.ts';
import {
  NOT_STRINGS,
  type Path,
  type SchemaObject,
  type SchemaOptions,
  SchemaReader,
  type Spent,
  type Type,
} from './schema-reader.ts';
import { separated } from './separated-choices.ts';
import { isWithin } from './text-inclusion.ts';
import { FORMATS, HELD_BY_FORMATS, PatternError, PLAIN, patternGrammar } from './text-pattern.ts';

/** Limits of a request's schemas together, beyond which their grammar would take seconds to compile. */
const NODES_MAX = 2000;
const LITERAL_CHARS_MAX = 64 * 1024;
/** Most characters in strings of bounded length, all strings together: each is a state for which all tokens are checked. */
const COUNTED_CHARS_MAX = 256;
/** Most characters that patterns and formats may have, with repetitions written out. */
const PATTERN_STATES_MAX = 16_384;
/** Most of these for one pattern. */
const ONE_PATTERN_STATES_MAX = 2048;
/** Most items in lists of bounded length. */
const ITEMS_MAX = 2000;
const DEPTH_MAX = 48;

/**
 * The EBNF of JSON values that are valid for the schema.
 * @throws MaskrouteError `invalid_schema`.
 */
export function schemaGrammar(schema: unknown, options: SchemaOptions): string {
  return new Converter(schema, options).convert();
}

const COMMA = text(', ');
const COLON = text(': ');
const HEX = chars([0x30, 0x39], [0x41, 0x46], [0x61, 0x66]);
const letters = (all: string): CharRange[] =>
  [...all].map((letter) => [letter.charCodeAt(0), letter.charCodeAt(0)]);
/** `json_value` and the rules that it uses. */
const BASICS: ReadonlyMap<string, Expression> = new Map([
  ['json_string', sequence(text('"'), rule('json_string_rest'))],
  // Right recursion instead of a repetition: tokens of several characters are then checked at compile time, not per answer.
  [
    'json_string_rest',
    choice(
      text('"'),
      sequence(chars(...PLAIN), rule('json_string_rest')),
      sequence(text('\\'), chars(...letters('"\\/bfnrt')), rule('json_string_rest')),
      // No surrogates (\ud800 to \udfff), since a lone one is not valid text.
      sequence(
        text('\\u'),
        chars([0x30, 0x39], [0x41, 0x43], [0x61, 0x63]),
        ...[HEX, HEX, HEX],
        rule('json_string_rest'),
      ),
    ),
  ],
  ['json_integer', INTEGER],
  ['json_number', NUMBER],
  [
    'json_object',
    sequence(text('{'), optional(list(sequence(rule('json_string'), COLON, rule('json_value')))), text('}')),
  ],
  ['json_array', sequence(text('['), optional(list(rule('json_value'))), text(']'))],
  [
    'json_value',
    choice(
      rule('json_object'),
      rule('json_array'),
      rule('json_string'),
      rule('json_number'),
      text('true'),
      text('false'),
      text('null'),
    ),
  ],
]);
const SEPARATED_BASICS = separated(BASICS, rule('json_value')).rules;

/** One or more items, separated by commas. */
function list(item: Expression): Expression {
  return sequence(item, repeat(sequence(COMMA, item), 0));
}

class Converter {
  readonly #root: unknown;
  readonly #reader: SchemaReader;
  readonly #rules = new Map<string, Expression>(BASICS);
  /** The rule of each schema that a `$ref` names. */
  readonly #named = new Map<string, string>();
  /** Rules that are referred to but not converted yet. The queue avoids deep recursion for long chains of `$ref`s. */
  readonly #unmade: { readonly name: string; readonly schema: unknown; readonly path: Path }[] = [];
  readonly #where = new Map<string, Path>();
  /** Rules of `propertyNames`, with their places. */
  readonly #keys = new Map<string, Path>();
  readonly #spent: Spent;

  constructor(root: unknown, options: SchemaOptions) {
    this.#root = root;
    this.#reader = new SchemaReader(root, options);
    this.#spent = this.#reader.spent;
  }

  convert(): string {
    const root = this.#rule('', this.#root, '');
    for (let next = this.#unmade.pop(); next !== undefined; next = this.#unmade.pop())
      this.#rules.set(next.name, this.#value(next.schema, next.path));
    const looping = loopingRules(this.#rules)[0];
    if (looping !== undefined)
      throw this.#reader.refusal(this.#where.get(looping) ?? '', 'it leads back to itself');
    const endless = endlessRules(this.#rules)[0];
    if (endless !== undefined)
      throw this.#reader.refusal(
        this.#where.get(endless) ?? '',
        'it requires itself without end, so it has no finite value',
      );
    this.#requireKeys();
    const own = new Map([...this.#rules].filter(([name]) => !BASICS.has(name)));
    const written = separated(own, root, SEPARATED_BASICS);
    return printGrammar(written.rules, written.root);
  }

  /** Through `$ref`s in `anyOf`, a key could be of another type. */
  #requireKeys(): void {
    if (this.#keys.size === 0) return;
    const others = otherRules(this.#rules, '"');
    for (const [name, path] of this.#keys)
      if (others.has(name)) throw this.#reader.refusal(path, NOT_STRINGS);
  }

  #value(schema: unknown, path: Path, depth = 0): Expression {
    if (++this.#spent.nodes > NODES_MAX) throw this.#reader.refusal(path, TOO_MANY_PARTS);
    if (depth > DEPTH_MAX) throw this.#reader.refusal(path, `it is nested more than ${DEPTH_MAX} deep`);
    if (schema === true) return rule('json_value');
    if (schema === false) throw this.#reader.refusal(path, 'it allows no value');
    const reader = this.#reader;
    const whole = reader.object(schema, path);
    if ('$ref' in whole) {
      const { $ref, found } = reader.reference(whole, path);
      return this.#rule($ref, found, $ref.slice(1));
    }
    for (const name of ['const', 'enum'] as const) {
      if (name in whole) return this.#literals(reader.literals(name, whole, path), `${path}/${name}`);
    }
    for (const name of ['anyOf', 'oneOf'] as const) {
      if (!(name in whole)) continue;
      const options = reader.alternatives(name, whole, path);
      return choice(...options.map((option) => this.#value(option.schema, option.path, depth + 1)));
    }
    return choice(...reader.types(whole, path).map((type) => this.#typed(type, whole, path, depth)));
  }

  /** The rule of a place in the schema, created once, so that recursive schemas work. */
  #rule(place: string, schema: unknown, path: Path): Expression {
    const key = place === '' ? '#' : place;
    const known = this.#named.get(key);
    if (known !== undefined) return rule(known);
    const name = `schema_${this.#named.size}`;
    this.#named.set(key, name);
    this.#where.set(name, path);
    this.#unmade.push({ name, schema, path });
    return rule(name);
  }

  #literals(values: readonly unknown[], path: Path): Expression {
    const texts = values.map((value) => JSON.stringify(value));
    this.#spent.literalChars += texts.reduce((sum, { length }) => sum + length, 0);
    this.#spent.nodes += texts.length;
    if (this.#spent.literalChars > LITERAL_CHARS_MAX) throw this.#reader.refusal(path, TOO_MANY_CHARS);
    if (this.#spent.nodes > NODES_MAX) throw this.#reader.refusal(path, TOO_MANY_PARTS);
    return choice(...texts.map(text));
  }

  #typed(type: Type, schema: SchemaObject, path: Path, depth: number): Expression {
    switch (type) {
      case 'null':
        return text('null');
      case 'boolean':
        return choice(text('true'), text('false'));
      case 'integer':
      case 'number':
        return this.#number(type, schema, path);
      case 'string':
        return this.#string(schema, path);
      case 'array':
        return this.#array(schema, path, depth);
      case 'object':
        return this.#object(schema, path, depth);
    }
  }

  #number(type: 'integer' | 'number', schema: SchemaObject, path: Path): Expression {
    const bounds = this.#reader.bounds(schema, path);
    if (bounds.min === undefined && bounds.max === undefined)
      return rule(type === 'integer' ? 'json_integer' : 'json_number');
    const found = type === 'integer' ? integersBetween(bounds) : numbersBetween(bounds);
    if (found === undefined)
      throw this.#reader.refusal(path, 'no number of at most 15 digits is within its bounds');
    return found;
  }

  #string(schema: SchemaObject, path: Path): Expression {
    const { format, pattern } = schema;
    const isStrict = this.#reader.isStrict;
    const known = typeof format === 'string' && Object.hasOwn(FORMATS, format) ? FORMATS[format]! : undefined;
    if (format !== undefined && known === undefined && isStrict)
      throw this.#reader.refusal(`${path}/format`, `expected one of ${Object.keys(FORMATS).join(', ')}`);
    const min = this.#reader.count('minLength', schema, path) ?? 0;
    const max = this.#reader.count('maxLength', schema, path);
    const hasLengths = min > 0 || max !== undefined;
    if (pattern !== undefined && typeof pattern !== 'string')
      throw this.#reader.refusal(`${path}/pattern`, 'expected a string');
    const place = `${path}/${known === undefined ? 'pattern' : 'format'}`;
    const written = known ?? pattern;
    if (written !== undefined) {
      if (hasLengths && isStrict && known === undefined)
        throw this.#reader.refusal(
          place,
          'beside a length it cannot be enforced; write the length into the pattern',
        );
      const found = this.#pattern(written, place);
      if (found !== undefined) {
        if (known !== undefined && isStrict) {
          this.#requireLengths(found, min, max, path);
          if (pattern !== undefined) this.#requireWithin(found, format as string, pattern, path);
        }
        return sequence(text('"'), found, text('"'));
      }
    }
    return hasLengths ? this.#counted(min, max, path) : rule('json_string');
  }

  /* In strict mode, every text of a format's grammar must satisfy the other keywords beside it. */

  #requireLengths(format: Expression, min: number, max = Number.POSITIVE_INFINITY, path: Path): void {
    const [least, most] = lettersOf(format);
    if (least >= min && most <= max) return;
    throw this.#reader.refusal(
      `${path}/format`,
      `its generated texts have ${least} to ${most} characters, so this length cannot be enforced`,
    );
  }

  #requireWithin(format: Expression, name: string, pattern: string, path: Path): void {
    const key = `${name} ${pattern}`;
    if (HELD_BY_FORMATS[name] === pattern || this.#spent.within.has(key)) return;
    const outer = this.#refusing(`${path}/pattern`, () => boundedPattern(pattern));
    if (outer !== undefined && isWithin(format, outer, this.#spent.inclusion)) {
      this.#spent.within.add(key);
      return;
    }
    throw this.#reader.refusal(
      `${path}/pattern`,
      'it is not known to match every text that is generated for this `format`; leave one of them out',
    );
  }

  #counted(min: number, max: number | undefined, path: Path): Expression {
    if (max !== undefined && max < min)
      throw this.#reader.refusal(path, 'its `maxLength` is below its `minLength`');
    if (!this.#takesCounted(max ?? min)) {
      if (!this.#reader.isStrict) return rule('json_string');
      throw this.#reader.refusal(path, TOO_MANY_COUNTED);
    }
    return sequence(text('"'), repeat(chars(...PLAIN), min, max), text('"'));
  }

  #takesCounted(count: number): boolean {
    if (this.#spent.countedChars + count > COUNTED_CHARS_MAX) return false;
    this.#spent.countedChars += count;
    return true;
  }

  #pattern(pattern: string, path: Path): Expression | undefined {
    return this.#refusing(path, () => {
      const found = boundedPattern(pattern);
      const states = sizeOf(found);
      if (this.#spent.patternStates + states > PATTERN_STATES_MAX) throw new PatternError(TOO_MANY_STATES);
      if (!this.#takesCounted(Math.ceil(wideSizeOf(found)))) throw new PatternError(TOO_MANY_COUNTED);
      this.#spent.patternStates += states;
      return found;
    });
  }

  /** `read()`; a PatternError becomes a refusal if strict, else undefined. */
  #refusing(path: Path, read: () => Expression): Expression | undefined {
    try {
      return read();
    } catch (error) {
      if (!(error instanceof PatternError)) throw error;
      if (this.#reader.isStrict) throw this.#reader.refusal(path, error.message);
      return undefined;
    }
  }

  #array(schema: SchemaObject, path: Path, depth: number): Expression {
    const { prefix, rest, ...wanted } = this.#reader.list(schema, path);
    const { least, most } = this.#counts(wanted, path);
    const fixed = prefix.slice(0, most).map((item, i) => this.#item(item, `${path}/prefixItems/${i}`, depth));
    // After a tuple the grammar allows further items only if `minItems` needs them.
    const isOpen = prefix.length === 0 ? rest !== false : least > prefix.length && rest !== false;
    const item = isOpen ? this.#item(rest ?? true, `${path}/items`, depth) : undefined;
    if (item === undefined && least > fixed.length)
      throw this.#reader.refusal(`${path}/minItems`, 'more items than there are schemas for');
    const [more, limit] = [
      Math.max(0, least - fixed.length),
      most === undefined ? undefined : most - fixed.length,
    ];
    if (fixed.length > 0) {
      const first = sequence(...fixed.flatMap((one, i) => (i === 0 ? [one] : [COMMA, one])));
      const tail = item === undefined ? [] : [repeat(sequence(COMMA, item), more, limit)];
      return sequence(text('['), first, ...tail, text(']'));
    }
    if (item === undefined || limit === 0) return text('[]');
    const some = sequence(
      item,
      repeat(sequence(COMMA, item), Math.max(0, more - 1), limit === undefined ? undefined : limit - 1),
    );
    return sequence(text('['), more === 0 ? optional(some) : some, text(']'));
  }

  /** The counts of a list as far as they can be enforced. */
  #counts(wanted: Counts, path: Path): Counts {
    const items = wanted.most ?? wanted.least;
    if (this.#spent.items + items <= ITEMS_MAX) {
      this.#spent.items += items;
      return wanted;
    }
    if (this.#reader.isStrict) throw this.#reader.refusal(path, TOO_MANY_ITEMS);
    return { least: 0, most: undefined };
  }

  /** A schema's value as a rule, so that repeating it does not copy it. */
  #item(schema: unknown, path: Path, depth: number): Rule {
    const value = this.#value(schema, path, depth + 1);
    return value.kind === 'rule' ? value : this.#newRule(value, path);
  }

  #key(names: SchemaObject, path: Path, depth: number): Expression {
    const key = this.#item(names, path, depth);
    this.#keys.set(key.name, path);
    return key;
  }

  #newRule(body: Expression, path: Path): Rule {
    const name = `part_${this.#rules.size}`;
    this.#where.set(name, path);
    this.#rules.set(name, body);
    return rule(name);
  }

  #object(schema: SchemaObject, path: Path, depth: number): Expression {
    const { names, properties, required, others } = this.#reader.properties(schema, path);
    if (names.length === 0) return this.#dictionary(schema, others, path, depth);
    const members = names.map((name) => {
      const isNamed = Object.hasOwn(properties, name);
      const value = this.#value(
        isNamed ? properties[name] : others,
        `${path}/properties/${pointer(name)}`,
        depth + 1,
      );
      this.#spent.literalChars += name.length;
      return {
        member: sequence(text(JSON.stringify(name)), COLON, value),
        isRequired: required.includes(name),
      };
    });
    if (this.#spent.literalChars > LITERAL_CHARS_MAX) throw this.#reader.refusal(path, TOO_MANY_CHARS);
    return sequence(text('{'), this.#members(members, path), text('}'));
  }

  /** The members in order, optional ones optional. Built from the last to the first: each rule refers to the next. */
  #members(members: readonly { member: Expression; isRequired: boolean }[], path: Path): Expression {
    // The rest of the object after no member (`begin`), and after at least one (`goOn`), which needs a comma.
    let begin: Expression = text('');
    let goOn: Expression = text('');
    for (const { member, isRequired } of [...members].reverse()) {
      const one = this.#newRule(member, path);
      const first = sequence(one, goOn);
      const next = sequence(COMMA, one, goOn);
      const [before, after] = [begin, goOn];
      begin = this.#newRule(isRequired ? first : choice(first, before), path);
      goOn = this.#newRule(isRequired ? next : choice(next, after), path);
    }
    return begin;
  }

  #dictionary(schema: SchemaObject, others: unknown, path: Path, depth: number): Expression {
    if (others === false) return text('{}');
    const names = this.#reader.propertyNames(schema, path);
    const key = names === undefined ? rule('json_string') : this.#key(names, `${path}/propertyNames`, depth);
    const value = this.#item(others, `${path}/additionalProperties`, depth);
    return sequence(text('{'), optional(list(sequence(key, COLON, value))), text('}'));
  }
}

type Counts = { readonly least: number; readonly most: number | undefined };

/* Messages about limits, which hold for all schemas of a request together. */
const TOO_MANY_PARTS = `schemas have more than ${NODES_MAX} parts together`;
const TOO_MANY_CHARS = `names and values have more than ${LITERAL_CHARS_MAX} characters together`;
const TOO_MANY_ITEMS = `lists of limited length have more than ${ITEMS_MAX} items together`;
const TOO_MANY_COUNTED = `strings of limited length have more than ${COUNTED_CHARS_MAX} characters together`;
const TOO_MANY_STATES = `patterns and formats have more than ${PATTERN_STATES_MAX} characters together`;

const TOO_LONG_PATTERN = `it has more than ${ONE_PATTERN_STATES_MAX} characters, with its repetitions written out`;

const pointer = (name: string): string => name.replaceAll('~', '~0').replaceAll('/', '~1');

/** Number of states of an expression, with repetitions written out. */
const sizeOf = (expression: Expression): number => sumOfLeaves(expression, () => 1);

/** @throws PatternError. */
function boundedPattern(pattern: string): Expression {
  const found = patternGrammar(pattern);
  if (sizeOf(found) > ONE_PATTERN_STATES_MAX) throw new PatternError(TOO_LONG_PATTERN);
  return found;
}

/** Number of states with a wide character class, where most tokens match. */
const wideSizeOf = (expression: Expression): number =>
  sumOfLeaves(expression, (leaf) => {
    if (leaf.kind !== 'chars') return 0;
    return leaf.ranges.reduce((sum, [from, to]) => sum + to - from + 1, 0) > 64 ? 1 : 0;
  });
