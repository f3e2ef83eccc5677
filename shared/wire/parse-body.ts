/**
 * Parses and checks bodies, and formats validation errors. Edge, backend and command line use the same wording: a
 * message names every wrong field with its allowed values, and never quotes the client's input at length.
 */
import type { z } from 'zod';
import { type ErrorCode, MaskrouteError } from './errors.ts';

/** @throws MaskrouteError `invalid_json`, or `invalid_request` with the field for a number that JSON does not have. */
export function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    // Some clients write NaN and Infinity; the error names the field.
    const field = /"(\w{1,64})"\s*:\s*-?(NaN|Infinity)\b/.exec(text);
    if (field !== null) {
      throw new MaskrouteError('invalid_request', `${field[1]}: ${field[2]} is not a JSON number.`, {
        param: field[1]!,
      });
    }
    const where = /position \d+/.exec((cause as Error).message)?.[0];
    const detail = text === '' ? 'it is empty' : `it breaks off${where === undefined ? '' : ` at ${where}`}`;
    throw new MaskrouteError('invalid_json', `The body is not valid JSON: ${detail}.`, { cause });
  }
}

/** Whether a value is nested at most `depth` levels deep, so that recursion over it is safe. */
export const isNestedWithin = (value: unknown, depth: number): boolean =>
  typeof value !== 'object' ||
  value === null ||
  (depth > 0 && Object.values(value).every((one) => isNestedWithin(one, depth - 1)));

/** @throws MaskrouteError `code`, with every wrong field in its message and the path of the first as `param`. */
export function parse<T extends z.ZodType>(
  schema: T,
  value: unknown,
  code: ErrorCode = 'invalid_request',
): z.output<T> {
  const checked = check(schema, value);
  if (checked.kind === 'good') return checked.value;
  const { message, param } = checked;
  throw new MaskrouteError(code, message.endsWith('?') ? message : `${message}.`, { param });
}

type Checked<T> =
  | { readonly kind: 'good'; readonly value: T }
  /** `message`: without a final period. `param`: the path of the first wrong field; null for the value as a whole. */
  | { readonly kind: 'bad'; readonly message: string; readonly param: string | null };

/** @param whole the name of the value, for errors about the value as a whole. */
export function check<T extends z.ZodType>(
  schema: T,
  value: unknown,
  whole = 'the body',
): Checked<z.output<T>> {
  const parsed = schema.safeParse(value, { error: words });
  return parsed.success
    ? { kind: 'good', value: parsed.data }
    : { kind: 'bad', ...describe(parsed.error, whole) };
}

const FIELDS_MAX = 10;
const MESSAGE_CHARS_MAX = 2000;
const FAULT_CHARS_MAX = 400;
const PATH_CHARS_MAX = 120;
const KEY_CHARS_MAX = 64;
const ECHO_CHARS_MAX = 40;

function describe(error: z.ZodError, whole: string): { message: string; param: string | null } {
  const faults = faultsOf(error.issues as readonly Issue[], []);
  const texts: string[] = [];
  const said = new Set<string>();
  let chars = 0;
  for (const { path, message, again = message, known } of faults.slice(0, FIELDS_MAX)) {
    const name = formatPath(path);
    const meant = known === undefined ? '' : hint(String(path.at(-1)), known);
    const reason = said.has(message) ? again : message;
    said.add(message);
    const text = cut(`${name === '' ? whole : name}: ${reason}${meant}`, FAULT_CHARS_MAX);
    chars += text.length + 2;
    if (chars > MESSAGE_CHARS_MAX) break;
    texts.push(text);
  }
  const left = faults.length - texts.length;
  const more = left === 0 ? '' : `; and ${left} more`;
  const param = formatPath(faults[0]!.path);
  return { message: `${texts.join('; ')}${more}`, param: param === '' ? null : param };
}

/** Zod's issue, with the addition of `checkedObject`. */
type Issue = z.core.$ZodIssue & { readonly known?: Iterable<string> };
type Fault = {
  readonly path: readonly PropertyKey[];
  readonly message: string;
  /** Valid names that the last name of the path may be a misspelling of. */
  readonly known?: Iterable<string> | undefined;
  /** In place of a message that another fault has said: valid fields are listed once. */
  readonly again?: string;
};

function faultsOf(issues: readonly Issue[], base: readonly PropertyKey[]): Fault[] {
  return issues.flatMap((issue): Fault[] => {
    const path = [...base, ...issue.path];
    switch (issue.code) {
      case 'unrecognized_keys':
        return issue.keys.map((key) => ({
          path: [...path, key],
          message: issue.message,
          known: issue.known,
          again: UNKNOWN_FIELD,
        }));
      case 'invalid_union':
        return unionFaults(issue, path);
      case 'invalid_key':
        return faultsOf(issue.issues.slice(0, 1), path);
      default:
        return [{ path, message: issue.message }];
    }
  });
}

/** Faults of a union: those of the member that the value is closest to, or all members if it resembles none. */
function unionFaults(issue: z.core.$ZodIssueInvalidUnion, path: readonly PropertyKey[]): Fault[] {
  const forms = issue.errors.filter((form) => form.length > 0);
  const near = forms.filter((form) => !form.some(isOfAnotherKind)).map((form) => faultsOf(form, path));
  if (near.length === 0) return [{ path, message: alternatives(issue.message, forms) }];
  const sized = forms.find((form) => form.every(isOfAnotherSize));
  if (sized !== undefined) return faultsOf(sized, path);
  const best = near.reduce((a, b) => (isFurther(b[0]!.path, a[0]!.path) ? b : a));
  const tied = near.filter(([first]) => !isFurther(best[0]!.path, first!.path));
  if (tied.length === 1) return best;
  const same = tied.every(([first]) => formatPath(first!.path) === formatPath(best[0]!.path));
  if ((!same || best[0]!.path.length === path.length) && issue.message !== NO_FORM) {
    return [{ path, message: issue.message }];
  }
  const texts = tied.map(([first]) => {
    const below = formatPath(first!.path.slice(path.length));
    return same || below === '' ? first!.message : `${below} ${first!.message}`;
  });
  return [{ path: same ? best[0]!.path : path, message: [...new Set(texts)].join(', or ') }];
}

/** Whether the value's only fault is its size. */
const isOfAnotherSize = ({ path, code }: z.core.$ZodIssue): boolean =>
  path.length === 0 && (code === 'too_big' || code === 'too_small');

const isOfAnotherKind = ({ path, code }: z.core.$ZodIssue): boolean =>
  path.length === 0 && (code === 'invalid_type' || code === 'invalid_value');

function alternatives(message: string, forms: readonly (readonly z.core.$ZodIssue[])[]): string {
  const said = forms.map(([first]) =>
    /^(?:it is missing, )?expected (.*?)(, got .*)?$/s.exec(first!.message),
  );
  const got = said[0]?.[2] ?? '';
  if (message !== NO_FORM) return `${message}${got}`;
  const kinds = new Set(said.flatMap((match) => match?.[1] ?? []));
  return kinds.size === 0 ? message : `expected ${[...kinds].join(' or ')}${got}`;
}

/** Whether parsing got further before it failed: deeper, or later in a list. */
function isFurther(path: readonly PropertyKey[], than: readonly PropertyKey[]): boolean {
  for (let at = 0; at < Math.min(path.length, than.length); at++) {
    const [a, b] = [path[at], than[at]];
    if (typeof a === 'number' && typeof b === 'number' && a !== b) return a > b;
    if (a !== b) break;
  }
  return path.length > than.length;
}

/** `messages[0].content`, as OpenAI writes it. */
function formatPath(path: readonly PropertyKey[]): string {
  const text = path.reduce<string>((before, key) => {
    if (typeof key === 'number') return `${before}[${key}]`;
    const name = cut(String(key), KEY_CHARS_MAX);
    return before === '' ? name : `${before}.${name}`;
  }, '');
  return cut(text, PATH_CHARS_MAX);
}

const cut = (text: string, chars: number): string =>
  text.length <= chars ? text : `${text.slice(0, chars - 1).toWellFormed()}…`;

const UNKNOWN_FIELD = 'there is no such field here';
const NO_FORM = 'has none of the forms that it may have';

/** The message after a field's name; a schema's own message takes precedence. */
export const words: z.core.$ZodErrorMap = (issue) => {
  switch (issue.code) {
    case 'invalid_type':
      return issue.input === undefined
        ? `it is missing, expected ${kindName(issue)}`
        : `expected ${kindName(issue)}, got ${kindOf(issue.input)}`;
    case 'invalid_value':
      return `expected ${issue.values.length === 1 ? '' : 'one of '}${issue.values.map(quote).join(', ')}, got ${kindOf(issue.input)}`;
    case 'too_small':
      return `expected ${bound(issue.inclusive === false ? 'more than' : 'at least', issue.minimum, issue.origin)}`;
    case 'too_big':
      return `expected ${bound(issue.inclusive === false ? 'less than' : 'at most', issue.maximum, issue.origin)}`;
    case 'invalid_format':
      return `expected ${FORMATS[issue.format ?? ''] ?? `text of the form ${issue.pattern ?? issue.format}`}`;
    case 'unrecognized_keys':
      return `${UNKNOWN_FIELD}${knownFields(issue.inst)}`;
    case 'invalid_union':
      return NO_FORM;
    case 'not_multiple_of':
      return `expected a multiple of ${issue.divisor}`;
    default:
      return 'it cannot be this';
  }
};

const KINDS: Record<string, string> = {
  string: 'a string',
  number: 'a number',
  int: 'a whole number',
  boolean: 'true or false',
  object: 'an object',
  record: 'an object',
  array: 'a list',
  null: 'null',
};
function kindName({ expected, inst }: { readonly expected: string; readonly inst?: unknown }): string {
  // For integers, too, zod names the expected kind "number".
  const isWhole =
    (inst as { _zod?: { def: { format?: string } } } | undefined)?._zod?.def.format === 'safeint';
  const kind = isWhole ? 'int' : expected;
  return KINDS[kind] ?? kind;
}

function kindOf(value: unknown): string {
  if (value === undefined) return 'nothing';
  if (value === null) return 'null';
  // NaN comes from a query or a variable that is not a number; JSON has no NaN.
  if (Number.isNaN(value)) return 'other text';
  if (Array.isArray(value)) return 'a list';
  if (typeof value === 'string') {
    return value.length <= ECHO_CHARS_MAX ? quote(value.toWellFormed()) : 'a longer string';
  }
  return typeof value === 'object' ? 'an object' : String(value);
}

const quote = (value: unknown): string => (typeof value === 'string' ? JSON.stringify(value) : String(value));

function bound(relation: string, limit: number | bigint, origin: string): string {
  const unit = { string: 'character', array: 'item', object: 'field' }[origin];
  return `${relation} ${limit}${unit === undefined ? '' : ` ${unit}${limit === 1 ? '' : 's'}`}`;
}

const FORMATS: Record<string, string> = {
  datetime: 'a time such as 2026-01-31T12:00:00Z',
  date: 'a date such as 2026-01-31',
  url: 'an address',
};

function knownFields(schema: unknown): string {
  const shape = (schema as z.ZodObject | undefined)?._zod.def.shape;
  return shape === undefined ? '' : `, only ${Object.keys(shape).join(', ')}`;
}

/** A suggestion: the known name closest to `name`, if it is close enough to be a typing error. */
function hint(name: string, known: Iterable<string>): string {
  let nearest: { name: string; edits: number } | undefined;
  for (const candidate of known) {
    const allowed = Math.min(3, Math.floor(candidate.length / 3));
    if (Math.abs(candidate.length - name.length) > allowed) continue;
    const count = edits(name.toLowerCase(), candidate);
    if (count <= allowed && count < (nearest?.edits ?? Number.POSITIVE_INFINITY)) {
      nearest = { name: candidate, edits: count };
    }
  }
  return nearest === undefined ? '' : `; did you mean \`${nearest.name}\`?`;
}

/** Levenshtein distance. Camel case instead of snake case costs one edit a word, so it is suggested, too. */
function edits(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const swap = row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(swap, row[j]! + 1, next[j - 1]! + 1));
    }
    row = next;
  }
  return row[b.length]!;
}

/* Bodies of unknown size. */

export class TooLargeError extends Error {}

/**
 * A body's chunks as they come. A caller that stops early leaves the rest unread, without cancelling the stream: a
 * client may finish sending a refused body and then read the error. @throws TooLargeError past `bytesMax`, and what the
 * stream throws.
 */
export async function* piecesOf(
  body: ReadableStream<Uint8Array> | null,
  bytesMax: number,
): AsyncGenerator<Uint8Array, void, void> {
  if (body === null) return;
  let bytes = 0;
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      bytes += value.length;
      if (bytes > bytesMax) throw new TooLargeError(`the body has more than ${bytesMax} bytes`);
      yield value;
    }
  } finally {
    reader.releaseLock();
  }
}

/** The body as UTF-8 text. @throws as `piecesOf`, TypeError on invalid UTF-8. */
export async function readBounded(
  body: ReadableStream<Uint8Array> | null,
  bytesMax: number,
): Promise<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: false });
  let text = '';
  for await (const piece of piecesOf(body, bytesMax)) text += decoder.decode(piece, { stream: true });
  return text + decoder.decode();
}

/** The same for a response. If it is not read to its end it is cancelled, which frees its connection. */
export async function readAnswer({ body }: Pick<Response, 'body'>, bytesMax: number): Promise<string> {
  try {
    return await readBounded(body, bytesMax);
  } catch (error) {
    await body?.cancel().catch(() => {});
    throw error;
  }
}

/** Refuses compressed bodies, which are not unpacked here. @throws MaskrouteError `unsupported_media_type`. */
export function requireUnpacked(headers: Headers): void {
  const encoding = headers.get('content-encoding');
  if (encoding === null || encoding.trim().toLowerCase() === 'identity') return;
  throw new MaskrouteError(
    'unsupported_media_type',
    'Send the body as it is: compressed bodies (content-encoding) are not unpacked.',
  );
}

/** Whether a JSON value is an object: neither a list nor null. */
export const isJsonObject = (json: unknown): json is Readonly<Record<string, unknown>> =>
  typeof json === 'object' && json !== null && !Array.isArray(json);

/** Parses JSON from elsewhere; null for invalid JSON, which all our schemas refuse. */
export function parseOrNull(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
