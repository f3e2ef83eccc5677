/** The two answer formats, chat and legacy completions, behind one table, so that one path serves both. */
import type { FinishReason } from '../../shared/openai.ts';
import { chatLogprobs, completionLogprobs } from './logprobs.ts';
import type { TokenText } from './served-model.ts';
import type { Piece } from './text-assembler.ts';

/** A choice once it is whole. */
export type WholeChoice = {
  readonly index: number;
  readonly text: string;
  readonly pieces: readonly Piece[];
  readonly reason: FinishReason;
};

export type Wire = {
  readonly idPrefix: string;
  readonly object: string;
  readonly chunkObject: string;
  /** The first chunk's choice, or undefined where the format has none. */
  open(index: number): object | undefined;
  text(index: number, text: string, pieces: readonly Piece[] | undefined): object;
  finish(index: number, reason: FinishReason): object;
  whole(choice: WholeChoice, withLogprobs: boolean): object;
};

export const chatWire = (tokens: TokenText): Wire => ({
  idPrefix: 'chatcmpl-',
  object: 'chat.completion',
  chunkObject: 'chat.completion.chunk',
  open: (index) => ({
    index,
    delta: { role: 'assistant', content: '' },
    logprobs: null,
    finish_reason: null,
  }),
  text: (index, content, pieces) => ({
    index,
    delta: { content },
    logprobs: pieces === undefined ? null : chatLogprobs(tokens, pieces),
    finish_reason: null,
  }),
  finish: (index, reason) => ({ index, delta: {}, logprobs: null, finish_reason: reason }),
  whole: ({ index, text, pieces, reason }, withLogprobs) => ({
    index,
    message: { role: 'assistant', content: text, refusal: null },
    logprobs: withLogprobs ? chatLogprobs(tokens, pieces) : null,
    finish_reason: reason,
  }),
});

export const completionWire = (tokens: TokenText): Wire => ({
  idPrefix: 'cmpl-',
  object: 'text_completion',
  chunkObject: 'text_completion',
  open: () => undefined,
  text: (index, text, pieces) => ({
    index,
    text,
    logprobs: pieces === undefined ? null : completionLogprobs(tokens, pieces),
    finish_reason: null,
  }),
  finish: (index, reason) => ({ index, text: '', logprobs: null, finish_reason: reason }),
  whole: ({ index, text, pieces, reason }, withLogprobs) => ({
    index,
    text,
    logprobs: withLogprobs ? completionLogprobs(tokens, pieces) : null,
    finish_reason: reason,
  }),
});
