/**
 * Text to token ids and back. @huggingface/tokenizers encodes; the way back is by bytes, token by token, so that
 * a stream shows exactly what decoding all ids at once would.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers';
import { tokenBytesOf } from './token-bytes.ts';

export const TOKENIZER_FILE = 'tokenizer.json';
export const TOKENIZER_CONFIG_FILE = 'tokenizer_config.json';

export type EncodeOptions = {
  /** Put BOS first where the model wants one. Default true. */
  readonly addSpecial?: boolean;
  /** Whether special tokens that the text spells out are recognised. Default true. */
  readonly parseSpecial?: boolean;
};

/** Text out of token ids, one at a time; bytes that end inside a character wait for the rest. */
export type TokenDecoder = {
  push(tokenId: number): string;
  /** What is left when no token follows: an incomplete character shows as U+FFFD. */
  flush(): string;
};

export type Tokenizer = {
  encode(text: string, options?: EncodeOptions): Int32Array;
  decode(tokenIds: ArrayLike<number>, options?: { readonly showSpecial?: boolean }): string;
  /** The exact bytes of one token; for a special token, those of its name; none for an id without a token. */
  tokenBytes(tokenId: number): Uint8Array;
  /** The id of a token by its name, e.g. `<|im_end|>`. */
  tokenId(name: string): number | undefined;
  /** `showSpecial: false` leaves special tokens out of the text. */
  createDecoder(options: { readonly showSpecial: boolean }): TokenDecoder;
  /** No token is longer. */
  readonly tokenBytesMax: number;
};

/** Reads a model's folder in the store. */
export async function loadTokenizer(folder: string): Promise<Tokenizer> {
  const [json, config] = await Promise.all(
    [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE].map(async (name) =>
      JSON.parse(await readFile(join(folder, name), 'utf8')),
    ),
  );
  return createTokenizer(json, config);
}

type AddedTokenJson = { readonly id: number; readonly content: string; readonly special?: boolean };

/** @throws Error when the files are not what the library reads. */
export function createTokenizer(json: object, config: object): Tokenizer {
  const library = new LibraryTokenizer(json, config);
  const added = (json as { added_tokens?: readonly AddedTokenJson[] }).added_tokens ?? [];
  const special = new Set(added.filter((token) => token.special === true).map((token) => token.id));
  const bytesOf = tokenBytesOf(json, (id) => library.id_to_token(id), added);

  function createDecoder({ showSpecial }: { readonly showSpecial: boolean }): TokenDecoder {
    const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
    return {
      push: (id) =>
        !showSpecial && special.has(id) ? '' : decoder.decode(bytesOf.bytes(id), { stream: true }),
      flush: () => decoder.decode(),
    };
  }

  return {
    encode(text, { addSpecial = true, parseSpecial = true } = {}) {
      if (parseSpecial) return Int32Array.from(library.encode(text, { add_special_tokens: addSpecial }).ids);
      const plain = plainIds(library, text);
      const prefix = addSpecial ? library.encode('', { add_special_tokens: true }).ids : [];
      return Int32Array.from([...prefix, ...plain]);
    },
    decode(tokenIds, { showSpecial = true } = {}) {
      const decoder = createDecoder({ showSpecial });
      const text = Array.from(tokenIds, (id) => decoder.push(id)).join('') + decoder.flush();
      // As a whole, a text is what was encoded; a stream goes on from a prompt and keeps its space.
      return bytesOf.leadingSpace && text.startsWith(' ') ? text.slice(1) : text;
    },
    tokenBytes: bytesOf.bytes,
    tokenId: (name) => library.token_to_id(name),
    createDecoder,
    tokenBytesMax: bytesOf.max,
  };
}

/** The library's own steps without the one that looks for added tokens. */
function plainIds(library: LibraryTokenizer, text: string): number[] {
  if (text === '') return [];
  const normalized = library.normalizer === null ? text : library.normalizer.normalize(text);
  const pieces =
    library.pre_tokenizer === null
      ? [normalized]
      : library.pre_tokenizer.pre_tokenize(normalized, { section_index: 0 });
  return library
    .model!.encode(pieces)
    .map((token: string) => library.token_to_id(token) ?? library.model!.unk_token_id!);
}
