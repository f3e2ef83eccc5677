/**
 * Validates objects by a table that says for each field whether it is honoured, refused or ignored. Only the fields
 * that are present are looked up and checked: of a hundred possible fields, most bodies have four.
 */
import { z } from 'zod';
import { isJsonObject, parse, words } from './parse-body.ts';
import { HEADERS } from './protocol.ts';

export type Rule =
  | {
      readonly kind: 'honoured';
      readonly schema: z.ZodType;
      readonly inner: CheckedObject<z.ZodType> | undefined;
    }
  /**
   * It would change the answer. `harmless`: values that are accepted (in addition to null), as they ask for the default
   * behaviour.
   */
  | { readonly kind: 'refused'; readonly why: string; readonly harmless: readonly unknown[] }
  /**
   * The answer is the same without it. `harmless`: values (in addition to null) that ask for nothing, so they are not
   * reported as ignored.
   */
  | { readonly kind: 'ignored'; readonly harmless: readonly unknown[] };

/** `inner`: the table of the object, or of the objects of a list, in this field. */
export const honoured = <S extends z.ZodType>(schema: S, inner?: CheckedObject<z.ZodType>) => ({
  kind: 'honoured' as const,
  schema,
  inner,
});
export const refused = (why: string, ...harmless: unknown[]) => ({ kind: 'refused' as const, why, harmless });
export const ignored = (...harmless: unknown[]) => ({ kind: 'ignored' as const, harmless });

export type FieldTable = Readonly<Record<string, Rule>>;

type HonouredShape<Table extends FieldTable> = {
  [Name in keyof Table as Table[Name] extends { kind: 'honoured' } ? Name : never]: Table[Name] extends {
    schema: infer S extends z.ZodType;
  }
    ? S
    : never;
};
export type ObjectOf<Table extends FieldTable> = z.output<z.ZodObject<HonouredShape<Table>, z.core.$strip>>;

/**
 * What a schema made here accepts. Such a schema is a function, which OpenAPI generation cannot inspect, so it is
 * described here.
 */
type Drawn =
  | { readonly kind: 'table'; readonly table: FieldTable }
  | { readonly kind: 'list'; readonly item: z.ZodType; readonly min: number; readonly max: number };
const drawn = new WeakMap<object, Drawn>();
export const drawnFrom = (schema: object): Drawn | undefined => drawn.get(schema);

export type CheckedObject<Schema extends z.ZodType> = {
  /** Parses to the honoured fields, and reports the issues of all fields at once. */
  readonly schema: Schema;
  /**
   * Adds the paths of ignored fields in an object that the schema has accepted, without list indices: `messages.name`.
   */
  collectIgnored(object: object, prefix: string, paths: Set<string>): void;
};

type ObjectOptions<Table extends FieldTable> = {
  /** The discriminating field: if it is wrong, no other field is checked. */
  readonly tag?: keyof Table & string;
  /** Checks across fields, once each field is valid. */
  readonly refine?: (object: ObjectOf<Table>) => { path: string; message: string } | undefined;
};

export function checkedObject<const Table extends FieldTable>(
  table: Table,
  options: ObjectOptions<Table> = {},
): CheckedObject<z.ZodType<ObjectOf<Table>>> {
  const rules = new Map<string, Rule>(Object.entries(table));
  // Required fields, and fields with a default.
  const always = [...rules].filter(([, rule]) => rule.kind === 'honoured' && !mayBeAbsent(rule.schema));
  const schema = z.transform((value: unknown, { issues }: Context) => {
    if (!isJsonObject(value)) {
      issues.push({ code: 'invalid_type', expected: 'object', input: value });
      return value as never;
    }
    return readObject(value, rules, always, options as Options, issues) as never;
  }) as unknown as z.ZodType<ObjectOf<Table>>;
  drawn.set(schema, { kind: 'table', table });
  return {
    schema,
    collectIgnored: (object, prefix, paths) => collectIgnored(object, rules, prefix, paths),
  };
}

/**
 * A request's honoured fields, and the response header that names the ignored ones.
 * @throws MaskrouteError `invalid_request`.
 */
export function readFields<Schema extends z.ZodType>(
  { schema, collectIgnored }: CheckedObject<Schema>,
  raw: unknown,
): { body: z.output<Schema>; ignored: Record<string, string> } {
  const body = parse(schema, raw);
  const paths = new Set<string>();
  collectIgnored(raw as object, '', paths);
  return { body, ignored: paths.size === 0 ? {} : { [HEADERS.ignored]: [...paths].join(', ') } };
}

type Context = { issues: unknown[] };
type Options = { tag?: string; refine?: (object: object) => { path: string; message: string } | undefined };

function readObject(
  value: Readonly<Record<string, unknown>>,
  rules: ReadonlyMap<string, Rule>,
  always: readonly [string, Rule][],
  { tag, refine }: Options,
  issues: unknown[],
): object {
  const object: Record<string, unknown> = {};
  const before = issues.length;
  if (tag !== undefined) {
    readField(tag, value[tag], rules.get(tag)!, object, issues);
    if (issues.length > before) return object;
  }
  let unknown: string[] | undefined;
  for (const name of Object.keys(value)) {
    const rule = rules.get(name);
    if (rule === undefined) {
      // Clients that write out all fields of their types write null for those that are not set.
      if (value[name] === null) continue;
      unknown ??= [];
      unknown.push(name);
    } else if (name !== tag) readField(name, value[name], rule, object, issues);
  }
  for (const [name, rule] of always) {
    if (!Object.hasOwn(value, name) && name !== tag) readField(name, undefined, rule, object, issues);
  }
  if (unknown !== undefined) {
    issues.push({ code: 'unrecognized_keys', keys: unknown, known: [...rules.keys()], input: value });
  }
  const wrong = issues.length === before ? refine?.(object) : undefined;
  if (wrong !== undefined) {
    issues.push({ code: 'custom', path: [wrong.path], message: wrong.message, input: value });
  }
  return object;
}

function readField(
  name: string,
  value: unknown,
  rule: Rule,
  into: Record<string, unknown>,
  issues: unknown[],
): void {
  if (rule.kind === 'honoured') {
    const { isGood, output } = run(rule.schema, value, name, issues);
    if (isGood) into[name] = output;
  } else if (rule.kind === 'refused' && !isHarmless(value, rule)) {
    issues.push({ code: 'custom', path: [name], message: refusal(rule), input: value });
  }
}
const CONTEXT: z.core.ParseContextInternal = { async: false, error: words };

function refusal({ why, harmless }: Rule & { kind: 'refused' }): string {
  const values = harmless.map((value) => JSON.stringify(value));
  return `${why}; ${values.length === 0 ? 'leave it out' : `only ${values.join(' or ')} can be sent here`}`;
}

const isHarmless = (value: unknown, { harmless }: { readonly harmless: readonly unknown[] }): boolean =>
  value == null || harmless.some((one) => isSame(value, one));

/** Equality of plain values, and of lists and flat objects of them. */
function isSame(value: unknown, other: unknown): boolean {
  if (typeof value !== 'object' || typeof other !== 'object' || value === null || other === null) {
    return value === other;
  }
  const names = Object.keys(other);
  return (
    Array.isArray(value) === Array.isArray(other) &&
    Object.keys(value).length === names.length &&
    names.every(
      (name) => (value as Record<string, unknown>)[name] === (other as Record<string, unknown>)[name],
    )
  );
}

function collectIgnored(
  object: object,
  rules: ReadonlyMap<string, Rule>,
  prefix: string,
  paths: Set<string>,
): void {
  for (const name of Object.keys(object)) {
    const rule = rules.get(name);
    const value = (object as Record<string, unknown>)[name];
    if (rule?.kind === 'ignored') {
      if (!isHarmless(value, rule)) paths.add(prefix + name);
    } else if (rule?.kind === 'honoured' && rule.inner !== undefined && typeof value === 'object') {
      const path = `${prefix}${name}.`;
      for (const one of Array.isArray(value) ? value : [value]) {
        if (typeof one === 'object' && one !== null) rule.inner.collectIgnored(one, path, paths);
      }
    }
  }
}

/** Runs a schema as zod's own objects do; `check` formats the issues once, for the whole value. */
function run(schema: z.ZodType, value: unknown, key: PropertyKey, issues: unknown[]) {
  const parsed = schema._zod.run({ value, issues: [] }, CONTEXT) as z.core.ParsePayload;
  for (const issue of parsed.issues) issues.push({ ...issue, path: [key, ...(issue.path ?? [])] });
  return { isGood: parsed.issues.length === 0, output: parsed.value };
}

/**
 * A list whose validation stops after some invalid items: a million of them in one body would block other requests for
 * seconds.
 */
export function listOf<S extends z.ZodType>(item: S, { min = 0, max }: { min?: number; max: number }) {
  const schema = z.transform((value: unknown, { issues }: Context) => {
    if (!Array.isArray(value)) issues.push({ code: 'invalid_type', expected: 'array', input: value });
    else if (value.length < min) issues.push({ code: 'too_small', minimum: min, ...LIST, input: value });
    else if (value.length > max) issues.push({ code: 'too_big', maximum: max, ...LIST, input: value });
    else return readItems(value, item, issues);
    return [];
  }) as unknown as z.ZodType<z.output<S>[]>;
  drawn.set(schema, { kind: 'list', item, min, max });
  return schema;
}
const LIST = { origin: 'array', inclusive: true };
const ISSUES_MAX = 100;

function readItems(items: readonly unknown[], schema: z.ZodType, issues: unknown[]): unknown[] {
  const outputs: unknown[] = [];
  for (let at = 0; at < items.length && issues.length < ISSUES_MAX; at++) {
    outputs.push(run(schema, items[at], at, issues).output);
  }
  return outputs;
}

function mayBeAbsent(schema: z.ZodType): boolean {
  const parsed = schema.safeParse(undefined);
  return parsed.success && parsed.data === undefined;
}
