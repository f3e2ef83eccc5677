/** The two answer formats, chat and legacy completions, behind one table, so that one path serves both. */
import type { ChatLogprobs, CompletionLogprobs, FinishReason, TopLogprob } from '../../shared/wire/openai.ts';
import type { Piece } from './choice.ts';
import type { TokenText } from './served-model.ts';

/* Log-probabilities as the two OpenAI formats write them. */

/** What OpenAI writes for an impossible token; JSON has no minus infinity. */
const LOGPROB_MIN = -9999;

const finite = (logprob: number): number => Math.max(logprob, LOGPROB_MIN);

function chatLogprobs(text: TokenText, pieces: readonly Piece[]): ChatLogprobs {
  const entry = (tokenId: number, logprob: number): TopLogprob => {
    const bytes = text.tokenBytes(tokenId);
    return {
      token: new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes),
      logprob: finite(logprob),
      bytes: [...bytes],
    };
  };
  return {
    content: pieces.flatMap(({ tokenId, logprob }) =>
      logprob === null
        ? []
        : [
            {
              ...entry(tokenId, logprob.logprob),
              top_logprobs: logprob.top.map((top) => entry(top.tokenId, top.logprob)),
            },
          ],
    ),
  };
}

/** The chosen token is always among the alternatives, as OpenAI has it: up to N + 1 entries. */
function completionLogprobs(text: TokenText, pieces: readonly Piece[]): CompletionLogprobs {
  return {
    tokens: pieces.map((piece) => tokenName(text, piece.tokenId)),
    token_logprobs: pieces.map(({ logprob }) => (logprob === null ? null : finite(logprob.logprob))),
    top_logprobs: pieces.map(({ logprob }) => {
      if (logprob === null) return null;
      const names: Record<string, number> = {};
      for (const { tokenId, logprob: value } of [...logprob.top, logprob]) {
        const name = tokenName(text, tokenId);
        // Two ids may share a name; the likelier one comes first and keeps it.
        if (!Object.hasOwn(names, name)) names[name] = finite(value);
      }
      return names;
    }),
    text_offset: pieces.map((piece) => piece.offset),
  };
}

/** A token whose bytes are not whole characters is written `bytes:\xe2\x82`, as OpenAI does. */
function tokenName(text: TokenText, tokenId: number): string {
  const bytes = text.tokenBytes(tokenId);
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return `bytes:${[...bytes].map((byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('')}`;
  }
}

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
