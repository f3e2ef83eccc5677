/** One choice: the engine's tokens become the text events of one entry in `choices`. */

import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { FinishReason } from '../../shared/wire/openai.ts';
import type { Engine, EngineEvent, GenerateRequest, Timings, TokenLogprob } from '../engine/engine.ts';
import type { TokenDecoder } from '../model/tokenizer/token-bytes.ts';
import type { TokenText } from './served-model.ts';

/**
 * Stop strings in a stream of text. Text that could still become a stop string is held back, so no part of
 * one is ever shown; the result does not depend on how the text was cut into pieces.
 */
type StopMatcher = {
  /** `text` may be shown now. After `stopped`, nothing more comes. */
  push(piece: string): { readonly text: string; readonly stopped: boolean };
  /** What was held back, when the stream ends without a stop string. */
  flush(): string;
};

export function createStopMatcher(stops: readonly string[]): StopMatcher {
  let held = '';
  return {
    push(piece) {
      held += piece;
      const cut = firstCompleted(held, stops);
      const stopped = cut !== undefined;
      const shown = cut ?? held.length - heldBack(held, stops);
      const text = held.slice(0, shown);
      held = stopped ? '' : held.slice(shown);
      return { text, stopped };
    },
    flush() {
      const text = held;
      held = '';
      return text;
    },
  };
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

/*
 * Tokens of one choice into the text that a client sees: decoded, searched for stop strings, and with every
 * token's log-probability kept beside the text that it stands for.
 */

/** One token for a logprobs answer. */
export type Piece = {
  readonly tokenId: number;
  /** Where its text begins in the choice's text, in UTF-16 units. */
  readonly offset: number;
  /** Null for a prompt's first token: nothing precedes it. */
  readonly logprob: TokenLogprob | null;
};

type Shown = {
  readonly text: string;
  readonly pieces: readonly Piece[];
  /** A stop string came: nothing after `text` is shown. */
  readonly stopped: boolean;
};

type TextAssembler = {
  push(tokenId: number, logprob: TokenLogprob | undefined): Shown;
  /** What was held back, when generation ends by itself; `last` is of a token without text. */
  finish(last?: TokenLogprob): Shown;
};

type AssemblerOptions = {
  readonly decoder: TokenDecoder;
  readonly stops: readonly string[];
  /** Stop strings count only after so many tokens. */
  readonly minTokens: number;
  /** Length of an echoed prompt before the choice's own text. */
  readonly offset: number;
};

function createTextAssembler(options: AssemblerOptions): TextAssembler {
  const matcher = createStopMatcher(options.stops);
  const waiting: { piece: Piece; end: number }[] = [];
  let tokens = 0;
  let decodedEnd = options.offset;
  let shownEnd = options.offset;

  function show(text: string, stopped: boolean): Shown {
    shownEnd += text.length;
    const pieces: Piece[] = [];
    // A token that a stop string cuts belongs to the answer when some of its text does.
    const visible = (entry: (typeof waiting)[number]) =>
      stopped ? entry.piece.offset < shownEnd : entry.end <= shownEnd;
    while (waiting.length > 0 && visible(waiting[0]!)) pieces.push(waiting.shift()!.piece);
    return { text, pieces, stopped };
  }

  return {
    push(tokenId, logprob) {
      tokens++;
      const decoded = options.decoder.push(tokenId);
      const offset = decodedEnd;
      decodedEnd += decoded.length;
      if (logprob !== undefined) waiting.push({ piece: { tokenId, offset, logprob }, end: decodedEnd });
      if (tokens < options.minTokens) return show(decoded, false);
      const { text, stopped } = matcher.push(decoded);
      return show(text, stopped);
    },
    finish(last) {
      const rest = options.decoder.flush();
      decodedEnd += rest.length;
      if (last !== undefined) {
        const piece = { tokenId: last.tokenId, offset: decodedEnd, logprob: last };
        waiting.push({ piece, end: decodedEnd });
      }
      const matched = matcher.push(rest);
      if (matched.stopped) return show(matched.text, true);
      const shown = show(matched.text + matcher.flush(), false);
      const pieces = [...shown.pieces, ...waiting.splice(0).map((entry) => entry.piece)];
      return { ...shown, pieces };
    },
  };
}

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
};

/** What is known of a choice so far; kept up to date while it runs, so that an abort can be accounted for. */
export type Progress = {
  completionTokens: number;
  cachedTokens: number;
  timings: Timings | undefined;
};

export type ChoiceEvent =
  | {
      readonly type: 'text';
      readonly index: number;
      readonly text: string;
      readonly pieces: readonly Piece[];
    }
  | { readonly type: 'finished'; readonly index: number; readonly reason: FinishReason };

/**
 * @throws MaskrouteError what the engine throws, and `cancelled` when `signal` ended it. Leaving the
 * iteration early cancels the engine's request.
 */
export async function* runChoice(
  engine: Engine,
  text: TokenText,
  job: ChoiceJob,
  progress: Progress,
  signal: AbortSignal,
): AsyncGenerator<ChoiceEvent, void> {
  const own = new AbortController();
  const answer = createAnswer(text, job);
  let stopped = false;
  try {
    for await (const event of engine.generate(job.request, AbortSignal.any([signal, own.signal]))) {
      // After a stop string the engine only has to say that it stopped; tokens in between do not count.
      if (stopped && event.type !== 'finished') continue;
      const shown = answer.take(event);
      if (shown.text !== '' || shown.pieces.length > 0) {
        yield { type: 'text', index: job.index, text: shown.text, pieces: shown.pieces };
      }
      if (shown.stopped && !stopped) {
        stopped = true;
        own.abort();
      }
      if (event.type === 'token') progress.completionTokens++;
      if (event.type !== 'finished') continue;
      progress.cachedTokens = event.cachedTokens;
      progress.timings = event.timings;
      yield {
        type: 'finished',
        index: job.index,
        reason: stopped ? 'stop' : finishReason(event.reason, signal),
      };
      return;
    }
    throw new MaskrouteError('engine_failed', 'The engine ended a request without an end.');
  } finally {
    own.abort();
  }
}

function finishReason(reason: 'stop' | 'length' | 'cancelled', signal: AbortSignal): FinishReason {
  switch (reason) {
    case 'stop':
    case 'length':
      return reason;
    case 'cancelled':
      throw cancellation(signal);
  }
}

/** Why `signal` aborted, as far as a client is told. */
export const cancellation = (signal: AbortSignal): MaskrouteError =>
  signal.reason instanceof MaskrouteError
    ? signal.reason
    : new MaskrouteError('cancelled', 'The request was cancelled.');

/** The echoed prompt first, then what the assembler shows. */
function createAnswer(text: TokenText, job: ChoiceJob): { take(event: EngineEvent): Shown } {
  const assembler = createTextAssembler({
    decoder: text.createDecoder({ showSpecial: false }),
    stops: job.stops,
    minTokens: job.request.minTokens,
    offset: job.echo?.length ?? 0,
  });
  let echo = job.echo;
  let stopped = false;
  const takeBody = (event: EngineEvent): Shown => {
    switch (event.type) {
      case 'prompt':
        return { text: '', pieces: promptPieces(text, job, event.logprobs), stopped: false };
      case 'token':
        return assembler.push(event.tokenId, event.logprob);
      case 'finished':
        if (stopped) return { text: '', pieces: [], stopped };
        return assembler.finish(job.scoresStopToken ? event.stopLogprob : undefined);
    }
  };
  return {
    take(event) {
      const shown = takeBody(event);
      stopped ||= shown.stopped;
      const withEcho = { ...shown, text: (echo ?? '') + shown.text };
      echo = undefined;
      return withEcho;
    },
  };
}

/** Offsets are those of the echoed text, in which the BOS that the model wants has no place. */
function promptPieces(text: TokenText, job: ChoiceJob, logprobs: readonly (TokenLogprob | null)[]): Piece[] {
  const decoder = text.createDecoder({ showSpecial: true });
  const echo = job.echo ?? '';
  let offset = 0;
  return logprobs.map((logprob, position) => {
    const tokenId = job.request.promptTokenIds[position]!;
    const piece = { tokenId, offset, logprob };
    const decoded = decoder.push(tokenId);
    if (echo.startsWith(decoded, offset)) offset += decoded.length;
    return piece;
  });
}
