/**
 * What a JSON schema says, keyword by keyword: types, bounds, lists, properties, and where its `$ref`s lead. What is written
 * wrongly is refused with the place in the schema, and so is what no grammar can keep. `json-schema.ts` makes the grammar.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';

/** `strict`: what a grammar cannot keep is refused; otherwise it is left out. */
export type SchemaOptions = {
  readonly strict: boolean;
  /** What the schema is called in the request; it begins the `param` of a refusal. */
  readonly param: string;
};

export type SchemaObject = Readonly<Record<string, unknown>>;
/** Where in the schema, as a JSON pointer without `#`. */
export type Path = string;

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

/** Of one schema. Parts that refer to parts may be as many as there are paths between them. */
const JOINED_MAX = 2000;

/** With them a schema without `type` may have values of any. */
const TYPELESS_KEYWORDS = ['$ref', 'enum', 'const', 'anyOf', 'oneOf', 'allOf'];

const TYPES = ['object', 'array', 'string', 'number', 'integer', 'boolean', 'null'] as const;
export type Type = (typeof TYPES)[number];

/** Bounds of a number; what is out is excluded itself. */
type Bounds = {
  readonly min: number | undefined;
  readonly max: number | undefined;
  readonly minIsOut: boolean;
  readonly maxIsOut: boolean;
};

/** An array: the schemas of its first items, that of the others, and how many there may be. */
type List = {
  readonly prefix: readonly unknown[];
  readonly rest: unknown;
  readonly least: number;
  readonly most: number | undefined;
};

/** An object: its properties in order, which of them must be there, and the schema of all others. */
type Properties = {
  readonly names: readonly string[];
  readonly properties: SchemaObject;
  readonly required: readonly string[];
  readonly others: unknown;
};

/** Every method throws MaskrouteError `invalid_schema` for what cannot be read. */
export class SchemaReader {
  readonly isStrict: boolean;
  readonly #root: unknown;
  readonly #param: string;
  /** Schemas that were read for the sake of an `allOf`. */
  #joined = 0;

  constructor(root: unknown, { strict, param }: SchemaOptions) {
    this.#root = root;
    this.isStrict = strict;
    this.#param = param;
  }

  /** With what its `allOf` says. */
  object(schema: unknown, path: Path): SchemaObject {
    if (!isObject(schema)) throw this.refusal(path, 'expected an object, true or false');
    this.#refuseUnknown(schema, path);
    return this.#merged(schema, path);
  }

  #refuseUnknown(schema: SchemaObject, path: Path): void {
    if (!this.isStrict) return;
    const unknown = Object.keys(schema).find((name) => !KNOWN.has(name) && !ANNOTATIONS.has(name));
    if (unknown !== undefined)
      throw this.refusal(`${path}/${unknown}`, 'it cannot be kept while an answer is written');
  }

  #merged(schema: SchemaObject, path: Path): SchemaObject {
    if (!('allOf' in schema)) return schema;
    const { allOf, ...own } = schema;
    const parts = Array.isArray(allOf) ? allOf.filter(isObject) : [];
    const constraints = Object.keys(own).filter((name) => !ANNOTATIONS.has(name));
    if (parts.length === 1 && constraints.every((name) => name === 'type')) {
      this.#refuseUnknown(parts[0]!, `${path}/allOf/0`);
      return this.#merged({ ...own, ...parts[0]! }, `${path}/allOf/0`);
    }
    if (this.isStrict)
      throw this.refusal(`${path}/allOf`, 'schemas that hold together have no grammar; write them as one');
    return this.#together(schema, path, []);
  }

  /** A schema, what it refers to and what its `allOf` says, as far as one schema can say it. `from`: the `$ref`s that led here. */
  #together(schema: SchemaObject, path: Path, from: readonly unknown[]): SchemaObject {
    if (++this.#joined > JOINED_MAX)
      throw this.refusal(path, `its \`allOf\` have more than ${JOINED_MAX} schemas together`);
    if ('$ref' in schema) {
      const { $ref, found } = this.reference(schema, path);
      if (from.includes($ref)) throw this.refusal(path, 'it leads back to itself');
      return isObject(found) ? this.#together(found, path, [...from, $ref]) : {};
    }
    const { allOf, ...own } = schema;
    const parts = Array.isArray(allOf) ? allOf.filter(isObject) : [];
    return parts
      .map((part, i) => this.#together(part, `${path}/allOf/${i}`, from))
      .reduce((all, part) => joined(all, part), own);
  }

  /** What `$ref` names, and what stands there. */
  reference(schema: SchemaObject, path: Path): { readonly $ref: string; readonly found: unknown } {
    const { $ref } = schema;
    if (typeof $ref !== 'string' || !/^#(\/|$)/.test($ref))
      throw this.refusal(`${path}/$ref`, 'expected a place in the same schema, such as "#/$defs/name"');
    this.#requireAlone('$ref', schema, path);
    return { $ref, found: this.#find($ref, path) };
  }

  /** Where it is strict: nothing but annotations, and what is `also` kept, stands beside a keyword. */
  #requireAlone(name: string, schema: SchemaObject, path: Path, also: readonly string[] = []): void {
    if (!this.isStrict) return;
    const beside = Object.keys(schema).find(
      (one) => one !== name && !also.includes(one) && !ANNOTATIONS.has(one),
    );
    if (beside !== undefined) throw this.refusal(`${path}/${beside}`, `beside \`${name}\` it cannot be kept`);
  }

  #find($ref: string, path: Path): unknown {
    let found: unknown = this.#root;
    for (const part of $ref.split('/').slice(1)) {
      const name = unescaped($ref, part);
      const isThere = typeof found === 'object' && found !== null && Object.hasOwn(found, name);
      if (!isThere) throw this.refusal(`${path}/$ref`, 'it names nothing in the schema');
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

  /** The schemas of `anyOf` or `oneOf` that have values of the schema's type, and those values alone. */
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
      schema: isObject(option) && !('$ref' in option) ? joined(beside, option) : option,
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

  /** The schema with those of its types that are among `types`; undefined when none is. */
  #narrowed(schema: unknown, types: readonly Type[], path: Path): unknown {
    if (schema === true) return { type: types };
    if (!isObject(schema)) return schema;
    if ('$ref' in schema) {
      const own = this.#typesOf(this.reference(schema, path).found, path) ?? TYPES;
      const isWithin = own.every((one) => types.some((type) => commonType(type, one) === one));
      if (isWithin || !this.isStrict) return schema;
      throw this.refusal(`${path}/$ref`, 'it leads to a schema of other types');
    }
    const own = this.#typesOf(schema, path) ?? types;
    const common = types.flatMap((type) => own.flatMap((other) => commonType(type, other) ?? []));
    return common.length === 0 ? undefined : { ...schema, type: [...new Set(common)] };
  }

  /** Undefined where a schema does not say them itself. */
  #typesOf(schema: unknown, path: Path): readonly Type[] | undefined {
    if (!isObject(schema)) return undefined;
    const isOpen = !('type' in schema) && TYPELESS_KEYWORDS.some((name) => name in schema);
    return isOpen ? undefined : this.types(schema, path);
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

  bounds(schema: SchemaObject, path: Path): Bounds {
    const bound = (name: string): number | undefined => {
      const value = schema[name];
      if (value === undefined) return undefined;
      if (typeof value !== 'number' || !Number.isFinite(value))
        throw this.refusal(`${path}/${name}`, 'expected a number');
      return value;
    };
    const [min, below] = [bound('minimum'), bound('exclusiveMinimum')];
    const [max, above] = [bound('maximum'), bound('exclusiveMaximum')];
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
    if (!isObject(properties)) throw this.refusal(`${path}/properties`, 'expected an object of schemas');
    const required = schema.required ?? [];
    if (!Array.isArray(required) || required.some((name) => typeof name !== 'string'))
      throw this.refusal(`${path}/required`, 'expected a list of names');
    const others = schema.additionalProperties ?? true;
    const missing = (required as string[]).filter((name) => !Object.hasOwn(properties, name));
    if (missing.length > 0 && others === false)
      throw this.refusal(
        `${path}/required`,
        `${JSON.stringify(missing[0]!.slice(0, 60))} is no property, and there may be no others`,
      );
    return { names: [...Object.keys(properties), ...new Set(missing)], properties, required, others };
  }

  count(name: string, schema: SchemaObject, path: Path): number | undefined {
    const value = schema[name];
    if (value === undefined) return undefined;
    if (typeof value !== 'number' || !Number.isInteger(value) || value < 0)
      throw this.refusal(`${path}/${name}`, 'expected a whole number, at least 0');
    // zod writes it where there is no bound.
    return value >= Number.MAX_SAFE_INTEGER ? undefined : value;
  }

  refusal(path: Path, why: string): MaskrouteError {
    const place = path === '' ? 'the schema' : `the schema at ${path.slice(0, 200)}`;
    return new MaskrouteError('invalid_schema', `${this.#param}: ${place}: ${why}.`, { param: this.#param });
  }
}

export const isObject = (value: unknown): value is SchemaObject =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** What both say, as far as one schema can: where they say the same thing twice, `second` counts. */
function joined(first: SchemaObject, second: SchemaObject): SchemaObject {
  const both = { ...first, ...second };
  const [a, b] = [first.properties, second.properties];
  if (isObject(a) && isObject(b)) both.properties = { ...a, ...b };
  if (Array.isArray(first.required) && Array.isArray(second.required))
    both.required = [...first.required, ...second.required];
  return both;
}

const valuesOf = (schema: SchemaObject): readonly unknown[] =>
  'const' in schema ? [schema.const] : Array.isArray(schema.enum) ? schema.enum : [];

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

/** The type of the values that have both. */
function commonType(a: Type, b: Type): Type | undefined {
  if (a === b) return a;
  const isNumeric = [a, b].every((type) => type === 'integer' || type === 'number');
  return isNumeric ? 'integer' : undefined;
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
