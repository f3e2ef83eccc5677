/**
 * JSON schemas as grammars. What comes out is a part of what the schema allows: every answer of the grammar is valid, and
 * where a schema leaves open how something is written, the grammar picks one way (the order of an object's properties,
 * spaces, no properties beyond those that are named). A schema that cannot be kept is refused with the place in it.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';
import {
  type CharRange,
  chars,
  choice,
  type Expression,
  endlessRules,
  loopingRules,
  optional,
  printGrammar,
  repeat,
  rule,
  sequence,
  sumOfLeaves,
  text,
} from './ebnf.ts';
import { INTEGER, integersBetween, NUMBER, numbersBetween } from './number-range.ts';
import { FORMATS, PatternError, PLAIN, patternGrammar } from './text-pattern.ts';

/** Bounds of one schema. Past them its grammar would take seconds to prepare. */
const NODES_MAX = 2000;
const DEPTH_MAX = 48;
const LITERAL_CHARS_MAX = 64 * 1024;
/** Characters whose number a schema bounds, all strings together: each is a state in which every token is looked at. */
const COUNTED_CHARS_MAX = 256;
const ITEMS_MAX = 2000;

/** `strict`: what a grammar cannot keep is refused; otherwise it is left out. */
type SchemaOptions = {
  readonly strict: boolean;
  /** What the schema is called in the request; it begins the `param` of a refusal. */
  readonly param: string;
};

/**
 * The EBNF of a JSON value that the schema allows.
 * @throws MaskrouteError `invalid_schema`.
 */
export function schemaGrammar(schema: unknown, options: SchemaOptions): string {
  return new Converter(schema, options).convert();
}

type SchemaObject = Readonly<Record<string, unknown>>;
/** Where in the schema, as a JSON pointer without `#`. */
type Path = string;

/** They do not say which values are valid. */
const ANNOTATIONS = new Set([
  ...[
    'title',
    'description',
    'default',
    'examples',
    'example',
    '$comment',
    'deprecated',
    'readOnly',
    'writeOnly',
  ],
  ...[
    '$schema',
    '$id',
    '$anchor',
    '$defs',
    'definitions',
    'contentMediaType',
    'contentEncoding',
    'discriminator',
  ],
]);
const ARRAY_KEYWORDS = ['items', 'prefixItems', 'minItems', 'maxItems'];
const OBJECT_KEYWORDS = ['properties', 'required', 'additionalProperties', 'propertyNames'];
const NUMBER_KEYWORDS = ['minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum'];
const STRING_KEYWORDS = ['minLength', 'maxLength', 'pattern', 'format'];
const KNOWN = new Set([
  ...['type', 'enum', 'const', 'anyOf', 'oneOf', 'allOf', '$ref', 'nullable'],
  ...ARRAY_KEYWORDS,
  ...OBJECT_KEYWORDS,
  ...NUMBER_KEYWORDS,
  ...STRING_KEYWORDS,
]);

const TYPES = ['object', 'array', 'string', 'number', 'integer', 'boolean', 'null'] as const;
type Type = (typeof TYPES)[number];

const COMMA = text(', ');
const COLON = text(': ');
const HEX = chars([0x30, 0x39], [0x41, 0x46], [0x61, 0x66]);
/** `json_value` and what it is made of. */
const letters = (all: string): CharRange[] =>
  [...all].map((letter) => [letter.charCodeAt(0), letter.charCodeAt(0)]);
const BASICS: readonly (readonly [string, Expression])[] = [
  ['json_string', sequence(text('"'), rule('json_string_rest'))],
  // One rule that goes on with itself: a token of several characters is then looked at once, not in every answer.
  [
    'json_string_rest',
    choice(
      text('"'),
      sequence(chars(...PLAIN), rule('json_string_rest')),
      sequence(text('\\'), chars(...letters('"\\/bfnrt')), rule('json_string_rest')),
      // No halves of pairs: a text with one is not well-formed.
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
];

/** One or more, with commas between them. */
function list(item: Expression): Expression {
  return sequence(item, repeat(sequence(COMMA, item), 0));
}

class Converter {
  readonly #root: unknown;
  readonly #options: SchemaOptions;
  readonly #rules = new Map<string, Expression>(BASICS);
  /** The rule of each schema that a `$ref` names. */
  readonly #named = new Map<string, string>();
  readonly #where = new Map<string, Path>();
  #nodes = 0;
  #literalChars = 0;
  #countedChars = 0;
  #items = 0;

  constructor(root: unknown, options: SchemaOptions) {
    this.#root = root;
    this.#options = options;
  }

  convert(): string {
    const root = this.#rule('', this.#root, '');
    const looping = loopingRules(this.#rules)[0];
    if (looping !== undefined) throw this.#refusal(this.#where.get(looping) ?? '', 'it leads back to itself');
    const endless = endlessRules(this.#rules)[0];
    if (endless !== undefined)
      throw this.#refusal(
        this.#where.get(endless) ?? '',
        'it needs itself again and again, so no value of it ever ends',
      );
    return printGrammar(this.#rules, root);
  }

  #value(schema: unknown, path: Path, depth = 0): Expression {
    if (++this.#nodes > NODES_MAX) throw this.#refusal(path, `it has more than ${NODES_MAX} parts`);
    if (depth > DEPTH_MAX) throw this.#refusal(path, `it is nested more than ${DEPTH_MAX} deep`);
    if (schema === true) return rule('json_value');
    if (schema === false) throw this.#refusal(path, 'no value is allowed by it');
    if (!isObject(schema)) throw this.#refusal(path, 'expected an object, true or false');
    this.#refuseUnknown(schema, path);
    const whole = this.#merged(schema, path);
    if ('$ref' in whole) return this.#reference(whole, path);
    if ('const' in whole) return this.#literals([whole.const], path);
    if ('enum' in whole) return this.#enumeration(whole, path);
    for (const name of ['anyOf', 'oneOf'] as const) {
      if (name in whole) return this.#alternatives(name, whole, path, depth);
    }
    const types = this.#types(whole, path);
    return choice(...types.map((type) => this.#typed(type, whole, path, depth)));
  }

  #refuseUnknown(schema: SchemaObject, path: Path): void {
    if (!this.#options.strict) return;
    const unknown = Object.keys(schema).find((name) => !KNOWN.has(name) && !ANNOTATIONS.has(name));
    if (unknown !== undefined)
      throw this.#refusal(`${path}/${unknown}`, 'it cannot be kept while an answer is written');
  }

  /** With what its only `allOf` says. */
  #merged(schema: SchemaObject, path: Path): SchemaObject {
    if (!('allOf' in schema)) return schema;
    const { allOf, ...own } = schema;
    const parts = Array.isArray(allOf) ? allOf.filter(isObject) : [];
    const constraints = Object.keys(own).filter((name) => !ANNOTATIONS.has(name));
    if (parts.length === 1 && constraints.every((name) => name === 'type')) {
      this.#refuseUnknown(parts[0]!, `${path}/allOf/0`);
      return this.#merged({ ...own, ...parts[0]! }, `${path}/allOf/0`);
    }
    if (this.#options.strict)
      throw this.#refusal(`${path}/allOf`, 'schemas that hold together have no grammar; write them as one');
    return constraints.length > 0 ? own : this.#merged(parts[0] ?? {}, `${path}/allOf/0`);
  }

  #reference(schema: SchemaObject, path: Path): Expression {
    const { $ref } = schema;
    if (typeof $ref !== 'string' || !/^#(\/|$)/.test($ref))
      throw this.#refusal(`${path}/$ref`, 'expected a place in the same schema, such as "#/$defs/name"');
    const others = Object.keys(schema).filter((name) => name !== '$ref' && !ANNOTATIONS.has(name));
    if (others.length > 0 && this.#options.strict)
      throw this.#refusal(`${path}/${others[0]}`, 'beside `$ref` it cannot be kept');
    const found = this.#find($ref, path);
    return this.#rule($ref, found, $ref.slice(1));
  }

  #find($ref: string, path: Path): unknown {
    let found: unknown = this.#root;
    for (const part of $ref.split('/').slice(1)) {
      const name = unescaped($ref, part);
      const isThere = typeof found === 'object' && found !== null && Object.hasOwn(found, name);
      if (!isThere) throw this.#refusal(`${path}/$ref`, 'it names nothing in the schema');
      found = (found as SchemaObject)[name];
    }
    return found;
  }

  /** Made once for each place in the schema, also where it holds itself. */
  #rule(place: string, schema: unknown, path: Path): Expression {
    const key = place === '' ? '#' : place;
    const known = this.#named.get(key);
    if (known !== undefined) return rule(known);
    const name = `schema_${this.#named.size}`;
    this.#named.set(key, name);
    this.#where.set(name, path);
    this.#rules.set(name, this.#value(schema, path));
    return rule(name);
  }

  #enumeration(schema: SchemaObject, path: Path): Expression {
    const values = schema.enum;
    if (!Array.isArray(values) || values.length === 0)
      throw this.#refusal(`${path}/enum`, 'expected a list with a value');
    const types = 'type' in schema ? this.#types(schema, path) : undefined;
    const allowed =
      types === undefined ? values : values.filter((value) => types.some((type) => isOf(type, value)));
    if (allowed.length === 0) throw this.#refusal(`${path}/enum`, 'none of its values has the type');
    return this.#literals(allowed, `${path}/enum`);
  }

  #literals(values: readonly unknown[], path: Path): Expression {
    const texts = values.map((value) => JSON.stringify(value));
    this.#literalChars += texts.reduce((sum, { length }) => sum + length, 0);
    this.#nodes += texts.length;
    if (this.#literalChars > LITERAL_CHARS_MAX)
      throw this.#refusal(path, `its values have more than ${LITERAL_CHARS_MAX} characters together`);
    if (this.#nodes > NODES_MAX) throw this.#refusal(path, `it has more than ${NODES_MAX} parts`);
    return choice(...texts.map(text));
  }

  #alternatives(name: 'anyOf' | 'oneOf', schema: SchemaObject, path: Path, depth: number): Expression {
    const options = schema[name];
    if (!Array.isArray(options) || options.length === 0)
      throw this.#refusal(`${path}/${name}`, 'expected a list with a schema');
    const beside = Object.keys(schema).find((one) => one !== name && one !== 'type' && !ANNOTATIONS.has(one));
    if (beside !== undefined && this.#options.strict)
      throw this.#refusal(`${path}/${beside}`, `beside \`${name}\` it cannot be kept`);
    if (name === 'oneOf' && this.#options.strict && !this.#areApart(options, path))
      throw this.#refusal(
        `${path}/oneOf`,
        'a value could be valid for two of its schemas; use `anyOf`, or tell them apart by a property with `const`',
      );
    return choice(...options.map((option, i) => this.#value(option, `${path}/${name}/${i}`, depth + 1)));
  }

  /** Whether no value is valid for two of the schemas: by their types, or by a property that all of them fix. */
  #areApart(options: readonly unknown[], path: Path): boolean {
    const schemas = options.map((option) =>
      isObject(option) && typeof option.$ref === 'string' ? this.#find(option.$ref, path) : option,
    );
    if (!schemas.every(isObject)) return false;
    const kinds = schemas.map((schema) => schema.type);
    const isSimple = (kind: unknown) => typeof kind === 'string' && kind !== 'number' && kind !== 'integer';
    const numbers = kinds.filter((kind) => kind === 'number' || kind === 'integer').length;
    const simple = kinds.filter(isSimple);
    if (numbers + simple.length === kinds.length && numbers < 2 && new Set(simple).size === simple.length)
      return true;
    const fixed = schemas.map((schema) => {
      const required = Array.isArray(schema.required) ? schema.required : [];
      const properties = isObject(schema.properties) ? schema.properties : {};
      return new Map(
        Object.entries(properties).flatMap(([name, property]) =>
          required.includes(name) && isObject(property) && valuesOf(property).length > 0
            ? [[name, valuesOf(property).map((value) => JSON.stringify(value))] as const]
            : [],
        ),
      );
    });
    return [...(fixed[0]?.keys() ?? [])].some((name) => {
      const values = fixed.flatMap((one) => one.get(name) ?? []);
      return fixed.every((one) => one.has(name)) && new Set(values).size === values.length;
    });
  }

  #types(schema: SchemaObject, path: Path): readonly Type[] {
    const { type, nullable } = schema;
    if (type === undefined) return impliedTypes(schema);
    const given = Array.isArray(type) ? type : [type];
    const wrong = given.length === 0 || given.some((one) => !TYPES.includes(one as Type));
    if (wrong) throw this.#refusal(`${path}/type`, `expected ${TYPES.join(', ')}, or a list of them`);
    return [...new Set([...(given as Type[]), ...(nullable === true ? (['null'] as const) : [])])];
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
    const bound = (name: string): number | undefined => {
      const value = schema[name];
      if (value === undefined) return undefined;
      if (typeof value !== 'number' || !Number.isFinite(value))
        throw this.#refusal(`${path}/${name}`, 'expected a number');
      return value;
    };
    const [min, below] = [bound('minimum'), bound('exclusiveMinimum')];
    const [max, above] = [bound('maximum'), bound('exclusiveMaximum')];
    const minIsOut = below !== undefined && (min === undefined || below >= min);
    const maxIsOut = above !== undefined && (max === undefined || above <= max);
    const bounds = { min: minIsOut ? below : min, max: maxIsOut ? above : max, minIsOut, maxIsOut };
    if (bounds.min === undefined && bounds.max === undefined)
      return rule(type === 'integer' ? 'json_integer' : 'json_number');
    const found = type === 'integer' ? integersBetween(bounds) : numbersBetween(bounds);
    if (found === undefined)
      throw this.#refusal(path, 'no number of at most 15 digits lies between its bounds');
    return found;
  }

  #string(schema: SchemaObject, path: Path): Expression {
    const { format, pattern } = schema;
    const known = typeof format === 'string' && Object.hasOwn(FORMATS, format) ? FORMATS[format]! : undefined;
    if (format !== undefined && known === undefined && this.#options.strict)
      throw this.#refusal(`${path}/format`, `expected one of ${Object.keys(FORMATS).join(', ')}`);
    const [min, max] = [this.#count('minLength', schema, path), this.#count('maxLength', schema, path)];
    const hasLengths = (min ?? 0) > 0 || max !== undefined;
    const wanted = known ?? (typeof pattern === 'string' ? pattern : undefined);
    if (pattern !== undefined && typeof pattern !== 'string')
      throw this.#refusal(`${path}/pattern`, 'expected a string');
    if (wanted !== undefined) {
      const place = `${path}/${known === undefined ? 'pattern' : 'format'}`;
      if (hasLengths && this.#options.strict && known === undefined)
        throw this.#refusal(place, 'beside a length it cannot be kept; write the length into the pattern');
      const found = this.#pattern(wanted, place);
      if (found !== undefined) return sequence(text('"'), found, text('"'));
    }
    if (!hasLengths) return rule('json_string');
    return this.#counted(min ?? 0, max, path);
  }

  #counted(min: number, max: number | undefined, path: Path): Expression {
    if (max !== undefined && max < min) throw this.#refusal(path, 'its `maxLength` is below its `minLength`');
    if (!this.#takesCounted(max ?? min)) {
      if (!this.#options.strict) return rule('json_string');
      throw this.#refusal(path, TOO_LONG);
    }
    return sequence(text('"'), repeat(chars(...PLAIN), min, max), text('"'));
  }

  #takesCounted(count: number): boolean {
    if (this.#countedChars + count > COUNTED_CHARS_MAX) return false;
    this.#countedChars += count;
    return true;
  }

  #pattern(pattern: string, path: Path): Expression | undefined {
    try {
      const found = patternGrammar(pattern);
      const size = sizeOf(found);
      if (size > COUNTED_CHARS_MAX * 8) throw new PatternError(TOO_LONG);
      if (!this.#takesCounted(Math.ceil(wideSizeOf(found)))) throw new PatternError(TOO_LONG);
      return found;
    } catch (error) {
      if (!(error instanceof PatternError)) throw error;
      if (this.#options.strict) throw this.#refusal(path, error.message);
      return undefined;
    }
  }

  #array(schema: SchemaObject, path: Path, depth: number): Expression {
    const prefix = schema.prefixItems ?? (Array.isArray(schema.items) ? schema.items : []);
    if (!Array.isArray(prefix)) throw this.#refusal(`${path}/prefixItems`, 'expected a list of schemas');
    const [least, most] = [this.#count('minItems', schema, path) ?? 0, this.#count('maxItems', schema, path)];
    if (most !== undefined && most < least)
      throw this.#refusal(path, 'its `maxItems` is below its `minItems`');
    this.#items += (most ?? least) + prefix.length;
    if (this.#items > ITEMS_MAX)
      throw this.#refusal(path, `its lists have more than ${ITEMS_MAX} items together`);
    const fixed = prefix.slice(0, most).map((item, i) => this.#item(item, `${path}/prefixItems/${i}`, depth));
    const rest = Array.isArray(schema.items) ? undefined : schema.items;
    // Beyond a tuple nothing has to come.
    const isOpen = prefix.length === 0 ? rest !== false : least > prefix.length && rest !== false;
    const item = isOpen ? this.#item(rest ?? true, `${path}/items`, depth) : undefined;
    if (item === undefined && least > fixed.length)
      throw this.#refusal(`${path}/minItems`, 'more items than there are schemas for');
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

  /** As a rule, so that repeating it costs nothing. */
  #item(schema: unknown, path: Path, depth: number): Expression {
    const value = this.#value(schema, path, depth + 1);
    return value.kind === 'rule' ? value : this.#newRule(value, path);
  }

  #newRule(body: Expression, path: Path): Expression {
    const name = `part_${this.#rules.size}`;
    this.#where.set(name, path);
    this.#rules.set(name, body);
    return rule(name);
  }

  #object(schema: SchemaObject, path: Path, depth: number): Expression {
    const properties = schema.properties ?? {};
    if (!isObject(properties)) throw this.#refusal(`${path}/properties`, 'expected an object of schemas');
    const required = schema.required ?? [];
    if (!Array.isArray(required) || required.some((name) => typeof name !== 'string'))
      throw this.#refusal(`${path}/required`, 'expected a list of names');
    const others = schema.additionalProperties ?? true;
    const missing = (required as string[]).filter((name) => !Object.hasOwn(properties, name));
    if (missing.length > 0 && others === false)
      throw this.#refusal(
        `${path}/required`,
        `${JSON.stringify(missing[0]!.slice(0, 60))} is no property, and there may be no others`,
      );
    const names = [...Object.keys(properties), ...new Set(missing)];
    if (names.length === 0) return this.#dictionary(schema, others, path, depth);
    const members = names.map((name) => {
      const isNamed = Object.hasOwn(properties, name);
      const value = this.#value(
        isNamed ? properties[name] : others,
        `${path}/properties/${pointer(name)}`,
        depth + 1,
      );
      this.#literalChars += name.length;
      return {
        member: sequence(text(JSON.stringify(name)), COLON, value),
        isRequired: required.includes(name),
      };
    });
    if (this.#literalChars > LITERAL_CHARS_MAX)
      throw this.#refusal(path, `its names have more than ${LITERAL_CHARS_MAX} characters together`);
    return sequence(text('{'), this.#members(members, path), text('}'));
  }

  /** In their order; each optional one may be left out. From the last to the first, so that rules lead on to rules. */
  #members(members: readonly { member: Expression; isRequired: boolean }[], path: Path): Expression {
    // What may follow, where nothing was written yet and where something was.
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
    const names = schema.propertyNames;
    const key = names === undefined ? rule('json_string') : this.#name(names, path, depth);
    const value = this.#item(others, `${path}/additionalProperties`, depth);
    return sequence(text('{'), optional(list(sequence(key, COLON, value))), text('}'));
  }

  #name(schema: unknown, path: Path, depth: number): Expression {
    const place = `${path}/propertyNames`;
    const whole = isObject(schema) && !('type' in schema) ? { ...schema, type: 'string' } : schema;
    if (!isObject(whole) || whole.type !== 'string')
      throw this.#refusal(place, 'expected a schema of strings');
    return this.#item(whole, place, depth);
  }

  #count(name: string, schema: SchemaObject, path: Path): number | undefined {
    const value = schema[name];
    if (value === undefined) return undefined;
    if (typeof value !== 'number' || !Number.isInteger(value) || value < 0)
      throw this.#refusal(`${path}/${name}`, 'expected a whole number, at least 0');
    // zod writes it where there is no bound.
    return value >= Number.MAX_SAFE_INTEGER ? undefined : value;
  }

  #refusal(path: Path, why: string): MaskrouteError {
    const { param } = this.#options;
    const place = path === '' ? 'the schema' : `the schema at ${path.slice(0, 200)}`;
    return new MaskrouteError('invalid_schema', `${param}: ${place}: ${why}.`, { param });
  }
}

const TOO_LONG = `its strings are counted over more than ${COUNTED_CHARS_MAX} characters together`;

const isObject = (value: unknown): value is SchemaObject =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

const valuesOf = (schema: SchemaObject): readonly unknown[] =>
  'const' in schema ? [schema.const] : Array.isArray(schema.enum) ? schema.enum : [];

const pointer = (name: string): string => name.replaceAll('~', '~0').replaceAll('/', '~1');
function unescaped($ref: string, part: string): string {
  const plain = part.replaceAll('~1', '/').replaceAll('~0', '~');
  try {
    return $ref.includes('%') ? decodeURIComponent(plain) : plain;
  } catch {
    return plain;
  }
}

/** Of a schema without `type`: a keyword speaks of one type and lets all others be, so that type is what is meant. */
function impliedTypes(schema: SchemaObject): readonly Type[] {
  const has = (names: readonly string[]) => names.some((name) => name in schema);
  if (has(OBJECT_KEYWORDS)) return ['object'];
  if (has(ARRAY_KEYWORDS)) return ['array'];
  if (has(STRING_KEYWORDS)) return ['string'];
  if (has(NUMBER_KEYWORDS)) return ['number'];
  return ['object', 'array', 'string', 'number', 'boolean', 'null'];
}

function isOf(type: Type, value: unknown): boolean {
  switch (type) {
    case 'null':
      return value === null;
    case 'array':
      return Array.isArray(value);
    case 'object':
      return isObject(value);
    case 'integer':
      return Number.isInteger(value);
    default:
      return typeof value === type;
  }
}

/** States of an expression, repetitions written out. */
const sizeOf = (expression: Expression): number => sumOfLeaves(expression, () => 1);

/** The states in which most tokens go on. */
const wideSizeOf = (expression: Expression): number =>
  sumOfLeaves(expression, (leaf) => {
    if (leaf.kind !== 'chars') return 0;
    return leaf.ranges.reduce((sum, [from, to]) => sum + to - from + 1, 0) > 64 ? 1 : 0;
  });
