/**
 * Calibration data from JSONL files, in the common forms of rows. A row becomes a short conversation (to be rendered
 * through the model's chat template) or a plain text, with the text that the edge would route it by: if the two sides
 * saw different prompts, clusters would mean nothing.
 */
import { createHash } from 'node:crypto';
import type { FileHandle } from 'node:fs/promises';
import { basename } from 'node:path';
import { z } from 'zod';
import { chatRouteText, completionRouteText } from '../../../shared/embedding/encoder.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { messageText, type ToolCall, toolCallSchema } from '../../../shared/wire/openai.ts';
import { check, isJsonObject } from '../../../shared/wire/parse-body.ts';
import { finishInTurns } from '../../event-loop.ts';
import { openRegular, unreadable } from '../../files.ts';

const ROW_CHARS_MAX = 4_000_000;
const ROW_COUNT_MAX = 5_000_000;

export type Turn = {
  readonly role: 'system' | 'user' | 'assistant' | 'tool';
  readonly content: string;
  readonly tool_calls?: ToolCall[] | undefined;
  readonly tool_call_id?: string | undefined;
};
export type CalibrationRow = {
  /** The row's own `kind`, or the file's name without its extension; reports count clusters by kind. */
  readonly kind: string;
  /** What the edge would embed for this request. */
  readonly routeText: string;
  readonly content:
    | { readonly type: 'chat'; readonly turns: readonly Turn[] }
    | { readonly type: 'text'; readonly text: string };
};

const text = z.string();
const role = z.enum(['system', 'developer', 'user', 'assistant', 'tool']);
/** A string, or content parts as OpenAI's clients send them. */
const messageContent = z.union([text, z.array(z.looseObject({ type: z.literal('text'), text }))]);
const hasAny = <T>(list: readonly T[] | null | undefined): list is readonly T[] => (list?.length ?? 0) > 0;
/** Only a message that calls tools may have no text: others without are misspelt. */
const message = z
  .looseObject({
    role,
    content: messageContent.nullish(),
    tool_calls: z.array(toolCallSchema).nullish(),
    tool_call_id: text.nullish(),
  })
  .refine(({ content, tool_calls }) => content != null || hasAny(tool_calls), {
    path: ['content'],
    error: 'expected a string or a list',
  });
const withKind = { kind: z.string().min(1).max(100).optional() };
const FORMS = {
  messages: z.looseObject({
    ...withKind,
    messages: z.array(message).min(1),
  }),
  prompt: z.looseObject({ ...withKind, prompt: text, completion: text }),
  question: z.looseObject({ ...withKind, question: text, answer: text }),
  instruction: z.looseObject({
    ...withKind,
    instruction: text,
    input: text.nullish(),
    output: text,
  }),
  text: z.looseObject({ ...withKind, text }),
} as const;
type Form = keyof typeof FORMS;
/** Fields that a row of each form must have; the first is the form's name. */
const FIELDS: Readonly<Record<Form, readonly string[]>> = {
  messages: ['messages'],
  prompt: ['prompt', 'completion'],
  question: ['question', 'answer'],
  instruction: ['instruction', 'output'],
  text: ['text'],
};
const FORM_NAMES = 'messages, prompt + completion, question + answer, instruction + output, or text';

export type DataFiles = {
  readonly files: readonly string[];
  /** Rows taken from each file. */
  readonly rowsMax?: number | undefined;
};

/**
 * Rows without a text to route them by are left out.
 * @param rowsMax rows taken from each file, from its start.
 * @throws the signal's reason when it aborts, and MaskrouteError `invalid_data` with file and line of the first row that is wrong,
 * or when nothing is left.
 */
export async function readData(
  paths: readonly string[],
  rowsMax?: number,
  signal?: AbortSignal,
): Promise<CalibrationRow[]> {
  const { rows } = await readRows(paths, { rowsMax, signal });
  requireRows(rows, paths);
  return rows;
}

/** What {@link readData} reads, each distinct row once: repeated rows must not count twice. `log` is told what is left out. */
export async function readDistinct(
  { files, rowsMax }: DataFiles,
  { log, signal }: { readonly log: (line: string) => void; readonly signal?: AbortSignal | undefined },
): Promise<CalibrationRow[]> {
  const { rows, empty } = await readRows(files, { rowsMax, signal });
  requireRows(rows, files);
  const distinct = await finishInTurns(distinctRows(rows), signal);
  const [all, repeated] = [rows.length + empty, rows.length - distinct.length];
  const leftOut = empty + repeated;
  if (leftOut > 0)
    log(`Of ${all} rows ${leftOut} are left out: ${empty} without a prompt, ${repeated} repeated.`);
  return distinct;
}

/** In steps, as {@link divideRows}. */
export function* distinctRows(rows: readonly CalibrationRow[]): Generator<void, CalibrationRow[]> {
  const seen = new Set<string>();
  const [distinct] = yield* divideRows(rows, ({ content }) => {
    const digest = createHash('sha256').update(JSON.stringify(content)).digest('base64');
    if (seen.has(digest)) return false;
    seen.add(digest);
    return true;
  });
  return distinct;
}

/** Rows that are hashed in one step: some hundredths of a second. */
const ROWS_A_STEP = 4096;

/** The rows for which `isFirst` holds, and the others. In steps: hashing millions of rows takes seconds. */
export function* divideRows(
  rows: readonly CalibrationRow[],
  isFirst: (row: CalibrationRow) => boolean,
): Generator<void, readonly [first: CalibrationRow[], others: CalibrationRow[]]> {
  const [first, others]: CalibrationRow[][] = [[], []];
  for (const [i, row] of rows.entries()) {
    if (i % ROWS_A_STEP === 0) yield;
    (isFirst(row) ? first : others)!.push(row);
  }
  return [first!, others!];
}

function requireRows(rows: readonly CalibrationRow[], paths: readonly string[]): void {
  if (rows.length > 0) return;
  throw new MaskrouteError(
    'invalid_data',
    `There is no row with a prompt in ${paths.join(', ') || 'no file'}.`,
  );
}

type ReadOptions = {
  /** Rows taken from each file, from its start. */
  readonly rowsMax?: number | undefined;
  /** Whether to read the next of them; the others are not even parsed. */
  readonly reads?: () => boolean;
  readonly signal?: AbortSignal | undefined;
};

/** The rows with a prompt, and how many have none. @throws as {@link readData}, but not when no row has a prompt. */
export async function readRows(
  paths: readonly string[],
  { rowsMax = ROW_COUNT_MAX, reads = () => true, signal }: ReadOptions,
): Promise<{ readonly rows: CalibrationRow[]; readonly empty: number }> {
  const rows: CalibrationRow[] = [];
  let empty = 0;
  for (const path of paths) {
    let taken = 0;
    for await (const line of readLines(path, ROW_CHARS_MAX)) {
      signal?.throwIfAborted();
      if (line.text.trim() === '') continue;
      if (taken++ >= rowsMax) break;
      if (!reads()) continue;
      const row = parseRow(line.text, kindOf(path), `${path}:${line.number}`);
      if (row.routeText === '') empty++;
      else rows.push(row);
      if (rows.length > ROW_COUNT_MAX) {
        throw new MaskrouteError('invalid_data', `The data has more than ${ROW_COUNT_MAX} rows.`);
      }
    }
  }
  return { rows, empty };
}

/** Bytes and lines of what {@link readData} reads. */
export type DataSize = { readonly bytes: number; readonly lines: number };

/** Counts without parsing: reading takes seconds where this takes tenths. @throws MaskrouteError as {@link readLines}. */
export async function sizeOfData({ files, rowsMax = ROW_COUNT_MAX }: DataFiles): Promise<DataSize> {
  let [bytes, lines] = [0, 0];
  for (const path of files) {
    let own = 0;
    for await (const chunk of (await openData(path)).createReadStream({ highWaterMark: 1 << 20 })) {
      if (own >= rowsMax) break;
      bytes += (chunk as Buffer).length;
      for (let at = -1; ; own++) {
        at = (chunk as Buffer).indexOf(NEWLINE, at + 1);
        if (at === -1) break;
      }
    }
    lines += Math.min(own, rowsMax);
  }
  return { bytes, lines };
}

const NEWLINE = 0x0a;

/** Parses one JSONL line. `where` (`file:line`) begins every error message. */
export function parseRow(line: string, fileKind: string, where: string): CalibrationRow {
  const fail = (reason: string) => new MaskrouteError('invalid_data', `${where}: ${reason}`);
  let json: unknown;
  try {
    json = JSON.parse(line);
  } catch (error) {
    throw fail(`the line is not JSON (${(error as Error).message})`);
  }
  if (!isJsonObject(json)) throw fail('the line is not an object');
  const form = formOf(json);
  if (form === undefined) {
    throw fail(`the row has none of the known forms (${FORM_NAMES}); it has ${Object.keys(json).join(', ')}`);
  }
  const checked = check(FORMS[form], json, 'the row');
  if (checked.kind === 'bad') throw fail(checked.message);
  const content = toContent(form, json);
  return { kind: checked.value.kind ?? fileKind, routeText: routeText(content), content };
}

/**
 * The first form whose fields are all present; otherwise, for the error message, the first form that the row has a
 * field of.
 */
function formOf(row: object): Form | undefined {
  const forms = Object.keys(FORMS) as Form[];
  return (
    forms.find((form) => FIELDS[form].every((field) => field in row)) ?? forms.find((form) => form in row)
  );
}

/** `row` has passed the schema of `form`. */
function toContent(form: Form, row: object): CalibrationRow['content'] {
  switch (form) {
    case 'messages': {
      const { messages } = row as z.infer<typeof FORMS.messages>;
      const turns = messages.map(({ role, content, tool_calls, tool_call_id }) => ({
        role: role === 'developer' ? ('system' as const) : role,
        content: messageText({ role, content }),
        tool_calls: hasAny(tool_calls) ? tool_calls : undefined,
        tool_call_id: tool_call_id ?? undefined,
      }));
      return { type: 'chat', turns };
    }
    case 'prompt': {
      const { prompt, completion } = row as z.infer<typeof FORMS.prompt>;
      return exchange(prompt, completion);
    }
    case 'question': {
      const { question, answer } = row as z.infer<typeof FORMS.question>;
      return exchange(question, answer);
    }
    case 'instruction': {
      const { instruction, input, output } = row as z.infer<typeof FORMS.instruction>;
      return exchange(input ? `${instruction}\n\n${input}` : instruction, output);
    }
    case 'text':
      return { type: 'text', text: (row as z.infer<typeof FORMS.text>).text };
  }
}

function exchange(user: string, assistant: string): CalibrationRow['content'] {
  const turns: Turn[] = [{ role: 'user', content: user }];
  if (assistant !== '') turns.push({ role: 'assistant', content: assistant });
  return { type: 'chat', turns };
}

const routeText = (content: CalibrationRow['content']): string =>
  content.type === 'chat'
    ? chatRouteText({ messages: content.turns.map((turn) => ({ ...turn })) })
    : (completionRouteText({ prompt: content.text }) ?? '');

const kindOf = (path: string): string => basename(path).replace(/\.[^.]*$/, '') || basename(path);

type Line = { readonly number: number; readonly text: string };

/**
 * Lines of a UTF-8 text file, one at a time, without a byte order mark.
 * @throws MaskrouteError `invalid_data`, naming file and line, when a line is not UTF-8 or too long; `invalid_argument`
 * when the file is unreadable or not a regular file.
 */
export async function* readLines(path: string, charsMax: number): AsyncGenerator<Line> {
  const decoder = new TextDecoder('utf-8', { fatal: true });
  let number = 1;
  let rest = '';
  const fail = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_data', `${path}:${number}: ${reason}`, { cause });
  const decode = (chunk?: Uint8Array): string => {
    try {
      return chunk === undefined ? decoder.decode() : decoder.decode(chunk, { stream: true });
    } catch (cause) {
      throw fail('the text at or after this line is not UTF-8', cause);
    }
  };
  const file = await openData(path);
  const stream = file.createReadStream({ highWaterMark: 1 << 16 });
  try {
    for await (const chunk of stream) {
      const pieces = (rest + decode(chunk as Uint8Array)).split('\n');
      rest = pieces.pop()!;
      for (const text of pieces) {
        if (text.length > charsMax) throw fail(`the line is longer than ${charsMax} characters`);
        yield { number: number++, text: text.replace(/\r$/, '') };
      }
      if (rest.length > charsMax) throw fail(`the line is longer than ${charsMax} characters`);
    }
    rest += decode();
    if (rest !== '') yield { number, text: rest };
  } catch (error) {
    throw unreadable(path, error);
  } finally {
    stream.destroy();
  }
}

/**
 * Checks that all files can be read, before any work begins. @throws MaskrouteError as {@link readLines} when it opens
 * a file.
 */
export async function requireFiles(paths: readonly string[]): Promise<void> {
  for (const path of paths) await (await openData(path)).close();
}

const openData = (path: string): Promise<FileHandle> =>
  openRegular(path).catch((error: unknown) => {
    throw unreadable(path, error);
  });
