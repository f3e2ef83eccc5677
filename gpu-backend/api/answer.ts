/**
 * Runs the choices of an answer, a few at a time, parses tool calls out of their text, and merges their events into one
 * stream. `wire.ts` formats it, `completions.ts` sends it.
 */
import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { cancellation, type ErrorCode, MaskrouteError } from '../../shared/wire/errors.ts';
import type { ToolFormat } from '../model/tokenizer/tool-format.ts';
import {
  type ChoiceEvent,
  type ChoiceJob,
  heldBack,
  notBegun,
  type Piece,
  type Progress,
  runChoice,
} from './choice.ts';
import type { ApiLimits, Places, ServedModel } from './parts.ts';
import type { AnswerPlan } from './plan.ts';

/** An answer that is being generated. */
export type RunningAnswer = {
  readonly plan: AnswerPlan;
  /** One for each job; always up to date, also after an abort. */
  readonly progress: readonly Progress[];
  /** Settles with the first event, so that a refusal (such as a full queue) still gets its own HTTP status. */
  readonly begun: Promise<void>;
  /** `performance.now()`. */
  firstEventAt_ms: number | undefined;
  /** Before its first event the queue was full, or kept it waiting for too long: it costs nothing. */
  wasTurnedAway: boolean;
  readonly events: AsyncIterable<ChoiceEvent>;
  /** Ends the choices that still run, also when nobody has begun to read `events`. */
  abandon(): void;
};

export function runAnswer(
  model: ServedModel,
  plan: AnswerPlan,
  limits: ApiLimits,
  { signal, places }: { readonly signal: AbortSignal; readonly places: Places },
): RunningAnswer {
  const progress = plan.jobs.map(notBegun);
  const abandoned = new AbortController();
  const admission: Admission = {
    someoneIsIn: false,
    readmit_ms: limits.readmit_ms,
    signal: AbortSignal.any([signal, abandoned.signal]),
    places,
  };
  const answerSince_ms = performance.timeOrigin + performance.now();
  const starts = plan.jobs.map((planned, position) => () => {
    const job = { ...planned, request: { ...planned.request, answerSince_ms } };
    return runAdmitted(model, job, progress[position]!, admission);
  });
  const events = mergeStreams(starts, (choice, running) => places.tryBegin(choice, running), abandoned);
  const first = events.next();
  const begun = first.then(
    () => {
      running.firstEventAt_ms = performance.now();
    },
    (error: unknown) => {
      running.wasTurnedAway = error instanceof MaskrouteError && OF_THE_QUEUE.includes(error.code);
      throw error;
    },
  );
  // Not an unhandled rejection: the reader of the events gets the same error.
  begun.catch(() => {});
  const running: RunningAnswer = {
    plan,
    progress,
    begun,
    firstEventAt_ms: undefined,
    wasTurnedAway: false,
    events: goOn(first, events),
    abandon: () => void events.return().catch(() => {}),
  };
  return running;
}

const OF_THE_QUEUE: readonly ErrorCode[] = ['queue_full', 'queue_timeout'];

/** `events`, whose first result was requested already. */
async function* goOn(
  first: Promise<IteratorResult<ChoiceEvent, void>>,
  events: AsyncGenerator<ChoiceEvent, void>,
): AsyncGenerator<ChoiceEvent, void> {
  const { done, value } = await first;
  if (done) return;
  yield value;
  yield* events;
}

/** Shared by the choices of one answer: once one is admitted (`someoneIsIn`), the others retry while the queue is full. */
type Admission = {
  someoneIsIn: boolean;
  readonly readmit_ms: number;
  readonly signal: AbortSignal;
  readonly places: Places;
};

/**
 * A full queue refuses an answer whose first choice is not admitted yet. Once a choice is admitted, the others retry
 * instead of failing the whole answer. They queue with the age of the answer, so new requests do not keep them out.
 */
async function* runAdmitted(
  model: ServedModel,
  job: ChoiceJob,
  progress: Progress,
  admission: Admission,
): AsyncGenerator<ChoiceEvent, void> {
  const { readmit_ms, signal } = admission;
  const until_ms = performance.now() + readmit_ms;
  for (let wait_ms = 20; ; wait_ms = Math.min(2 * wait_ms, 1000)) {
    try {
      for await (const event of runFormed(model, job, progress, admission)) {
        admission.someoneIsIn = true;
        yield event;
      }
      return;
    } catch (error) {
      const full = error instanceof MaskrouteError && error.code === 'queue_full';
      if (!full || !admission.someoneIsIn || performance.now() > until_ms) throw error;
    }
    await sleep(wait_ms, undefined, { signal }).catch(() => {
      throw cancellation(signal);
    });
  }
}

/** Runs a choice, with a grammar session of its own if the answer has a form. */
async function* runFormed(
  { engine, text, grammars }: ServedModel,
  job: ChoiceJob,
  progress: Progress,
  { signal, places }: Admission,
): AsyncGenerator<ChoiceEvent, void> {
  const { grammar, calls } = job.form ?? {};
  if (grammar === undefined) {
    places.giveBack(job.index);
    return yield* runChoice(engine, text, job, progress, signal);
  }
  const open = await grammars.open(grammar, { tenant: job.request.tenant, signal });
  try {
    const formed = { ...job, request: { ...job.request, grammar: open.session } };
    places.giveBack(job.index);
    const events = runChoice(engine, text, formed, progress, signal);
    yield* calls === undefined ? events : readCalls(events, calls);
  } finally {
    open.close();
  }
}

/**
 * Merges streams into one, in the order of their events. They are started in order: the next one if `tryBegin` lets it begin
 * while so many others run, as it does where none runs. There is no read-ahead: a stream's next event is requested only after
 * its last one was taken, so a slow reader slows the streams. The first failure ends all. A failure, or a reader that leaves
 * early, aborts `abandoned`, which must end the other streams.
 */
async function* mergeStreams<Event>(
  starts: readonly (() => AsyncGenerator<Event, void>)[],
  tryBegin: (which: number, running: number) => boolean,
  abandoned: AbortController,
): AsyncGenerator<Event, void> {
  type Turn = { readonly stream: AsyncGenerator<Event, void>; readonly result: IteratorResult<Event, void> };
  const turns = new Map<AsyncGenerator<Event, void>, Promise<Turn>>();
  const ask = (stream: AsyncGenerator<Event, void>) => {
    const turn = stream.next().then((result) => ({ stream, result }));
    // Not an unhandled rejection: after the merge has ended nobody awaits this turn.
    turn.catch(() => {});
    // Re-inserted at the end of the map, so that a fast stream does not starve the others.
    turns.delete(stream);
    turns.set(stream, turn);
  };
  let started = 0;
  try {
    while (started < starts.length || turns.size > 0) {
      while (started < starts.length && tryBegin(started, turns.size)) ask(starts[started++]!());
      const { stream, result } = await Promise.race(turns.values());
      if (result.done) {
        turns.delete(stream);
        continue;
      }
      yield result.value;
      ask(stream);
    }
  } finally {
    if (turns.size > 0) {
      abandoned.abort();
      // Not awaited: a hanging engine must not delay the client's answer.
      for (const stream of turns.keys()) void stream.return().catch(() => {});
    }
  }
}

/* Tool calls in a choice's text: their delimiters are removed, and their arguments are streamed as they are generated. */

/** Turns text events into text and call events. Log-probabilities stay with their text; calls have none. */
export async function* readCalls(
  events: AsyncIterable<ChoiceEvent>,
  format: ToolFormat,
): AsyncGenerator<ChoiceEvent, void> {
  const reader = new CallReader(format);
  /** Tokens of text that is held back or belongs to a call. */
  const waiting: Piece[] = [];
  const shown = ({ text, end }: TextPart, index: number): ChoiceEvent => {
    const begun = waiting.findIndex(({ offset }) => offset >= end);
    const pieces = waiting.splice(0, begun < 0 ? waiting.length : begun);
    return { type: 'text', index, text, pieces: pieces.filter(({ offset }) => offset >= end - text.length) };
  };
  for await (const event of events) {
    const { index } = event;
    if (event.type === 'text') {
      waiting.push(...event.pieces);
      for (const part of reader.push(event.text))
        yield part.type === 'text' ? shown(part, index) : { ...part, index };
    } else if (event.type === 'finished') {
      for (const part of reader.flush()) yield shown(part, index);
      // A stop string may cut a call, which nobody should make then.
      const hasCalled = reader.calls > 0 && !reader.isInArguments && event.reason === 'stop';
      yield hasCalled ? { ...event, reason: 'tool_calls' } : event;
    } else yield event;
  }
}

/** `end`: offset of its end in the choice's whole text, in UTF-16 units. */
type TextPart = { readonly type: 'text'; readonly text: string; readonly end: number };
type Part =
  | TextPart
  | { readonly type: 'call'; readonly call: number; readonly id: string; readonly name: string }
  | { readonly type: 'arguments'; readonly call: number; readonly text: string };

/** Parses tool calls from streamed text. The grammar guarantees their form, so it does not validate. */
export class CallReader {
  /** How many calls have begun. */
  calls = 0;
  readonly #format: ToolFormat;
  #state: 'text' | 'name' | 'arguments' | 'end' = 'text';
  #held = '';
  /** Length of the text before `#held`. */
  #passed = 0;
  #depth = 0;
  #isInString = false;
  #isEscaped = false;

  constructor(format: ToolFormat) {
    this.#format = format;
  }

  get isInArguments(): boolean {
    return this.#state === 'arguments';
  }

  push(text: string): Part[] {
    this.#held += text;
    const parts: Part[] = [];
    for (let part = this.#next(); part !== undefined; part = this.#next()) parts.push(...part);
    return parts;
  }

  /** The rest of the text at the end of the stream, without a call that breaks off before its name. */
  flush(): TextPart[] {
    const at = this.#held.indexOf(this.#format.trigger);
    const text = this.#pass((at < 0 ? this.#held : this.#held.slice(0, at).trimEnd()).length);
    this.#held = '';
    const isText = this.#state === 'text' && (this.calls === 0 || text.trim() !== '');
    return isText && text !== '' ? [{ type: 'text', text, end: this.#passed }] : [];
  }

  /** Removes and returns the first `length` characters of `#held`. */
  #pass(length: number): string {
    const text = this.#held.slice(0, length);
    this.#held = this.#held.slice(length);
    this.#passed += text.length;
    return text;
  }

  /** The next parts of the text; undefined: more text is needed. */
  #next(): Part[] | undefined {
    switch (this.#state) {
      case 'text':
        return this.#readText();
      case 'name':
        return this.#readName();
      case 'arguments':
        return this.#readArguments();
      case 'end':
        return this.#readEnd();
    }
  }

  #readText(): Part[] | undefined {
    const { begin } = this.#format;
    const at = this.#held.indexOf(begin);
    if (at >= 0) {
      const from = this.#passed;
      const text = this.#pass(at + begin.length)
        .slice(0, at)
        .trimEnd();
      this.#state = 'name';
      return text === '' ? [] : [{ type: 'text', text, end: from + text.length }];
    }
    const shown = this.#held.length - heldBackWithSpace(this.#held, begin);
    if (shown === 0) return undefined;
    const text = this.#pass(shown);
    return [{ type: 'text', text, end: this.#passed }];
  }

  #readName(): Part[] | undefined {
    const { middle } = this.#format;
    const end = this.#held.indexOf('"');
    if (end < 0 || this.#held.length < end + middle.length) return undefined;
    const name = this.#pass(end + middle.length).slice(0, end);
    this.#state = 'arguments';
    const id = `call_${randomUUID().replaceAll('-', '').slice(0, 24)}`;
    return [{ type: 'call', call: this.calls++, id, name }];
  }

  #readArguments(): Part[] | undefined {
    const end = this.#endOfValue();
    const text = this.#pass(end ?? this.#held.length);
    if (end !== undefined) this.#state = 'end';
    if (text !== '') return [{ type: 'arguments', call: this.calls - 1, text }];
    return end === undefined ? undefined : [];
  }

  /**
   * Where the arguments end, if they end in `#held`. Scans each character once. A schema may allow arguments other than an
   * object.
   */
  #endOfValue(): number | undefined {
    for (let at = 0; at < this.#held.length; at++) {
      const letter = this.#held[at]!;
      if (this.#isEscaped) this.#isEscaped = false;
      else if (this.#isInString) {
        if (letter === '\\') this.#isEscaped = true;
        else if (letter === '"') {
          this.#isInString = false;
          if (this.#depth === 0) return at + 1;
        }
      } else if (letter === '"') this.#isInString = true;
      else if ('{['.includes(letter)) this.#depth++;
      else if (this.#depth === 0) {
        // A number, `true`, `false` or `null` ends where `end` begins.
        if (/[\s}]/.test(letter)) return at;
      } else if ('}]'.includes(letter) && --this.#depth === 0) return at + 1;
    }
    return undefined;
  }

  #readEnd(): Part[] | undefined {
    const { end } = this.#format;
    if (this.#held.length < end.length) return undefined;
    this.#pass(end.length);
    this.#state = 'text';
    return [];
  }
}

/** Length of the suffix of `text` that may still become a call: a prefix of `begin`, and white space before it. */
function heldBackWithSpace(text: string, begin: string): number {
  const before = text.slice(0, text.length - heldBack(text, [begin]));
  return text.length - before.trimEnd().length;
}
