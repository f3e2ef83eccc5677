/**
 * What the edge reads from an answer that it passes on: the time of its first bytes, the backend's figures at its end,
 * and the text if the tenant keeps texts. Otherwise only the last chunks are kept, and read when the answer is over.
 */
import { concatBytes } from '@noble/hashes/utils.js';
import { messageText } from '../../shared/wire/openai.ts';
import { parseOrNull } from '../../shared/wire/parse-body.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { retried, withDeadline } from '../base/waiting.ts';
import type { Database } from '../db/d1.ts';
import { insertTexts } from '../db/request-rows.ts';
import { TEXT_CHARS_MAX, TEXTS } from '../limits.ts';
import type { RoutableBody } from '../routing/decision.ts';
import type { Account } from './admission.ts';

export type Heard = {
  readonly firstAt_ms: number | null;
  readonly figures: AnswerFigures | null;
  /** The code of an error event in the stream, if any. */
  readonly lateError: string | null;
  /** Finish reasons of the choices that end in the last chunks. */
  readonly finishReasons: readonly string[];
  /** The `sequence_number` of the last event; null in chat and plain completions, which have none. */
  readonly sequence: number | null;
  /** Events that passed if the figures did not come; each event is at least one token. */
  readonly passed: Passed;
};

/** The backend's own counts. */
type AnswerFigures = {
  readonly prompt_tokens: number;
  readonly completion_tokens: number;
  readonly queue_ms: number | null;
  readonly prefill_ms: number | null;
  readonly decode_ms: number | null;
};

/** `texts`: events with text or arguments in the last chunks. `others`: a choice's earlier events, which were not inspected. */
type Passed = { readonly texts: number; readonly others: number };

const LINE_FEED = 0x0a;

/**
 * Kept bytes: more than the last event of any stream, and more than what follows the choices in a non-streaming answer.
 */
const TAIL_BYTES = 16 * 1024;

/** Without `stream` a decoder keeps no state, so all texts can share it. */
const utf8 = new TextDecoder();

export function hearWhole(bytes: Uint8Array): Heard {
  const text = utf8.decode(bytes.subarray(-TAIL_BYTES));
  const passed = { texts: 0, others: 0 };
  const figures = figuresIn(text);
  const finishReasons = finishReasonsIn(text);
  return { firstAt_ms: Date.now(), figures, lateError: null, finishReasons, sequence: null, passed };
}

/** The last chunks of an answer. */
export class Tail {
  #pieces: Uint8Array[] = [];
  #bytes = 0;
  /** Number of dropped chunks that ended an event; at most the number of events. */
  #dropped = 0;
  #firstAt_ms: number | null = null;

  hear(piece: Uint8Array): void {
    if (isComment(piece)) return;
    this.#firstAt_ms ??= Date.now();
    // A copy: the runtime reads each chunk into 4 kB of its own, and most events have a twentieth of that.
    const last = piece.slice(-TAIL_BYTES);
    this.#pieces.push(last);
    this.#bytes += last.length;
    while (this.#bytes - this.#pieces[0]!.length >= TAIL_BYTES) {
      const oldest = this.#pieces.shift()!;
      this.#bytes -= oldest.length;
      if (endsEvent(oldest)) this.#dropped++;
    }
  }

  /**
   * `isCut`: the answer may end anywhere. In the Responses API it repeats its request, whose schemas may have any names, those
   * of the figures too: only figures that end an event of a cut answer are the backend's.
   */
  heard({ isResponse, isCut }: { readonly isResponse: boolean; readonly isCut: boolean }): Heard {
    const text = utf8.decode(concatBytes(...this.#pieces));
    this.#pieces = [];
    const figures = figuresIn(isResponse && isCut ? (LAST_FIGURES.exec(text)?.[0] ?? '') : text);
    const others = Math.max(0, this.#dropped - (isResponse ? EVENTS_OF_NO_CHOICE : 0));
    const passed = { texts: figures === null ? textsIn(text, isResponse) : 0, others };
    const [lateError, finishReasons] = [lateErrorIn(text), finishReasonsIn(text)];
    const sequence = lastNumber('sequence_number', text);
    return { firstAt_ms: this.#firstAt_ms, figures, lateError, finishReasons, sequence, passed };
  }
}

/** With these a Responses stream begins: `response.created` and `response.in_progress`. */
const EVENTS_OF_NO_CHOICE = 2;

/** An event's end; JSON has no line feeds, so nothing inside an event looks like it. */
const LAST_FIGURES = /"maskroute":\{[^{}]*\}\}{1,2}\n\n$/;

const COLON = 0x3a;
/** Whether a chunk is a keepalive comment. */
const isComment = (chunk: Uint8Array): boolean => chunk[0] === COLON && chunk.length < 64;

const endsEvent = (piece: Uint8Array): boolean =>
  piece[piece.length - 1] === LINE_FEED && piece[piece.length - 2] === LINE_FEED;

/**
 * Counts pieces of text and of calls' arguments; quotes inside of strings are escaped, so a model's own text does not match.
 * The Responses API repeats each text when it is whole, but has `delta` in its pieces only.
 */
const textsIn = (text: string, isResponse: boolean): number =>
  text.match(isResponse ? /"delta":"(?!")/g : /"(?:content|text|arguments)":"(?!")/g)?.length ?? 0;

const finishReasonsIn = (text: string): string[] =>
  [...text.matchAll(/"finish_reason":"([a-z_]{1,32})"/g)].map(([, reason]) => reason!);

/**
 * The last number with this name in the text. The pattern matches only outside JSON strings: within strings, which the
 * model may have written, quotes are escaped.
 */
function lastNumber(name: string, text: string): number | null {
  const at = text.lastIndexOf(`"${name}":`);
  if (at === -1) return null;
  const value = Number.parseFloat(text.slice(at + name.length + 3, at + name.length + 35));
  return Number.isFinite(value) && value >= 0 ? value : null;
}

/** The last counts in the text. */
export function figuresIn(text: string): AnswerFigures | null {
  const prompt_tokens = lastNumber('prompt_tokens', text);
  const completion_tokens = lastNumber('completion_tokens', text);
  if (prompt_tokens === null || completion_tokens === null) return null;
  return {
    prompt_tokens: Math.round(prompt_tokens),
    completion_tokens: Math.round(completion_tokens),
    queue_ms: lastNumber('queue_ms', text),
    prefill_ms: lastNumber('prefill_ms', text),
    decode_ms: lastNumber('decode_ms', text),
  };
}

function lateErrorIn(text: string): string | null {
  const at = text.lastIndexOf('event: error\n');
  if (at === -1 || (at > 0 && text[at - 1] !== '\n')) return null;
  return /"code":"([a-z_]{1,64})"/.exec(text.slice(at))?.[1] ?? 'backend_error';
}

/*
 * Kept texts: prompts and answers of tenants that keep them, for a number of days. They are stored after the answer;
 * errors are only logged.
 */

/** Collects an answer's text as it passes: the isolate has 128 MB for all its answers, and events take far more than their text. */
export class AnswerText {
  readonly #decoder = new TextDecoder();
  readonly #texts: string[] = [];
  #chars = 0;
  /** The beginning of a line: of an event's data, or of a non-streaming answer, which is one. */
  #line = '';

  add(piece: Uint8Array): void {
    if (this.#chars >= TEXT_CHARS_MAX || this.#line.length >= LINE_CHARS_MAX) return;
    const lines = this.#decoder.decode(piece, { stream: true }).split('\n');
    lines[0] = this.#line + lines[0]!;
    this.#line = lines.pop()!;
    for (const line of lines) this.#read(line);
  }

  end(): string {
    this.#read(this.#line);
    return this.#texts.join('');
  }

  #read(line: string): void {
    const json = line.startsWith(DATA) ? line.slice(DATA.length) : line;
    const text = json.startsWith('{') ? textIn(json) : '';
    if (text !== '') this.#texts.push(text);
    this.#chars += text.length;
  }
}

const DATA = 'data: ';
/** A non-streaming answer has other choices and log-probabilities, too. */
const LINE_CHARS_MAX = 32 * TEXT_CHARS_MAX;
const DAY_ms = 86_400_000;

/** Never rejects. */
export function keepTexts(db: Database, account: Account, answer: AnswerText): Promise<void> {
  const { event, caller, routable } = account;
  return store(db, {
    event,
    tenant: caller.tenant,
    expiresAt_ms: Date.now() + (caller.policy.textsKept_days ?? 0) * DAY_ms,
    prompt: cut(promptOf(routable)),
    answer: cut(answer.end()),
  });
}

/** Holds only the row while D1 fails: bodies of 4 MB that wait for it would fill the isolate. */
async function store(db: Database, row: Parameters<typeof insertTexts>[1]): Promise<void> {
  const insert = () => withDeadline(insertTexts(db, row), TEXTS.insert_ms, 'keeping texts');
  await retried(TEXTS.delays_ms, insert).catch((error) => {
    log('error', 'texts_not_kept', { request_event: row.event, reason: reasonOf(error) });
  });
}

const encoder = new TextEncoder();
/** Through bytes, since a part of a string keeps the whole string in memory. */
const cut = (text: string): string => utf8.decode(encoder.encode(text.slice(0, TEXT_CHARS_MAX)));

function promptOf(routable: RoutableBody): string {
  if (routable.kind === 'chat') {
    return routable.body.messages.map((message) => `${message.role}: ${messageText(message)}`).join('\n');
  }
  const { prompt } = routable.body;
  return typeof prompt === 'string' ? prompt : JSON.stringify(prompt);
}

type Choice = {
  index?: unknown;
  message?: { content?: unknown };
  delta?: { content?: unknown };
  text?: unknown;
};
/** The Responses API: a non-streaming answer, or an event of a stream. */
type Response = {
  object?: unknown;
  output?: { content?: { text?: unknown }[] }[];
  type?: unknown;
  delta?: unknown;
};

/** The first choice's text, in an event of a stream or a non-streaming answer. */
function textIn(json: string): string {
  const parsed = parseOrNull(json) as ({ choices?: (Choice | null)[] } & Response) | null;
  // The answer, or its last event, was truncated.
  if (parsed === null) return '';
  if (parsed.object === 'response') {
    const parts = (parsed.output ?? []).flatMap(({ content }) => content ?? []);
    return parts.map(({ text }) => (typeof text === 'string' ? text : '')).join('');
  }
  if (parsed.type === 'response.output_text.delta') {
    return typeof parsed.delta === 'string' ? parsed.delta : '';
  }
  // An event of a stream has one choice, and choices alternate.
  const choice = parsed.choices?.find((one) => one?.index === 0);
  const text = choice?.delta?.content ?? choice?.message?.content ?? choice?.text;
  return typeof text === 'string' ? text : '';
}
