/**
 * What the edge reads of an answer as it passes: when its first bytes came, at its end the backend's figures of its cost,
 * and its text, where the tenant has texts kept. Of an answer whose text is not kept only the last pieces stay, and are read
 * once it is over.
 */
import { messageText } from '../../shared/wire/openai.ts';
import { parseOrNull } from '../../shared/wire/parse-body.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import type { Database } from '../db/d1.ts';
import { insertTexts } from '../db/request-rows.ts';
import { TEXT_CHARS_MAX } from '../limits.ts';
import type { RoutableBody } from '../routing/decision.ts';
import type { Account } from './admission.ts';

export type Heard = {
  readonly firstAt_ms: number | null;
  readonly figures: AnswerFigures | null;
  /** The code of an error event in the stream. */
  readonly lateError: string | null;
  /** Of the choices whose end is among the last pieces. */
  readonly finishReasons: readonly string[];
  /** The number of the last event, which only events of the newer wire have. */
  readonly sequence: number | null;
  /** What passed of an answer whose figures did not: each event is a token at least. */
  readonly passed: Passed;
};

/** As the backend counted. */
type AnswerFigures = {
  readonly prompt_tokens: number;
  readonly completion_tokens: number;
  readonly queue_ms: number | null;
  readonly prefill_ms: number | null;
  readonly decode_ms: number | null;
};

/** `texts`: events with text among the last. `others`: of the earlier ones, which nobody looked into. */
type Passed = { readonly texts: number; readonly others: number };

const LINE_FEED = 0x0a;

/** More than the last event of any stream, and than what follows the choices of a whole answer. */
const TAIL_BYTES = 16 * 1024;

/** Without `stream` it keeps nothing from one text to the next. */
const utf8 = new TextDecoder();

export function hearWhole(bytes: Uint8Array): Heard {
  const text = utf8.decode(bytes.subarray(-TAIL_BYTES));
  const passed = { texts: 0, others: 0 };
  const figures = figuresIn(text);
  const finishReasons = finishReasonsIn(text);
  return { firstAt_ms: Date.now(), figures, lateError: null, finishReasons, sequence: null, passed };
}

/** The last pieces of an answer that passes. */
export class Tail {
  #pieces: Uint8Array[] = [];
  #bytes = 0;
  /** Pieces that are kept no more and ended with an event: at most as many as there were events. */
  #dropped = 0;
  #firstAt_ms: number | null = null;

  hear(piece: Uint8Array): void {
    if (isComment(piece)) return;
    this.#firstAt_ms ??= Date.now();
    this.#pieces.push(piece);
    this.#bytes += piece.length;
    while (this.#bytes - this.#pieces[0]!.length >= TAIL_BYTES) {
      const oldest = this.#pieces.shift()!;
      this.#bytes -= oldest.length;
      if (endsEvent(oldest)) this.#dropped++;
    }
  }

  heard(): Heard {
    const text = utf8.decode(join(this.#pieces));
    this.#pieces = [];
    const figures = figuresIn(text);
    const passed = { texts: figures === null ? textsIn(text) : 0, others: this.#dropped };
    const [lateError, finishReasons] = [lateErrorIn(text), finishReasonsIn(text)];
    const sequence = lastNumber('sequence_number', text);
    return { firstAt_ms: this.#firstAt_ms, figures, lateError, finishReasons, sequence, passed };
  }
}

const COLON = 0x3a;
/** A keepalive says nothing of the answer. */
const isComment = (chunk: Uint8Array): boolean => chunk[0] === COLON && chunk.length < 64;

const endsEvent = (piece: Uint8Array): boolean =>
  piece[piece.length - 1] === LINE_FEED && piece[piece.length - 2] === LINE_FEED;

/** As for the figures: a quote that a model wrote is escaped. */
const textsIn = (text: string): number => text.match(/"(?:content|text|delta)":"(?!")/g)?.length ?? 0;

const finishReasonsIn = (text: string): string[] =>
  [...text.matchAll(/"finish_reason":"([a-z_]{1,32})"/g)].map(([, reason]) => reason!);

/**
 * The last number of this name in the text, looked for as it stands in JSON outside of strings: inside of one, which a
 * model may have written, the quotes are escaped.
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

/** One array of them all. */
export function join(parts: readonly Uint8Array[]): Uint8Array {
  if (parts.length === 1) return parts[0]!;
  const whole = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let offset = 0;
  for (const part of parts) {
    whole.set(part, offset);
    offset += part.length;
  }
  return whole;
}

/*
 * The texts: prompts and answers of tenants that have them kept, for as many days as they said.
 * They are written behind the answer, and what cannot be written is a line in the log.
 */

/** The beginning of an answer's bytes, as they passed: events cost more bytes than the text in them. */
export class AnswerBytes {
  readonly #pieces: Uint8Array[] = [];
  #bytes = 0;

  add(piece: Uint8Array): void {
    if (this.#bytes >= EVENT_BYTES_MAX) return;
    this.#pieces.push(piece);
    this.#bytes += piece.length;
  }

  text(): string {
    return utf8.decode(join(this.#pieces));
  }
}

const EVENT_BYTES_MAX = 32 * TEXT_CHARS_MAX;
const DAY_ms = 86_400_000;

/** Never rejects. */
export async function keepTexts(db: Database, account: Account, answer: AnswerBytes): Promise<void> {
  const { event, caller, routable } = account;
  const row = {
    event,
    tenant: caller.tenant,
    expiresAt_ms: Date.now() + (caller.policy.textsKept_days ?? 0) * DAY_ms,
    prompt: promptOf(routable).slice(0, TEXT_CHARS_MAX),
    answer: answerOf(answer.text()).slice(0, TEXT_CHARS_MAX),
  };
  await insertTexts(db, row).catch((error) => {
    log('error', 'texts_not_kept', { request_event: event, reason: reasonOf(error) });
  });
}

function promptOf(routable: RoutableBody): string {
  if (routable.kind === 'chat') {
    return routable.body.messages.map((message) => `${message.role}: ${messageText(message)}`).join('\n');
  }
  const { prompt } = routable.body;
  return typeof prompt === 'string' ? prompt : JSON.stringify(prompt);
}

/** Of a stream's events or of a whole answer, the first choice's text. */
function answerOf(wire: string): string {
  const lines = wire.split('\n').filter((line) => line.startsWith('data: {'));
  const chunks = lines.length === 0 ? [wire] : lines.map((line) => line.slice('data: '.length));
  return chunks.map(textIn).join('');
}

type Choice = {
  index?: unknown;
  message?: { content?: unknown };
  delta?: { content?: unknown };
  text?: unknown;
};
/** On the newer wire: what a whole answer has, and what an event of a stream adds. */
type Response = {
  object?: unknown;
  output?: { content?: { text?: unknown }[] }[];
  type?: unknown;
  delta?: unknown;
};

function textIn(json: string): string {
  const parsed = parseOrNull(json) as ({ choices?: (Choice | null)[] } & Response) | null;
  // An answer that was cut, or the last event of one.
  if (parsed === null) return '';
  if (parsed.object === 'response') {
    const parts = (parsed.output ?? []).flatMap(({ content }) => content ?? []);
    return parts.map(({ text }) => (typeof text === 'string' ? text : '')).join('');
  }
  if (parsed.type === 'response.output_text.delta') {
    return typeof parsed.delta === 'string' ? parsed.delta : '';
  }
  // An event of a stream holds one choice, and choices take turns.
  const choice = parsed.choices?.find((one) => one?.index === 0);
  const text = choice?.delta?.content ?? choice?.message?.content ?? choice?.text;
  return typeof text === 'string' ? text : '';
}
