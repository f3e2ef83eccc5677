/**
 * One choice: the engine's tokens become the text events of one entry in `choices`. Text comes in whole characters, never
 * with a part of a stop string, and every token's log-probability stays beside the text that it stands for.
 */
import { cancellation, MaskrouteError } from '../../shared/wire/errors.ts';
import type { FinishReason } from '../../shared/wire/openai.ts';
import type { Engine, EngineEvent, GenerateRequest, Timings, TokenLogprob } from '../engine/engine.ts';
import type { TokenDecoder } from '../model/tokenizer/token-bytes.ts';
import type { AnswerForm } from './answer-form.ts';
import type { TokenText } from './parts.ts';

export type ChoiceJob = {
  /** Position in the answer's `choices`. */
  readonly index: number;
  /** Choices of one prompt share its tokens in `usage`; the first of them carries the count. */
  readonly countsPrompt: boolean;
  readonly request: GenerateRequest;
  readonly stops: readonly string[];
  /** The prompt as the answer repeats it, when it does. */
  readonly echo: string | undefined;
  /** Whether a stop token has an entry in the log-probabilities, as the legacy format has it. */
  readonly scoresStopToken: boolean;
  /** What the answer must look like; without it any text. */
  readonly form?: AnswerForm;
};

/** What is known of a choice so far; kept up to date while it runs, so that an abort can be accounted for. */
export type Progress = {
  completionTokens: number;
  cachedTokens: number;
  /** Undefined until the engine has finished it, as are the next two. Times of events are on the clock of `performance`. */
  timings: Timings | undefined;
  finishReason: FinishReason | undefined;
  finishedAt_ms: number | undefined;
  firstTokenAt_ms: number | undefined;
  tokenAt_ms: number | undefined;
  /** Between each token and the next. */
  readonly tokenGaps_ms: number[];
};

export const notBegun = (): Progress => ({
  ...{ completionTokens: 0, cachedTokens: 0, tokenGaps_ms: [] },
  ...{ firstTokenAt_ms: undefined, tokenAt_ms: undefined },
  ...{ timings: undefined, finishReason: undefined, finishedAt_ms: undefined },
});

export type ChoiceEvent =
  | ({ readonly type: 'text'; readonly index: number } & Shown)
  /** A call of a tool begins, the `call`th of the choice; its arguments follow, as JSON in pieces. */
  | {
      readonly type: 'call';
      readonly index: number;
      readonly call: number;
      readonly id: string;
      readonly name: string;
    }
  | { readonly type: 'arguments'; readonly index: number; readonly call: number; readonly text: string }
  | { readonly type: 'finished'; readonly index: number; readonly reason: FinishReason };

type Shown = { readonly text: string; readonly pieces: readonly Piece[] };

/** One token for a logprobs answer. */
export type Piece = {
  readonly tokenId: number;
  /** Where its text begins in the choice's text, in UTF-16 units. */
  readonly offset: number;
  /** The same in code points, which is what OpenAI and Python count. */
  readonly offset_codePoints: number;
  /** Null for a prompt's first token: nothing precedes it. */
  readonly logprob: TokenLogprob | null;
};

/**
 * @throws MaskrouteError what the engine throws, and `cancelled` when `signal` ended it. Leaving the
 * iteration early cancels the engine's request.
 */
export async function* runChoice(
  engine: Engine,
  tokens: TokenText,
  job: ChoiceJob,
  progress: Progress,
  signal: AbortSignal,
): AsyncGenerator<ChoiceEvent, void> {
  const { index } = job;
  const own = new AbortController();
  const answer = new ChoiceText(tokens, job);
  try {
    for await (const event of engine.generate(job.request, AbortSignal.any([signal, own.signal]))) {
      // After a stop string the engine only has to say that it stopped; tokens in between do not count.
      if (answer.stopped && event.type !== 'finished') continue;
      const { text, pieces } = answer.take(event);
      if (text !== '' || pieces.length > 0) yield { type: 'text', index, text, pieces };
      if (answer.stopped) own.abort();
      if (event.type === 'token') noteToken(progress, performance.now());
      if (event.type !== 'finished') continue;
      const { cachedTokens, timings } = event;
      Object.assign(progress, { cachedTokens, timings, finishedAt_ms: performance.now() });
      const reason = answer.stopped ? 'stop' : finishReason(event.reason, signal);
      progress.finishReason = reason;
      yield { type: 'finished', index, reason };
      return;
    }
    throw new MaskrouteError('engine_failed', 'The engine ended a request without an end.');
  } finally {
    own.abort();
  }
}

function noteToken(progress: Progress, now_ms: number): void {
  progress.completionTokens++;
  if (progress.tokenAt_ms !== undefined) progress.tokenGaps_ms.push(now_ms - progress.tokenAt_ms);
  progress.firstTokenAt_ms ??= now_ms;
  progress.tokenAt_ms = now_ms;
}

function finishReason(reason: 'stop' | 'length' | 'cancelled', signal: AbortSignal): FinishReason {
  if (reason === 'cancelled') throw cancellation(signal);
  return reason;
}

/** The text that a client sees of one choice: the echoed prompt first, then the answer. */
class ChoiceText {
  /** A stop string came: nothing more is shown. */
  stopped = false;
  readonly #tokens: TokenText;
  readonly #job: ChoiceJob;
  readonly #decoder: TokenDecoder;
  readonly #stops: StopMatcher;
  #echo: string;
  #tokenCount = 0;
  /** Ends of the text, echo included, that was decoded and that was shown. */
  #decodedEnd: number;
  #decodedEnd_codePoints: number;
  #shownEnd: number;
  /** Tokens whose text is not shown yet. */
  readonly #waiting: { readonly piece: Piece; readonly end: number }[] = [];

  constructor(tokens: TokenText, job: ChoiceJob) {
    this.#tokens = tokens;
    this.#job = job;
    this.#decoder = tokens.createDecoder({ showSpecial: false });
    this.#stops = new StopMatcher(job.stops);
    this.#echo = job.echo ?? '';
    this.#decodedEnd = this.#echo.length;
    this.#decodedEnd_codePoints = codePointsIn(this.#echo);
    this.#shownEnd = this.#echo.length;
  }

  take(event: EngineEvent): Shown {
    const { text, pieces } = this.#takeBody(event);
    const shown = { text: this.#echo + text, pieces };
    this.#echo = '';
    return shown;
  }

  #takeBody(event: EngineEvent): Shown {
    switch (event.type) {
      case 'prompt':
        return { text: '', pieces: promptPieces(this.#tokens, this.#job, event.logprobs) };
      case 'token':
        return this.#push(event.tokenId, event.logprob);
      case 'finished':
        if (this.stopped) return { text: '', pieces: [] };
        return this.#finish(this.#job.scoresStopToken ? event.stopLogprob : undefined);
    }
  }

  #push(tokenId: number, logprob: TokenLogprob | undefined): Shown {
    const piece = logprob && { ...this.#offsets(), tokenId, logprob };
    const decoded = this.#decoder.push(tokenId);
    this.#decode(decoded);
    if (piece !== undefined) this.#waiting.push({ piece, end: this.#decodedEnd });
    // Stop strings count only after so many tokens.
    if (++this.#tokenCount < this.#job.request.minTokens) return this.#show(decoded);
    const { text, stopped } = this.#stops.push(decoded);
    this.stopped = stopped;
    return this.#show(text);
  }

  /** What was held back, when generation ends by itself; `last` is of a token without text. */
  #finish(last: TokenLogprob | undefined): Shown {
    const rest = this.#decoder.flush();
    this.#decode(rest);
    if (last !== undefined) {
      const piece = { ...this.#offsets(), tokenId: last.tokenId, logprob: last };
      this.#waiting.push({ piece, end: this.#decodedEnd });
    }
    const { text, stopped } = this.#stops.push(rest);
    this.stopped = stopped;
    if (stopped) return this.#show(text);
    const shown = this.#show(text + this.#stops.flush());
    return {
      text: shown.text,
      pieces: [...shown.pieces, ...this.#waiting.splice(0).map(({ piece }) => piece)],
    };
  }

  #offsets(): Pick<Piece, 'offset' | 'offset_codePoints'> {
    return { offset: this.#decodedEnd, offset_codePoints: this.#decodedEnd_codePoints };
  }

  #decode(text: string): void {
    this.#decodedEnd += text.length;
    this.#decodedEnd_codePoints += codePointsIn(text);
  }

  #show(text: string): Shown {
    this.#shownEnd += text.length;
    // A token that a stop string cuts belongs to the answer when some of its text does.
    const isShown = ({ piece, end }: { piece: Piece; end: number }) =>
      this.stopped ? piece.offset < this.#shownEnd : end <= this.#shownEnd;
    const pieces: Piece[] = [];
    while (this.#waiting.length > 0 && isShown(this.#waiting[0]!)) pieces.push(this.#waiting.shift()!.piece);
    return { text, pieces };
  }
}

/** Offsets are those of the echoed text. The BOS and the first space that the tokenizer puts before it have no place there. */
function promptPieces(
  tokens: TokenText,
  job: ChoiceJob,
  logprobs: readonly (TokenLogprob | null)[],
): Piece[] {
  const decoder = tokens.createDecoder({ showSpecial: true });
  const echo = job.echo ?? '';
  let text = '';
  const starts = logprobs.map((_, position) => {
    const start = text.length;
    text += decoder.push(job.request.promptTokenIds[position]!);
    return start;
  });
  text += decoder.flush();
  const before = text.endsWith(echo) ? text.length - echo.length : Math.max(0, text.indexOf(echo));
  let [counted, offset_codePoints] = [0, 0];
  return logprobs.map((logprob, position) => {
    const offset = Math.min(Math.max(0, starts[position]! - before), echo.length);
    offset_codePoints += codePointsIn(echo.slice(counted, offset));
    counted = offset;
    return { tokenId: job.request.promptTokenIds[position]!, offset, offset_codePoints, logprob };
  });
}

const codePointsIn = (text: string): number => [...text].length;

/**
 * Stop strings in a stream of text. Text that could still become a stop string is held back, so no part of
 * one is ever shown; the result does not depend on how the text was cut into pieces.
 */
export class StopMatcher {
  readonly #stops: readonly string[];
  #held = '';

  constructor(stops: readonly string[]) {
    this.#stops = stops;
  }

  /** `text` may be shown now. After `stopped`, nothing more comes. */
  push(piece: string): { readonly text: string; readonly stopped: boolean } {
    this.#held += piece;
    const cut = firstCompleted(this.#held, this.#stops);
    const shown = cut ?? this.#held.length - heldBack(this.#held, this.#stops);
    const text = this.#held.slice(0, shown);
    this.#held = cut === undefined ? this.#held.slice(shown) : '';
    return { text, stopped: cut !== undefined };
  }

  /** What was held back, when the stream ends without a stop string. */
  flush(): string {
    const text = this.#held;
    this.#held = '';
    return text;
  }
}

/** Where the stop string that is complete first begins: what a reader of single characters would find. */
function firstCompleted(text: string, stops: readonly string[]): number | undefined {
  let start: number | undefined;
  let endMin = Number.POSITIVE_INFINITY;
  for (const stop of stops) {
    const index = text.indexOf(stop);
    const end = index + stop.length;
    if (index < 0 || end > endMin || (end === endMin && index >= start!)) continue;
    start = index;
    endMin = end;
  }
  return start;
}

/** The length of the longest end of `text` that begins a stop string. */
function heldBack(text: string, stops: readonly string[]): number {
  let longest = 0;
  for (const stop of stops) {
    for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
      if (text.endsWith(stop.slice(0, length))) longest = length;
    }
  }
  return longest;
}
