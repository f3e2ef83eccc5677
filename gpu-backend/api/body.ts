/**
 * A request's body, from bytes to a checked value: bounded before it is read, strict UTF-8, JSON, schema.
 * Every way to fail names its reason and, where there is one, the field.
 */
import type { z } from 'zod';
import { MaskrouteError } from '../../shared/errors.ts';

/** @throws MaskrouteError `unsupported_media_type`, `body_too_large`, `invalid_json` or `invalid_request`. */
export async function readJson<Schema extends z.ZodType>(
  request: Request,
  schema: Schema,
  bytesMax: number,
): Promise<z.infer<Schema>> {
  requireJsonType(request.headers.get('content-type'));
  const bytes = await readBounded(request, bytesMax);
  const parsed = schema.safeParse(parseJson(decodeUtf8(bytes)));
  if (parsed.success) return parsed.data;
  throw invalidField(parsed.error);
}

function requireJsonType(contentType: string | null): void {
  const [type, ...parameters] = (contentType ?? '').toLowerCase().split(';');
  const charset = parameters.map((text) => text.trim()).find((text) => text.startsWith('charset='));
  const utf8 = charset === undefined || /^charset="?utf-?8"?$/.test(charset);
  if (type?.trim() === 'application/json' && utf8) return;
  throw new MaskrouteError('unsupported_media_type', 'Send `content-type: application/json` in UTF-8.');
}

async function readBounded(request: Request, bytesMax: number): Promise<Uint8Array> {
  const tooLarge = () =>
    new MaskrouteError('body_too_large', `The body is over the limit of ${bytesMax} bytes.`);
  if (Number(request.headers.get('content-length') ?? 0) > bytesMax) throw tooLarge();
  const chunks: Uint8Array[] = [];
  let length = 0;
  // A reader, not `for await`: leaving the loop would cancel the upload before the answer is sent.
  const reader = request.body?.getReader();
  while (reader !== undefined) {
    const { done, value } = await readChunk(reader);
    if (done) break;
    length += value.byteLength;
    if (length > bytesMax) throw tooLarge();
    chunks.push(value);
  }
  return Buffer.concat(chunks, length);
}

async function readChunk(reader: ReadableStreamDefaultReader<Uint8Array>) {
  try {
    return await reader.read();
  } catch (cause) {
    throw new MaskrouteError('cancelled', 'The connection closed before the body was whole.', { cause });
  }
}

function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new MaskrouteError('invalid_json', 'The body is not valid UTF-8.', { cause });
  }
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    // Some clients write NaN and Infinity, which JSON does not have; name the field that holds one.
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

/** The deepest first problem: of a union, the branch that got furthest. */
function invalidField(error: z.ZodError): MaskrouteError {
  const { path, message } = firstIssue(error.issues, []);
  const param = path.length === 0 ? null : formatPath(path);
  return new MaskrouteError('invalid_request', `${param === null ? '' : `${param}: `}${message}.`, { param });
}

type Issue = { readonly path: PropertyKey[]; readonly message: string };

function firstIssue(issues: readonly z.core.$ZodIssue[], base: readonly PropertyKey[]): Issue {
  const issue = issues[0]!;
  const path = [...base, ...issue.path];
  if (issue.code !== 'invalid_union') return { path, message: issue.message };
  const branches = issue.errors.filter((branch) => branch.length > 0);
  const inner = branches.map((branch) => firstIssue(branch, path));
  const deepest = inner.reduce<Issue | undefined>(
    (best, next) => (best === undefined || next.path.length > best.path.length ? next : best),
    undefined,
  );
  if (deepest !== undefined && deepest.path.length > path.length) return deepest;
  return { path, message: inner.map((option) => option.message).join(', or ') || issue.message };
}

/** `messages[0].content`, as OpenAI writes it. */
const formatPath = (path: readonly PropertyKey[]): string =>
  path.reduce<string>(
    (text, key) =>
      typeof key === 'number' ? `${text}[${key}]` : text === '' ? String(key) : `${text}.${String(key)}`,
    '',
  );
