/**
 * Reads JSON schemas keyword by keyword: types, bounds, lists, properties, `$ref`s. Invalid keywords, and in strict mode
 * those that a grammar cannot enforce, are refused with their place in the schema. `json-schema.ts` makes the grammar.
 */
import { canonicalJson } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { isJsonObject } from '../../shared/wire/parse-body.ts';
import type { Bounds } from './number-range.ts';
import { JOINED, nothingSpent, type Spent } from './schema-limits.ts';

export type SchemaOptions = {
  /** Refuses what a grammar cannot enforce; otherwise that is ignored. */
  readonly strict: boolean;
  /** The schema's field in the request, for errors. */
  readonly param: string;
  /** Of the request; a schema that stands alone has its own. */
  readonly spent?: Spent;
};

export type SchemaObject = Readonly<Record<string, unknown>>;
/** A place in the schema, as a JSON pointer without `#`. */
export type Path = string;

/** Keywords that do not restrict values. */
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

/** What `propertyNames` is refused with if it allows other values. */
export const NOT_STRINGS = 'expected a schema of strings';

/** With one of these a schema without `type` may have values of any type. */
const TYPELESS_KEYWORDS = ['$ref', 'enum', 'const', 'anyOf', 'oneOf', 'allOf'];

const TYPES = ['object', 'array', 'string', 'number', 'integer', 'boolean', 'null'] as const;
export type Type = (typeof TYPES)[number];

/** An array: the schemas of its first items, the schema of all further items, and the number of items. */
type List = {
  readonly prefix: readonly unknown[];
  readonly rest: unknown;
  readonly least: number;
  readonly most: number | undefined;
};

/** An object: its properties in order, the required ones, and the schema of all others. */
type Properties = {
  readonly names: readonly string[];
  readonly properties: SchemaObject;
  readonly required: readonly string[];
  readonly others: unknown;
};

/** Every method throws MaskrouteError `invalid_schema` for an invalid or unsupported schema. */
export class SchemaReader {
  readonly isStrict: boolean;
  readonly spent: Spent;
  readonly #root: unknown;
  readonly #param: string;

  constructor(root: unknown, { strict, param, spent = nothingSpent() }: SchemaOptions) {
    this.#root = root;
    this.isStrict = strict;
    this.#param = param;
    this.spent = spent;
  }

  /** A schema as an object, with its `allOf` joined in. */
  object(schema: unknown, path: Path): SchemaObject {
    if (!isJsonObject(schema)) throw this.refusal(path, 'expected an object, true or false');
    this.#refuseUnknown(schema, path);
    return this.#merged(schema, path);
  }

  #refuseUnknown(schema: SchemaObject, path: Path): void {
    if (!this.isStrict) return;
    const unknown = Object.keys(schema).find((name) => !KNOWN.has(name) && !ANNOTATIONS.has(name));
    if (unknown !== undefined)
      throw this.refusal(`${path}/${unknown}`, 'it cannot be enforced while an answer is generated');
  }

  #merged(schema: SchemaObject, path: Path): SchemaObject {
    if (!('allOf' in schema)) return schema;
    const { allOf, ...own } = schema;
    const parts = Array.isArray(allOf) ? allOf.filter(isJsonObject) : [];
    const constraints = Object.keys(own).filter((name) => !ANNOTATIONS.has(name));
    if (parts.length === 1 && constraints.every((name) => name === 'type')) {
      this.#refuseUnknown(parts[0]!, `${path}/allOf/0`);
      return this.#merged({ ...own, ...parts[0]! }, `${path}/allOf/0`);
    }
    if (this.isStrict)
      throw this.refusal(
        `${path}/allOf`,
        'schemas joined by `allOf` are not supported; write them as one schema',
      );
    return this.#together(schema, path, []);
  }

  /** A schema joined with its `$ref` and `allOf`, as far as one schema can express it. `from`: the `$ref`s that led here. */
  #together(schema: SchemaObject, path: Path, from: readonly unknown[]): SchemaObject {
    if (++this.spent.joined > JOINED.max) throw this.refusal(path, JOINED.message);
    if ('$ref' in schema) {
      const { $ref, found } = this.reference(schema, path);
      if (from.includes($ref)) throw this.refusal(path, 'it leads back to itself');
      return isJsonObject(found) ? this.#together(found, path, [...from, $ref]) : {};
    }
    const { allOf, ...own } = schema;
    const parts = Array.isArray(allOf) ? allOf.filter(isJsonObject) : [];
    return parts
      .map((part, i) => this.#together(part, `${path}/allOf/${i}`, from))
      .reduce((all, part) => joined(all, part), own);
  }

  /** A `$ref` and the schema that it refers to. */
  reference(schema: SchemaObject, path: Path): { readonly $ref: string; readonly found: unknown } {
    const { $ref } = schema;
    if (typeof $ref !== 'string' || !/^#(\/|$)/.test($ref))
      throw this.refusal(`${path}/$ref`, 'expected a place in the same schema, such as "#/$defs/name"');
    this.#requireAlone('$ref', schema, path);
    return { $ref, found: this.#find($ref, path) };
  }

  /** In strict mode only annotations and the keywords in `also` are allowed beside a keyword. */
  #requireAlone(name: string, schema: SchemaObject, path: Path, also: readonly string[] = []): void {
    if (!this.isStrict) return;
    const beside = Object.keys(schema).find(
      (one) => one !== name && !also.includes(one) && !ANNOTATIONS.has(one),
    );
    if (beside !== undefined)
      throw this.refusal(`${path}/${beside}`, `beside \`${name}\` it cannot be enforced`);
  }

  #find($ref: string, path: Path): unknown {
    let found: unknown = this.#root;
    for (const part of $ref.split('/').slice(1)) {
      const name = unescaped(part);
      const isThere = typeof found === 'object' && found !== null && Object.hasOwn(found, name);
      if (!isThere) throw this.refusal(`${path}/$ref`, 'there is no such place in the schema');
      found = (found as SchemaObject)[name];
    }
    return found;
  }

  types(schema: SchemaObject, path: Path): readonly Type[] {
    const { type, nullable } = schema;
    if (type === undefined) return impliedTypes(schema);
    const given = Array.isArray(type) ? type : [type];
    const wrong = given.length === 0 || given.some((one) => !TYPES.includes(one as Type));
    if (wrong) throw this.refusal(`${path}/type`, `expected ${TYPES.join(', ')}, or a list of them`);
    return [...new Set([...(given as Type[]), ...(nullable === true ? (['null'] as const) : [])])];
  }

  /** The values of `const` or `enum` that have the schema's type. */
  literals(name: 'const' | 'enum', schema: SchemaObject, path: Path): readonly unknown[] {
    const values = name === 'const' ? [schema.const] : schema.enum;
    if (!Array.isArray(values) || values.length === 0)
      throw this.refusal(`${path}/${name}`, 'expected a list with a value');
    this.#requireAlone(name, schema, path, ['type', 'nullable']);
    const types = 'type' in schema ? this.types(schema, path) : undefined;
    const allowed =
      types === undefined ? values : values.filter((value) => types.some((type) => isOf(type, value)));
    if (allowed.length === 0) throw this.refusal(`${path}/${name}`, 'none of its values has the type');
    return allowed;
  }

  /** The schemas of `anyOf` or `oneOf`, restricted to the schema's own type; those of other types are left out. */
  alternatives(
    name: 'anyOf' | 'oneOf',
    schema: SchemaObject,
    path: Path,
  ): readonly { readonly schema: unknown; readonly path: Path }[] {
    const options = schema[name];
    if (!Array.isArray(options) || options.length === 0)
      throw this.refusal(`${path}/${name}`, 'expected a list with a schema');
    this.#requireAlone(name, schema, path, ['type']);
    if (name === 'oneOf' && this.isStrict && !this.#areApart(options, path))
      throw this.refusal(
        `${path}/oneOf`,
        'a value could be valid for two of its schemas; use `anyOf`, or tell them apart by a property with `const`',
      );
    const { [name]: _, type, nullable, ...beside } = schema;
    const places = options.map((option: unknown, i) => ({
      schema: isJsonObject(option) && !('$ref' in option) ? joined(beside, option) : option,
      path: `${path}/${name}/${i}`,
    }));
    if (!('type' in schema)) return places;
    const types = this.types(schema, path);
    const found = places.flatMap((place) => {
      const narrowed = this.#narrowed(place.schema, types, place.path);
      return narrowed === undefined ? [] : [{ ...place, schema: narrowed }];
    });
    if (found.length === 0) throw this.refusal(`${path}/${name}`, 'none of its schemas has the type');
    return found;
  }

  /** The schema restricted to `types`; undefined when nothing remains. */
  #narrowed(schema: unknown, types: readonly Type[], path: Path): unknown {
    if (schema === true) return { type: types };
    if (!isJsonObject(schema)) return schema;
    if ('$ref' in schema) {
      const own = this.#typesOf(this.reference(schema, path).found, path) ?? TYPES;
      if (commonTypes(types, own).length === 0) return undefined;
      const isWithin = own.every((one) => types.some((type) => commonType(type, one) === one));
      if (isWithin || !this.isStrict) return schema;
      throw this.refusal(`${path}/$ref`, 'it leads to a schema of other types');
    }
    const own = this.#typesOf(schema, path) ?? types;
    const common = commonTypes(types, own);
    return common.length === 0 ? undefined : { ...schema, type: common };
  }

  /** A schema's types by its own keywords; undefined if only other schemas, as in `$ref` or `anyOf`, say them. */
  #typesOf(schema: unknown, path: Path): readonly Type[] | undefined {
    if (!isJsonObject(schema)) return undefined;
    if ('type' in schema) return this.types(schema, path);
    const values = valuesOf(schema);
    if (values.length > 0) return [...new Set(values.map(typeOf))];
    return TYPELESS_KEYWORDS.some((name) => name in schema) ? undefined : this.types(schema, path);
  }

  /** Whether no value is valid for two of the schemas: they differ by type, by value, or by a required property's values. */
  #areApart(options: readonly unknown[], path: Path): boolean {
    const schemas = options.map((option) =>
      isJsonObject(option) && typeof option.$ref === 'string' ? this.#find(option.$ref, path) : option,
    );
    if (!schemas.every(isJsonObject)) return false;
    const types = schemas.map((schema) => this.#typesOf(schema, path) ?? []);
    // Where a keyword such as `properties` only implies a type, values of all other types are valid, too.
    const areExplicit = schemas.every((schema) => 'type' in schema || valuesOf(schema).length > 0);
    if (areExplicit && areDisjoint(types.map(withoutIntegers))) return true;
    if (areDisjoint(schemas.map(textsOf))) return true;
    const areObjects = types.every((own) => own.length === 1 && own[0] === 'object');
    return areObjects && Object.keys(propertiesOf(schemas[0]!)).some((name) => areToldApartBy(name, schemas));
  }

  bounds(schema: SchemaObject, path: Path): Bounds {
    const bound = (name: string): number | undefined => {
      const value = schema[name];
      if (value === undefined) return undefined;
      if (typeof value !== 'number' || !Number.isFinite(value))
        throw this.refusal(`${path}/${name}`, 'expected a number');
      return value;
    };
    // In OpenAPI 3.0 it says of the other keyword whether that bound is excluded.
    const exclusive = (name: string, inclusive: number | undefined): number | undefined =>
      typeof schema[name] === 'boolean' ? (schema[name] ? inclusive : undefined) : bound(name);
    const [min, max] = [bound('minimum'), bound('maximum')];
    const [below, above] = [exclusive('exclusiveMinimum', min), exclusive('exclusiveMaximum', max)];
    const minIsOut = below !== undefined && (min === undefined || below >= min);
    const maxIsOut = above !== undefined && (max === undefined || above <= max);
    return { min: minIsOut ? below : min, max: maxIsOut ? above : max, minIsOut, maxIsOut };
  }

  list(schema: SchemaObject, path: Path): List {
    const prefix = schema.prefixItems ?? (Array.isArray(schema.items) ? schema.items : []);
    if (!Array.isArray(prefix)) throw this.refusal(`${path}/prefixItems`, 'expected a list of schemas');
    const least = this.count('minItems', schema, path) ?? 0;
    const most = this.count('maxItems', schema, path);
    if (most !== undefined && most < least)
      throw this.refusal(path, 'its `maxItems` is below its `minItems`');
    return { prefix, rest: Array.isArray(schema.items) ? undefined : schema.items, least, most };
  }

  properties(schema: SchemaObject, path: Path): Properties {
    const properties = schema.properties ?? {};
    if (!isJsonObject(properties)) throw this.refusal(`${path}/properties`, 'expected an object of schemas');
    const required = schema.required ?? [];
    if (!Array.isArray(required) || required.some((name) => typeof name !== 'string'))
      throw this.refusal(`${path}/required`, 'expected a list of names');
    const others = schema.additionalProperties ?? true;
    const missing = (required as string[]).filter((name) => !Object.hasOwn(properties, name));
    if (missing.length > 0 && others === false)
      throw this.refusal(
        `${path}/required`,
        `${JSON.stringify(missing[0]!.slice(0, 60))} is not in \`properties\`, and \`additionalProperties\` is false`,
      );
    const names = [...Object.keys(properties), ...new Set(missing)];
    if (names.length > 0) this.#requireNames(names, schema, path);
    return { names, properties, required, others };
  }

  /** The schema of `propertyNames`, itself and neither a `$ref` nor an `allOf`; undefined if all names are allowed. */
  propertyNames(schema: SchemaObject, path: Path): SchemaObject | undefined {
    const place = `${path}/propertyNames`;
    const found = this.#followed(schema.propertyNames ?? true, place);
    if (found === true) return undefined;
    const names = isJsonObject(found) && !('type' in found) ? { ...found, type: 'string' } : found;
    if (!isJsonObject(names) || this.types(names, place).join() !== 'string')
      throw this.refusal(place, NOT_STRINGS);
    return names;
  }

  /** A schema behind its `$ref`s and with its `allOf` joined in. */
  #followed(schema: unknown, path: Path): unknown {
    const seen = new Set<string>();
    for (let found = schema; ; ) {
      const whole = isJsonObject(found) ? this.object(found, path) : found;
      if (!isJsonObject(whole) || !('$ref' in whole)) return whole;
      const { $ref, found: next } = this.reference(whole, path);
      if (seen.has($ref)) throw this.refusal(path, 'it leads back to itself');
      seen.add($ref);
      found = next;
    }
  }

  /** In strict mode, `propertyNames` beside named properties has to be a list that has their names. */
  #requireNames(names: readonly string[], schema: SchemaObject, path: Path): void {
    const allowed = this.isStrict ? this.propertyNames(schema, path) : undefined;
    const isOpen = (name: string) => name === 'type' || ANNOTATIONS.has(name);
    if (allowed === undefined || Object.keys(allowed).every(isOpen)) return;
    const values = new Set(valuesOf(allowed));
    if (names.every((name) => values.has(name))) return;
    throw this.refusal(
      `${path}/propertyNames`,
      'beside named properties it cannot be enforced, unless it is an `enum` with their names',
    );
  }

  count(name: string, schema: SchemaObject, path: Path): number | undefined {
    const value = schema[name];
    if (value === undefined) return undefined;
    if (typeof value !== 'number' || !Number.isInteger(value) || value < 0)
      throw this.refusal(`${path}/${name}`, 'expected a whole number, at least 0');
    // zod writes this for no bound.
    return value >= Number.MAX_SAFE_INTEGER ? undefined : value;
  }

  refusal(path: Path, why: string): MaskrouteError {
    const place = path === '' ? 'the schema' : `the schema at ${path.slice(0, 200)}`;
    return new MaskrouteError('invalid_schema', `${this.#param}: ${place}: ${why}.`, { param: this.#param });
  }
}

/** Two schemas joined into one; if both have a keyword, other than `properties` and `required`, `second` counts. */
function joined(first: SchemaObject, second: SchemaObject): SchemaObject {
  const both = { ...first, ...second };
  const [a, b] = [first.properties, second.properties];
  if (isJsonObject(a) && isJsonObject(b)) both.properties = { ...a, ...b };
  if (Array.isArray(first.required) && Array.isArray(second.required))
    both.required = [...first.required, ...second.required];
  return both;
}

const valuesOf = (schema: SchemaObject): readonly unknown[] =>
  'const' in schema ? [schema.const] : Array.isArray(schema.enum) ? schema.enum : [];

const textsOf = (schema: SchemaObject): string[] => valuesOf(schema).map(canonicalJson);

/** Whether all lists have items, and no item is there twice. */
function areDisjoint(lists: readonly (readonly string[])[]): boolean {
  const all = lists.flat();
  return lists.every(({ length }) => length > 0) && new Set(all).size === all.length;
}

const withoutIntegers = (types: readonly Type[]): Type[] => [
  ...new Set(types.map((type) => (type === 'integer' ? 'number' : type))),
];

const propertiesOf = ({ properties }: SchemaObject): SchemaObject =>
  isJsonObject(properties) ? properties : {};

/** Whether all schemas require the property, each with other values. */
function areToldApartBy(name: string, schemas: readonly SchemaObject[]): boolean {
  const isRequired = ({ required }: SchemaObject) => Array.isArray(required) && required.includes(name);
  if (!schemas.every(isRequired)) return false;
  return areDisjoint(
    schemas.map((schema) => {
      const properties = propertiesOf(schema);
      const property = Object.hasOwn(properties, name) ? properties[name] : undefined;
      return isJsonObject(property) ? textsOf(property) : [];
    }),
  );
}

/** A name in a JSON pointer in a URI fragment (RFC 6901, section 6). A `%` that begins no escape is itself. */
function unescaped(part: string): string {
  const plain = (text: string) => text.replaceAll('~1', '/').replaceAll('~0', '~');
  try {
    return plain(decodeURIComponent(part));
  } catch {
    return plain(part);
  }
}

/** The types of a schema without `type`. A keyword such as `properties` restricts one type only, so that type is meant. */
function impliedTypes(schema: SchemaObject): readonly Type[] {
  const has = (names: readonly string[]) => names.some((name) => name in schema);
  if (has(OBJECT_KEYWORDS)) return ['object'];
  if (has(ARRAY_KEYWORDS)) return ['array'];
  if (has(STRING_KEYWORDS)) return ['string'];
  if (has(NUMBER_KEYWORDS)) return ['number'];
  return ['object', 'array', 'string', 'number', 'boolean', 'null'];
}

/** The type of the values that belong to both types, if any. */
function commonType(a: Type, b: Type): Type | undefined {
  if (a === b) return a;
  const isNumeric = [a, b].every((type) => type === 'integer' || type === 'number');
  return isNumeric ? 'integer' : undefined;
}

const commonTypes = (some: readonly Type[], others: readonly Type[]): readonly Type[] => [
  ...new Set(some.flatMap((type) => others.flatMap((other) => commonType(type, other) ?? []))),
];

/** `value`: of JSON. */
function typeOf(value: unknown): Exclude<Type, 'integer'> {
  if (value === null) return 'null';
  return Array.isArray(value) ? 'array' : (typeof value as 'object' | 'string' | 'number' | 'boolean');
}

const isOf = (type: Type, value: unknown): boolean =>
  type === 'integer' ? Number.isInteger(value) : typeOf(value) === type;
