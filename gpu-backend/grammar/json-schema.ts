/**
 * Converts JSON schemas to grammars; `schema-reader.ts` reads the schemas, and strings are in `string-grammar.ts`. The
 * grammar allows a subset of what the schema allows: every text of it is valid, and where the schema leaves a choice the
 * grammar fixes it (order of properties, spaces, no properties beyond the named ones). A schema that a grammar cannot
 * enforce is refused with the place in it.
 *
 * xgrammar can convert schemas, too, but it lets control characters into strings of a `maxLength`, does not escape patterns
 * for JSON, and ends its WebAssembly module at a wrong `$ref`.
 */
import {
  choice,
  type Expression,
  endlessRules,
  loopingRules,
  optional,
  otherRules,
  printGrammar,
  type Rule,
  repeat,
  rule,
  sequence,
  text,
} from './ebnf.ts';
import { INTEGER, integersBetween, NUMBER, numbersBetween } from './number-range.ts';
import { ITEMS, LITERALS, PARTS, type Spent } from './schema-limits.ts';
import {
  NOT_STRINGS,
  type Path,
  type SchemaObject,
  type SchemaOptions,
  SchemaReader,
  type Type,
} from './schema-reader.ts';
import { separated } from './separated-choices.ts';
import { STRING_RULES, stringGrammar } from './string-grammar.ts';

const DEPTH_MAX = 48;
/** Most names of an object's `propertyNames` that are written as its optional properties. */
const LISTED_NAMES_MAX = 64;

/**
 * The EBNF of JSON values that are valid for the schema.
 * @throws MaskrouteError `invalid_schema`.
 */
export function schemaGrammar(schema: unknown, options: SchemaOptions): string {
  return new Converter(schema, options).convert();
}

const COMMA = text(', ');
const COLON = text(': ');

/** `json_value` and the rules that it uses. */
const BASICS: ReadonlyMap<string, Expression> = new Map([
  ...STRING_RULES,
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
    this.#spend(path, 1);
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
    this.#spend(path, texts.length, texts);
    return choice(...texts.map(text));
  }

  /** @throws MaskrouteError when the request's schemas have too many parts, or characters in names and values. */
  #spend(path: Path, parts: number, texts: readonly string[] = []): void {
    this.#spent.nodes += parts;
    this.#spent.literalChars += texts.reduce((sum, { length }) => sum + length, 0);
    if (this.#spent.literalChars > LITERALS.max) throw this.#reader.refusal(path, LITERALS.message);
    if (this.#spent.nodes > PARTS.max) throw this.#reader.refusal(path, PARTS.message);
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
        return stringGrammar(this.#reader, schema, path, this.#rules);
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
    if (this.#spent.items + items <= ITEMS.max) {
      this.#spent.items += items;
      return wanted;
    }
    if (this.#reader.isStrict) throw this.#reader.refusal(path, ITEMS.message);
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
      return { member: member(name, value), isRequired: required.includes(name) };
    });
    this.#spend(path, 0, names);
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

  /** The names of an `enum` or `const`, if they are few: each place of an object has all names behind it. */
  #listedNames(names: SchemaObject, path: Path): readonly string[] | undefined {
    const keyword = (['const', 'enum'] as const).find((one) => one in names);
    if (keyword === undefined) return undefined;
    const listed = [...new Set(this.#reader.literals(keyword, names, path).map(String))];
    if (listed.length > LISTED_NAMES_MAX) return undefined;
    this.#spend(path, listed.length, listed);
    return listed;
  }

  #dictionary(schema: SchemaObject, others: unknown, path: Path, depth: number): Expression {
    if (others === false) return text('{}');
    const names = this.#reader.propertyNames(schema, path);
    const place = `${path}/propertyNames`;
    const value = this.#item(others, `${path}/additionalProperties`, depth);
    const listed = names && this.#listedNames(names, place);
    // Each of them once at most, which a list of members does not ensure.
    if (listed !== undefined) {
      const members = listed.map((name) => ({ member: member(name, value), isRequired: false }));
      return sequence(text('{'), this.#members(members, path), text('}'));
    }
    const key = names === undefined ? rule('json_string') : this.#key(names, place, depth);
    return sequence(text('{'), optional(list(sequence(key, COLON, value))), text('}'));
  }
}

const member = (name: string, value: Expression): Expression =>
  sequence(text(JSON.stringify(name)), COLON, value);

type Counts = { readonly least: number; readonly most: number | undefined };

const pointer = (name: string): string => name.replaceAll('~', '~0').replaceAll('/', '~1');
