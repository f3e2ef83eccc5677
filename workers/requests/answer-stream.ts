/**
 * A backend's answer on its way through the edge, a state machine from the request to its end:
 *
 *     asking → reading → over      a small whole answer, read at once
 *     asking → passing → over      a stream or a large answer, passed on piece by piece as the client takes it
 *     asking → over                no answer, or a refusal
 *
 * A stream is passed on in whole events; comments keep it open while nothing comes; and an error after the status was
 * sent becomes an `error` event, never a connection that breaks inside an event. An answer's cost is in its last chunks,
 * which are copied, and read when it is over.
 */

import { concatBytes } from '@noble/hashes/utils.js';
import {
  ERROR_CODES,
  type ErrorCode,
  MaskrouteError,
  toMaskrouteError,
  type WireError,
} from '../../shared/wire/errors.ts';
import { HEADERS, UNREAD_MAX_ms } from '../../shared/wire/protocol.ts';
import { errorEventOf } from '../../shared/wire/responses.ts';
import type { Rest } from '../backends/attempt.ts';
import { hungUp } from '../backends/call-backend.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { createWait, steadyNow_ms, type Wait } from '../base/waiting.ts';
import type { Asked, ClientBody, Progress } from './forward.ts';
import { type AnswerText, type Heard, hearWhole, Tail } from './read-answer.ts';

type Bytes = Uint8Array<ArrayBuffer>;

/** The beginning of an answer. `passing`: it is then read as `events` or as `bytes`. */
export type Begun = Pick<Response, 'ok' | 'status' | 'headers'> & {
  readonly body: 'passing' | ReadableStream<Uint8Array> | ArrayBuffer | null;
};

/** How an answer ended, for its account and its event. */
export type Outcome = {
  readonly status: number;
  readonly code: string | null;
  readonly heard: Heard | null;
  readonly ranAt: RanAt;
  /** The mask that the backend reports. */
  readonly mask: string | null;
  readonly sparsity: number | null;
  readonly endedAt_ms: number;
};

/**
 * Which backends may have worked on it:
 *
 * - `answerer`: the backend whose answer began;
 * - `refuser`: any that was asked, and they are done with it, since one refused it;
 * - `anywhere`: any that was asked, and some may not have begun yet;
 * - `nowhere`: none, unless one was given up in silence.
 */
type RanAt = 'answerer' | 'refuser' | 'anywhere' | 'nowhere';

/** The outcome of a request that got no answer. */
export function noAnswer(status: number, code: string | null, ranAt: RanAt): Outcome {
  return { status, code, ranAt, heard: null, mask: null, sparsity: null, endedAt_ms: Date.now() };
}

type Following = {
  /** The client's API, which decides the form of errors in a stream. */
  readonly wire: ClientBody['wire'];
  /** Aborts when the client hangs up. */
  readonly signal: AbortSignal;
  /** A backend that has begun its answer and then sends nothing for this long counts as broken off. */
  readonly stall_ms: number;
  /** A stream that is silent for this long gets a keepalive comment. */
  readonly keepalive_ms: number;
  /** Called as chunks pass; throws once the caller's key no longer works. */
  readonly watch: () => Promise<void>;
  /** Collects the answer's text; undefined: texts are not kept. */
  readonly kept: AnswerText | undefined;
};

export class Answer {
  /**
   * @throws what the call to the backends throws; MaskrouteError `backend_error` for a small non-streaming answer that
   * broke off; `cancelled` when the client hung up meanwhile.
   */
  readonly begun: Promise<Begun>;
  /** Settles once, whether the answer is read or not. */
  readonly ended: Promise<Outcome>;

  readonly #end: (outcome: Outcome) => void;
  readonly #progress: Progress;
  readonly #following: Following;
  readonly #stall: Wait;
  readonly #silence: Wait;
  readonly #tail = new Tail();
  /** The next event's number, on the newer wire. */
  #sequence = 0;
  #phase: 'asking' | 'reading' | 'passing' | 'over' = 'asking';
  /** The response of an answer that is passed on. */
  #response: Response | undefined;
  #reader: ReadableStreamDefaultReader<Uint8Array> | undefined;
  #hasLeft = false;
  /** When the last chunk of a streamed answer came, and how long all chunks waited for the client. */
  #cameAt_ms = 0;
  #unread_ms = 0;
  /** For an answer that is read at once: whether its only chunk was sent to the client. */
  #isTold = false;

  constructor(asked: Promise<Asked>, progress: Progress, following: Following) {
    const { promise, resolve } = Promise.withResolvers<Outcome>();
    this.ended = promise;
    this.#end = resolve;
    this.#progress = progress;
    this.#following = following;
    this.#stall = createWait(following.stall_ms);
    this.#silence = createWait(following.keepalive_ms);
    this.begun = this.#begin(asked);
  }

  /**
   * Like `begun`, or `late` when a stream has been silent for too long; its client then gets `events`. @throws as
   * `begun`.
   */
  begunInTime(): Promise<Begun | 'late'> {
    return this.#silence.within(this.begun, this.#following.keepalive_ms);
  }

  /**
   * Server-sent events, with backpressure: what the client does not read is not read from the backend. A refusal
   * becomes one event; a non-streaming answer is passed on unchanged.
   */
  events(requestId: string): ReadableStream<Bytes> {
    const events = new WholeEvents();
    let pending: Promise<Bytes | undefined> | undefined;
    return new ReadableStream<Bytes>(
      {
        pull: async (controller) => {
          try {
            for (;;) {
              pending ??= this.#reader === undefined ? this.#firstPiece() : this.#read();
              const bytes = await this.#silence.within(pending, this.#following.keepalive_ms);
              if (bytes === 'late') {
                // A comment here would become part of an unfinished event.
                if (events.isInside) continue;
                return controller.enqueue(KEEPALIVE);
              }
              pending = undefined;
              const whole = bytes === undefined ? events.rest() : events.add(bytes);
              if (whole.length > 0) controller.enqueue(whole);
              if (bytes === undefined) break;
              if (whole.length > 0) return;
            }
          } catch (thrown) {
            // When the client hung up, the error is its own and not a backend's.
            const cause =
              this.#following.signal.aborted && !(thrown instanceof MaskrouteError) ? hungUp() : thrown;
            if (events.isInside) controller.enqueue(EMPTY_LINE);
            controller.enqueue(this.#errorEvent(lateError(cause, requestId)));
          }
          this.#silence.end();
          controller.close();
        },
        cancel: async (reason) => {
          this.#silence.end();
          await this.#leave(reason);
        },
      },
      { highWaterMark: 0 },
    );
  }

  /** A non-streaming answer, unchanged and with backpressure. */
  bytes(): ReadableStream<Bytes> {
    this.#silence.end();
    return new ReadableStream<Bytes>(
      {
        pull: async (controller) => {
          const bytes = await this.#read();
          if (bytes === undefined) controller.close();
          else controller.enqueue(bytes);
        },
        cancel: (reason) => this.#leave(reason),
      },
      { highWaterMark: 0 },
    );
  }

  async #begin(asked: Promise<Asked>): Promise<Begun> {
    try {
      const { response, rest } = await asked;
      const { ok, status, headers } = response;
      if (rest !== undefined) return { ok, status, headers, body: await this.#readWhole(response, rest) };
      if (!ok) {
        const code = await codeOf(response);
        this.#over(noAnswer(status, code, AFTER_WORK.includes(code) ? 'refuser' : 'nowhere'));
        return { ok, status, headers, body: response.body };
      }
      // A success without a body is no answer (`attempt.ts`).
      this.#pass(response, response.body!);
      return { ok, status, headers, body: 'passing' };
    } catch (thrown) {
      const hadBegun = this.#phase === 'reading';
      const error = hadBegun ? this.#brokeOff(thrown) : thrown;
      const { status, code } = toMaskrouteError(error);
      // If no backend was asked, none worked on the request.
      const ranElsewhere = this.#progress.asked.size > 0 && code === 'cancelled' ? 'anywhere' : 'nowhere';
      this.#over(noAnswer(status, code, hadBegun ? 'answerer' : ranElsewhere));
      throw error;
    }
  }

  async #readWhole(response: Response, rest: Rest): Promise<ArrayBuffer> {
    this.#phase = 'reading';
    const bytes = await rest(response.arrayBuffer());
    this.#following.kept?.add(new Uint8Array(bytes));
    this.#overWith(response, 'complete', hearWhole(new Uint8Array(bytes)));
    return bytes;
  }

  #brokeOff(cause: unknown): MaskrouteError {
    return this.#following.signal.aborted ? hungUp() : brokenOff(cause);
  }

  #pass(response: Response, body: ReadableStream<Uint8Array>): void {
    this.#phase = 'passing';
    this.#response = response;
    this.#reader = body.getReader();
    this.#cameAt_ms = steadyNow_ms();
    // The client may have hung up before the listener was added; the abort event fires only once.
    if (this.#following.signal.aborted || this.#hasLeft) this.#left();
    else this.#following.signal.addEventListener('abort', this.#left, { once: true });
  }

  readonly #left = (): void => void this.#leave(undefined);

  async #leave(reason: unknown): Promise<void> {
    this.#hasLeft = true;
    if (this.#phase === 'passing') this.#passed('cancelled');
    await this.#reader?.cancel(reason).catch(() => {});
  }

  /** The first chunk of a stream that was begun before the answer: the whole answer if it is not a stream. */
  async #firstPiece(): Promise<Bytes | undefined> {
    const { ok, body } = await this.begun;
    if (body === 'passing') return await this.#read();
    if (this.#isTold) return undefined;
    this.#isTold = true;
    const text = await new Response(body).text();
    return ok ? encode(text) : this.#errorEvent(JSON.parse(text));
  }

  #errorEvent(error: WireError): Bytes {
    const data = this.#following.wire === 'responses' ? errorEventOf(error, this.#sequence) : error;
    return encode(`event: error\ndata: ${JSON.stringify(data)}\n\n`);
  }

  async #read(): Promise<Bytes | undefined> {
    this.#unread_ms += steadyNow_ms() - this.#cameAt_ms;
    await this.#following.watch().catch(async (refusal) => {
      await this.#leave(refusal);
      throw refusal;
    });
    try {
      const piece = await this.#stall.within(this.#reader!.read(), this.#following.stall_ms);
      if (piece === 'late') {
        this.#reader!.cancel().catch(() => {});
        // The client did read all this time, so the backend broke off by itself.
        this.#unread_ms = 0;
        throw new Error(`no bytes for ${this.#following.stall_ms} ms`);
      }
      if (piece.done) {
        this.#passed('complete');
        return undefined;
      }
      this.#tail.hear(piece.value);
      this.#following.kept?.add(piece.value);
      return piece.value as Bytes;
    } catch (error) {
      const isUnread = this.#unread_ms >= UNREAD_MAX_ms;
      this.#passed(this.#following.signal.aborted || isUnread ? 'cancelled' : 'broken');
      throw isUnread ? notRead(error) : error;
    } finally {
      this.#cameAt_ms = steadyNow_ms();
    }
  }

  #passed(how: How): void {
    if (this.#phase !== 'passing') return;
    this.#stall.end();
    this.#following.signal.removeEventListener('abort', this.#left);
    const isResponse = this.#following.wire === 'responses';
    const heard = this.#tail.heard({ isResponse, isCut: how !== 'complete' });
    this.#sequence = (heard.sequence ?? -1) + 1;
    this.#overWith(this.#response!, how, heard);
  }

  #overWith({ headers, status }: Response, how: How, heard: Heard): void {
    const sparsity = numberOrNull(headers.get(HEADERS.sparsity));
    this.#over({
      ...endOf(how, heard, status),
      heard,
      ranAt: 'answerer',
      mask: headers.get(HEADERS.mask),
      sparsity,
      endedAt_ms: Date.now(),
    });
  }

  #over(outcome: Outcome): void {
    this.#phase = 'over';
    this.#silence.end();
    this.#end(outcome);
  }
}

const brokenOff = (cause: unknown): MaskrouteError =>
  new MaskrouteError('backend_error', 'The model backend broke off in the middle of its answer.', { cause });

/** Backends end answers that nobody reads: neither the backend nor the version is to blame then. */
const notRead = (cause: unknown): MaskrouteError =>
  new MaskrouteError(
    'cancelled',
    `The answer ended early: it waited for more than ${UNREAD_MAX_ms / 1000} s to be read.`,
    { cause },
  );

/** `broken`: the backend's connection ended before the answer did. `cancelled`: the client hung up, or did not read. */
type How = 'complete' | 'broken' | 'cancelled';

function endOf(how: How, { lateError }: Heard, status: number): Pick<Outcome, 'status' | 'code'> {
  if (lateError !== null) return { status, code: lateError };
  switch (how) {
    case 'complete':
      return { status, code: null };
    case 'broken':
      return { status, code: 'backend_error' };
    case 'cancelled':
      return { status: CLIENT_LEFT, code: 'cancelled' };
  }
}

export const CLIENT_LEFT = ERROR_CODES.cancelled[0];

/** Refusals after which the backend may have done work; it knows the cost. */
const AFTER_WORK: readonly string[] = [
  'deadline_exceeded',
  'engine_failed',
  // Tokenizing a long prompt takes work.
  'context_length_exceeded',
  // A schema may turn out to be too slow in the middle of an answer.
  'invalid_schema',
] satisfies ErrorCode[];

/** The code of a refusal, which `judge` has found to be an error of the protocol. */
async function codeOf(response: Response): Promise<string> {
  const { error } = await response.clone().json<{ error: { code: unknown } }>();
  return typeof error.code === 'string' ? error.code : 'backend_error';
}

const numberOrNull = (text: string | null): number | null =>
  text === null || !Number.isFinite(Number(text)) ? null : Number(text);

/* Cutting a stream into whole events. */

const encoder = new TextEncoder();
const encode = (text: string): Bytes => encoder.encode(text) as Bytes;
const KEEPALIVE = encode(': keepalive\n\n');
/** Ends any event. */
const EMPTY_LINE = encode('\n\n');
const NOTHING = new Uint8Array(0);
const LINE_FEED = 0x0a;
/** Longer events are passed on in parts. */
const HELD_BYTES_MAX = 1024 * 1024;

function lateError(thrown: unknown, requestId: string): WireError {
  if (thrown instanceof MaskrouteError) return thrown.toWire();
  log('error', 'stream_broke_off', { request_id: requestId, reason: reasonOf(thrown) });
  return brokenOff(thrown).toWire();
}

/** Cuts a stream at the ends of events, and buffers an unfinished event. */
class WholeEvents {
  #held: Bytes = NOTHING;
  /** Whether the bytes passed on so far end inside an event. */
  isInside = false;

  /** The whole events so far, up to the last empty line. */
  add(bytes: Bytes): Bytes {
    const all = this.#held.length === 0 ? bytes : (concatBytes(this.#held, bytes) as Bytes);
    for (let end = all.length; end >= 2; end--) {
      if (all[end - 1] === LINE_FEED && all[end - 2] === LINE_FEED) {
        this.isInside = false;
        this.#held = end === all.length ? NOTHING : all.slice(end);
        return end === all.length ? all : all.subarray(0, end);
      }
    }
    if (all.length <= HELD_BYTES_MAX) {
      this.#held = all;
      return NOTHING;
    }
    this.isInside = true;
    // The last byte may be the beginning of the empty line that ends the event.
    this.#held = all.slice(-1);
    return all.subarray(0, -1);
  }

  /** The remaining bytes at the end of the stream. */
  rest(): Bytes {
    return this.#held;
  }
}
