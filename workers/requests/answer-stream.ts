/**
 * Listens in on an answer that passes through: when its first bytes came, how it ended, and what the backend
 * says at its end about its cost. Nothing is held back or copied; only the last pieces are kept, and read once
 * the answer is over.
 */

import { MaskrouteError, type WireError } from '../../shared/wire/errors.ts';
import { log, reasonOf } from '../base/log.ts';
import { createWait, type Wait } from '../base/waiting.ts';
import type { WatchedAnswer } from './request-record.ts';

/** More than the last event of any stream, and than what follows the choices of a whole answer. */
const TAIL_BYTES = 16 * 1024;

type AnswerEnd =
  /** `broken`: the backend's side ended before the answer did. */
  | { readonly how: 'complete' | 'broken' }
  /** The client left. */
  | { readonly how: 'cancelled' };

/** As the backend counted. */
type AnswerFigures = {
  readonly prompt_tokens: number;
  readonly completion_tokens: number;
  readonly queue_ms: number | null;
  readonly prefill_ms: number | null;
  readonly decode_ms: number | null;
};

export type Heard = {
  readonly end: AnswerEnd['how'];
  readonly firstAt_ms: number | null;
  readonly figures: AnswerFigures | null;
  /** The code of an error event in the stream. */
  readonly lateError: string | null;
  /** What passed of an answer whose figures did not: each event is a token at least. */
  readonly passed: Passed;
};

/** `texts`: events with text among the last. `others`: of the earlier ones, which nobody looked into. */
type Passed = { readonly texts: number; readonly others: number };

/** Without `stream` it keeps nothing from one text to the next. */
const utf8 = new TextDecoder();

/** What {@link tapAnswer} hears of an answer that was read whole. */
export function hearWhole(bytes: Uint8Array): Heard {
  const text = utf8.decode(bytes.subarray(-TAIL_BYTES));
  const passed = { texts: 0, others: 0 };
  return { end: 'complete', firstAt_ms: Date.now(), figures: figuresIn(text), lateError: null, passed };
}

/** An answer that is read piece by piece, as a reader of a stream gives it. */
export type TappedBody = {
  read(): Promise<{ readonly done: boolean; readonly value?: Uint8Array | undefined }>;
  cancel(reason: unknown): Promise<void>;
};

type TapOptions = {
  /** Its abort is the client leaving. */
  readonly signal: AbortSignal;
  /** Whoever waits for bytes so long in vain waits no longer: the backend is called off, and `read` rejects. */
  readonly stall_ms: number;
  /** Called exactly once. */
  readonly onEnd: (heard: Heard) => void;
};

export function tapAnswer(
  body: ReadableStream<Uint8Array>,
  { signal, stall_ms, onEnd }: TapOptions,
): TappedBody {
  const reader = body.getReader();
  let tail: Uint8Array[] = [];
  let tail_bytes = 0;
  /** Pieces that are kept no more and ended with an event: no more than there were events. */
  let dropped = 0;
  let firstAt_ms: number | null = null;
  let ended = false;
  const wait = createWait(stall_ms);

  const hear = (chunk: Uint8Array): void => {
    if (isComment(chunk)) return;
    firstAt_ms ??= Date.now();
    tail.push(chunk);
    tail_bytes += chunk.length;
    while (tail_bytes - tail[0]!.length >= TAIL_BYTES) {
      const piece = tail.shift()!;
      tail_bytes -= piece.length;
      if (endsEvent(piece)) dropped++;
    }
  };
  const end = (how: AnswerEnd['how']): void => {
    if (ended) return;
    ended = true;
    wait.end();
    signal.removeEventListener('abort', left);
    const text = utf8.decode(join(tail, tail_bytes));
    tail = [];
    const figures = figuresIn(text);
    const passed = { texts: figures === null ? textsIn(text) : 0, others: dropped };
    onEnd({ end: how, firstAt_ms, figures, lateError: lateErrorIn(text), passed });
  };
  const left = () => {
    end('cancelled');
    reader.cancel().catch(() => {});
  };
  // It may have left while the answer was on its way here: a signal says that once only.
  if (signal.aborted) left();
  else signal.addEventListener('abort', left, { once: true });

  return {
    async read() {
      try {
        const piece = await wait.within(reader.read(), stall_ms);
        if (piece === 'late') {
          reader.cancel().catch(() => {});
          throw new Error(`no bytes for ${stall_ms} ms`);
        }
        if (piece.done) end('complete');
        else hear(piece.value);
        return piece;
      } catch (error) {
        end(signal.aborted ? 'cancelled' : 'broken');
        throw error;
      }
    },
    async cancel(reason) {
      end('cancelled');
      await reader.cancel(reason).catch(() => {});
    },
  };
}

/** For a client: what it does not take stays with the backend. */
export const streamOf = (body: TappedBody): ReadableStream<Uint8Array> =>
  new ReadableStream<Uint8Array>(
    {
      async pull(controller) {
        const { done, value } = await body.read();
        if (done) controller.close();
        else controller.enqueue(value!);
      },
      cancel: (reason) => body.cancel(reason),
    },
    { highWaterMark: 0 },
  );

const COLON = 0x3a;
/** A keepalive says nothing of the answer. */
const isComment = (chunk: Uint8Array): boolean => chunk[0] === COLON && chunk.length < 64;

const LINE_FEED = 0x0a;
const endsEvent = (piece: Uint8Array): boolean =>
  piece[piece.length - 1] === LINE_FEED && piece[piece.length - 2] === LINE_FEED;

/** As for the figures: a quote that a model wrote is escaped. */
const textsIn = (text: string): number => text.match(/"(?:content|text)":"(?!")/g)?.length ?? 0;

function join(parts: readonly Uint8Array[], bytes: number): Uint8Array {
  if (parts.length === 1) return parts[0]!;
  const whole = new Uint8Array(bytes);
  let offset = 0;
  for (const part of parts) {
    whole.set(part, offset);
    offset += part.length;
  }
  return whole;
}

/**
 * The last counts in the text. They are looked for as they stand in JSON outside of strings: inside of one, which
 * a model may have written, the quotes are escaped.
 */
export function figuresIn(text: string): AnswerFigures | null {
  const number = (name: string, from: string): number | null => {
    const at = from.lastIndexOf(`"${name}":`);
    if (at === -1) return null;
    const value = Number.parseFloat(from.slice(at + name.length + 3, at + name.length + 35));
    return Number.isFinite(value) && value >= 0 ? value : null;
  };
  const prompt_tokens = number('prompt_tokens', text);
  const completion_tokens = number('completion_tokens', text);
  if (prompt_tokens === null || completion_tokens === null) return null;
  return {
    prompt_tokens: Math.round(prompt_tokens),
    completion_tokens: Math.round(completion_tokens),
    queue_ms: number('queue_ms', text),
    prefill_ms: number('prefill_ms', text),
    decode_ms: number('decode_ms', text),
  };
}

function lateErrorIn(text: string): string | null {
  const at = text.lastIndexOf('event: error\n');
  if (at === -1 || (at > 0 && text[at - 1] !== '\n')) return null;
  return /"code":"([a-z_]{1,64})"/.exec(text.slice(at))?.[1] ?? 'backend_error';
}

/*
 * A stream of server-sent events on its way through the edge. Whole events pass as they come; a comment keeps the
 * connection open while nothing does; and what goes wrong after the status was sent is told in an `error` event,
 * never by a connection that breaks off inside of one.
 */

type Bytes = Uint8Array<ArrayBuffer>;

const encoder = new TextEncoder();
const KEEPALIVE = encoder.encode(': keepalive\n\n') as Bytes;
const NOTHING = new Uint8Array(0);
const LF = 0x0a;
/** An event that is longer passes in pieces. */
const HELD_BYTES_MAX = 1024 * 1024;

/** `wait`: for the backend's next bytes, until a comment is due. */
export type RelayOptions = { readonly wait: Wait; readonly keepalive_ms: number; readonly requestId: string };

/** Pulled by the client: what it does not read is not read from the backend either. */
export function relayStream(
  answer: Promise<WatchedAnswer>,
  { wait, keepalive_ms, requestId }: RelayOptions,
): ReadableStream<Bytes> {
  let reader: TappedBody | undefined;
  let pending: Promise<Bytes | undefined> | undefined;
  /** The beginning of an event whose end has not come yet. */
  let held = NOTHING;

  const read = async (): Promise<Bytes | undefined> => {
    if (reader === undefined) {
      const { ok, body } = await answer;
      if (body.kind === 'plain') {
        const text = await new Response(body.body).text();
        return ok ? (encoder.encode(text) as Bytes) : errorEvent(text);
      }
      reader = body.body;
    }
    const { done, value } = await reader.read();
    return done ? undefined : (value as Bytes);
  };

  const close = (controller: ReadableStreamDefaultController<Bytes>): void => {
    wait.end();
    controller.close();
  };

  return new ReadableStream<Bytes>(
    {
      async pull(controller) {
        try {
          for (;;) {
            pending ??= read();
            const bytes = await wait.within(pending, keepalive_ms);
            if (bytes === 'late') return controller.enqueue(KEEPALIVE);
            pending = undefined;
            if (bytes === undefined) {
              if (held.length > 0) controller.enqueue(held);
              return close(controller);
            }
            if (reader === undefined) {
              // A refusal is one event, and an answer that is no stream one piece.
              controller.enqueue(bytes);
              return close(controller);
            }
            const [whole, rest] = cut(held, bytes);
            held = rest;
            if (whole.length > 0) return controller.enqueue(whole);
          }
        } catch (thrown) {
          controller.enqueue(errorEvent(JSON.stringify(lateError(thrown, requestId))));
          close(controller);
        }
      },
      async cancel(reason) {
        wait.end();
        await reader?.cancel(reason).catch(() => {});
      },
    },
    { highWaterMark: 0 },
  );
}

const errorEvent = (json: string): Bytes => encoder.encode(`event: error\ndata: ${json}\n\n`) as Bytes;

function lateError(thrown: unknown, requestId: string): WireError {
  if (thrown instanceof MaskrouteError) return thrown.toWire();
  log('error', 'stream_broke_off', { request_id: requestId, reason: reasonOf(thrown) });
  const message = 'The model backend broke off in the middle of its answer.';
  return new MaskrouteError('backend_error', message).toWire();
}

/** What is whole of `held` and `bytes` together, up to the last empty line, and the rest. */
function cut(held: Bytes, bytes: Bytes): [whole: Bytes, rest: Bytes] {
  const all = held.length === 0 ? bytes : concat(held, bytes);
  for (let end = all.length; end >= 2; end--) {
    if (all[end - 1] === LF && all[end - 2] === LF) {
      return end === all.length ? [all, NOTHING] : [all.subarray(0, end), all.slice(end)];
    }
  }
  return all.length > HELD_BYTES_MAX ? [all, NOTHING] : [NOTHING, all];
}

function concat(a: Bytes, b: Bytes): Bytes {
  const both = new Uint8Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}
