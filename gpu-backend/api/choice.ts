/**
 * Runs one choice: the engine's tokens become the text events of one entry in `choices`. Events have whole characters and
 * never a part of a stop string; each token's log-probability comes with its text.
 */
import { cancellation, MaskrouteError } from '../../shared/wire/errors.ts';
import type { FinishReason } from '../../shared/wire/openai.ts';
import type {
  Engine,
  EngineEvent,
  GenerateRequest,
  PredictedTokens,
  Timings,
  TokenLogprob,
} from '../engine/engine.ts';
import type { TokenDecoder } from '../model/tokenizer/token-bytes.ts';
import type { AnswerForm } from './answer-form.ts';
import type { TokenText } from './parts.ts';

export type ChoiceJob = {
  /** Position in the answer's `choices`. */
  readonly index: number;
  /** True for the first choice of each prompt: `usage` counts a prompt's tokens once. */
  readonly countsPrompt: boolean;
  readonly request: GenerateRequest;
  readonly stops: readonly string[];
  /** The prompt's text, if the answer repeats it. */
  readonly echo: string | undefined;
  /** Whether log-probabilities include the stop token, as in the legacy format. */
  readonly scoresStopToken: boolean;
  /** Structured output and tool calls; without, any text. */
  readonly form?: AnswerForm;
};

/** The state of a choice, kept up to date while it runs, so that an aborted one is accounted for too. */
export type Progress = {
  completionTokens: number;
  /** Tokens that were computed and not read yet: they are paid for when the client leaves. None after a stop string. */
  unreadTokens: number;
  cachedTokens: number;
  /** Of a predicted choice, once it has finished. */
  predicted: PredictedTokens | undefined;
  /** This and the next two are undefined until the engine has finished the choice. Times are `performance.now()`. */
  timings: Timings | undefined;
  finishReason: FinishReason | undefined;
  finishedAt_ms: number | undefined;
  firstTokenAt_ms: number | undefined;
  tokenAt_ms: number | undefined;
  /** Time between consecutive tokens. */
  readonly tokenGaps_ms: number[];
};

/** Those that were read, and those that were not. */
export const computedTokens = ({
  completionTokens,
  unreadTokens,
}: Pick<Progress, 'completionTokens' | 'unreadTokens'>): number => completionTokens + unreadTokens;

export const notBegun = (): Progress => ({
  completionTokens: 0,
  unreadTokens: 0,
  cachedTokens: 0,
  predicted: undefined,
  tokenGaps_ms: [],
  firstTokenAt_ms: undefined,
  tokenAt_ms: undefined,
  timings: undefined,
  finishReason: undefined,
  finishedAt_ms: undefined,
});

export type ChoiceEvent =
  | ({ readonly type: 'text'; readonly index: number } & Shown)
  /** The choice's tool call number `call` begins; its arguments follow as pieces of JSON. */
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

/** One token's entry in the log-probabilities. */
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
 * Leaving the iteration early cancels the engine's request.
 * @throws MaskrouteError as `Engine.generate`, and the reason of `signal` when it aborts.
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
  const onToken = () => {
    if (!answer.stopped) progress.unreadTokens++;
  };
  try {
    for await (const event of engine.generate(job.request, AbortSignal.any([signal, own.signal]), onToken)) {
      // After a stop string only the engine's `finished` event counts.
      if (answer.stopped && event.type !== 'finished') continue;
      // Before its text is handed out: a reader that leaves with it has still received the token.
      if (event.type === 'token') noteToken(progress, performance.now());
      const { text, pieces } = answer.take(event);
      // Before it, too: tokens behind a stop string are not paid for, however slowly the text before it is read.
      if (answer.stopped) {
        progress.unreadTokens = 0;
        own.abort();
      }
      if (text !== '' || pieces.length > 0) yield { type: 'text', index, text, pieces };
      if (event.type !== 'finished') continue;
      const { cachedTokens, timings } = event;
      const predicted = event.predicted && inAnswer(event.predicted, progress.completionTokens);
      Object.assign(progress, { cachedTokens, predicted, timings, finishedAt_ms: performance.now() });
      const reason = answer.stopped ? 'stop' : finishReason(event.reason, signal);
      progress.finishReason = reason;
      yield { type: 'finished', index, reason };
      return;
    }
    throw new MaskrouteError('engine_failed', 'The engine ended a request without a result.');
  } finally {
    own.abort();
  }
}

function noteToken(progress: Progress, now_ms: number): void {
  progress.completionTokens++;
  progress.unreadTokens--;
  if (progress.tokenAt_ms !== undefined) progress.tokenGaps_ms.push(now_ms - progress.tokenAt_ms);
  progress.firstTokenAt_ms ??= now_ms;
  progress.tokenAt_ms = now_ms;
}

/** A stop string may end the answer within tokens that were predicted rightly: those behind it were computed in vain. */
function inAnswer({ by, accepted, rejected }: PredictedTokens, completionTokens: number): PredictedTokens {
  const behind = Math.max(0, accepted - completionTokens);
  return { by, accepted: accepted - behind, rejected: rejected + behind };
}

function finishReason(reason: 'stop' | 'length' | 'cancelled', signal: AbortSignal): FinishReason {
  if (reason === 'cancelled') throw cancellation(signal);
  return reason;
}

/** The visible text of one choice: the echoed prompt, then the answer. */
class ChoiceText {
  /** A stop string was found: nothing more is shown. */
  stopped = false;
  readonly #tokens: TokenText;
  readonly #job: ChoiceJob;
  readonly #decoder: TokenDecoder;
  readonly #stops: StopMatcher;
  #echo: string;
  #tokenCount = 0;
  /** Lengths of the decoded and of the shown text, including the echo. */
  #decodedEnd: number;
  #decodedEnd_codePoints: number;
  #shownEnd: number;
  /** Tokens whose text is held back. */
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
    // A token without text begins a character, and is shown with it.
    const end = this.#decodedEnd + (decoded === '' ? 1 : 0);
    if (piece !== undefined) this.#waiting.push({ piece, end });
    // Stop strings are not searched before min_tokens.
    if (++this.#tokenCount < this.#job.request.minTokens) return this.#show(decoded);
    const { text, stopped } = this.#stops.push(decoded);
    this.stopped = stopped;
    return this.#show(text);
  }

  /** The held-back text, when generation has ended; `last`: log-probability of the stop token, which has no text. */
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
    // A token that the stop string cuts counts if some of its text is shown.
    const isShown = ({ piece, end }: { piece: Piece; end: number }) =>
      this.stopped ? piece.offset < this.#shownEnd : end <= this.#shownEnd;
    const pieces: Piece[] = [];
    while (this.#waiting.length > 0 && isShown(this.#waiting[0]!)) pieces.push(this.#waiting.shift()!.piece);
    return { text, pieces };
  }
}

/** Pieces of the prompt, with offsets in the echoed text, which lacks the tokenizer's BOS token and leading space. */
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
 * Finds stop strings in streamed text. Text that may still become a stop string is held back, so no part of a stop string
 * is ever shown. The result does not depend on how the text is cut into pieces.
 */
export class StopMatcher {
  readonly #stops: readonly string[];
  #held = '';

  constructor(stops: readonly string[]) {
    this.#stops = stops;
  }

  /** @returns `text`: may be shown now; `stopped`: a stop string was found, so the text is over. */
  push(piece: string): { readonly text: string; readonly stopped: boolean } {
    this.#held += piece;
    const cut = firstCompleted(this.#held, this.#stops);
    const shown = cut ?? this.#held.length - heldBack(this.#held, this.#stops);
    const text = this.#held.slice(0, shown);
    this.#held = cut === undefined ? this.#held.slice(shown) : '';
    return { text, stopped: cut !== undefined };
  }

  /** The held-back text, when the stream has ended without a stop string. */
  flush(): string {
    const text = this.#held;
    this.#held = '';
    return text;
  }
}

/** Start of the stop string that ends first, as if the text were read character by character; of these the leftmost. */
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

/** Length of the longest suffix of `text` that is a proper prefix of a stop string. */
export function heldBack(text: string, stops: readonly string[]): number {
  let longest = 0;
  for (const stop of stops) {
    for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
      if (text.endsWith(stop.slice(0, length))) longest = length;
    }
  }
  return longest;
}
