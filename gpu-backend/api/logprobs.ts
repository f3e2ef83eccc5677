/** Log-probabilities as the two OpenAI formats write them. */
import type { ChatLogprobs, CompletionLogprobs, TopLogprob } from '../../shared/openai.ts';
import type { TokenText } from './served-model.ts';
import type { Piece } from './text-assembler.ts';

/** What OpenAI writes for an impossible token; JSON has no minus infinity. */
const LOGPROB_MIN = -9999;

const finite = (logprob: number): number => Math.max(logprob, LOGPROB_MIN);

export function chatLogprobs(text: TokenText, pieces: readonly Piece[]): ChatLogprobs {
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
export function completionLogprobs(text: TokenText, pieces: readonly Piece[]): CompletionLogprobs {
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
