/**
 * Tokens of one choice into the text that a client sees: decoded, searched for stop strings, and with every
 * token's log-probability kept beside the text that it stands for.
 */

import type { TokenDecoder } from '../model/token-bytes.ts';
import type { TokenLogprob } from '../serving/engine.ts';
import { createStopMatcher } from './stop-matcher.ts';

/** One token for a logprobs answer. */
export type Piece = {
  readonly tokenId: number;
  /** Where its text begins in the choice's text, in UTF-16 units. */
  readonly offset: number;
  /** Null for a prompt's first token: nothing precedes it. */
  readonly logprob: TokenLogprob | null;
};

export type Shown = {
  readonly text: string;
  readonly pieces: readonly Piece[];
  /** A stop string came: nothing after `text` is shown. */
  readonly stopped: boolean;
};

export type TextAssembler = {
  push(tokenId: number, logprob: TokenLogprob | undefined): Shown;
  /** What was held back, when generation ends by itself; `last` is of a token without text. */
  finish(last?: TokenLogprob): Shown;
};

export type AssemblerOptions = {
  readonly decoder: TokenDecoder;
  readonly stops: readonly string[];
  /** Stop strings count only after so many tokens. */
  readonly minTokens: number;
  /** Length of an echoed prompt before the choice's own text. */
  readonly offset: number;
};

export function createTextAssembler(options: AssemblerOptions): TextAssembler {
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
