/**
 * What the API needs to serve one model: its name, its engine, and the way between text and token ids.
 * `main.ts` builds it from the model store; tests build it from whatever they need.
 */
import type { ChatMessage } from '../../shared/openai.ts';
import type { Engine } from '../serving/engine.ts';

/** Text out of token ids, one at a time; bytes that end inside a character wait for the rest. */
export type TokenDecoder = {
  push(tokenId: number): string;
  /** What is left when no token follows: an incomplete character shows as U+FFFD. */
  flush(): string;
};

export type TokenText = {
  /** Special tokens that the text spells out are recognised; the model's BOS is added where it wants one. */
  encodePrompt(text: string): Int32Array;
  /** Under the model's chat template, ready for the answer. @throws MaskrouteError when it refuses. */
  encodeChat(messages: readonly ChatMessage[]): Int32Array;
  /** The exact bytes of one token; for a special token, those of its name. */
  tokenBytes(tokenId: number): Uint8Array;
  /** `showSpecial: false` leaves special tokens out of the text. */
  createDecoder(options: { readonly showSpecial: boolean }): TokenDecoder;
  /** No token is longer, so a longer prompt needs no tokenizing to be too long. */
  readonly tokenBytesMax: number;
};

export type ServedModel = {
  readonly name: string;
  /** Unix time, seconds. */
  readonly created_s: number;
  readonly engine: Engine;
  readonly text: TokenText;
  /** Ids that end an answer unless `ignore_eos`. */
  readonly endTokenIds: readonly number[];
};
