/**
 * The bytes of each token, as the tokenizer's decoder makes them; and text from tokens one at a time, so that a stream has
 * the same text as decoding all ids at once. The table is plain data, so that the thread that answers requests decodes
 * without a tokenizer.
 */

/** GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 is itself, the rest follows from U+0100. */
const BYTE_OF_CHARACTER: ReadonlyMap<string, number> = (() => {
  const map = new Map<string, number>();
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable =
      (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
    map.set(String.fromCharCode(printable ? byte : next++), byte);
  }
  return map;
})();

/** The same by the character's code, which takes a tenth of the time for a vocabulary. */
const BYTE_OF_CODE: readonly (number | undefined)[] = Array.from({ length: 512 }, (_, code) =>
  BYTE_OF_CHARACTER.get(String.fromCharCode(code)),
);

/** The stand-in of each byte. */
export const BYTE_NAMES: readonly string[] = (() => {
  const names: string[] = [];
  for (const [name, byte] of BYTE_OF_CHARACTER) names[byte] = name;
  return names;
})();

const utf8 = new TextEncoder();
const NO_BYTES = new Uint8Array(0);

/** The bytes of all tokens, concatenated. Plain data, which can be sent to another thread. */
export type TokenTable = {
  readonly bytes: Uint8Array;
  /** Token `id` is `bytes` from `ends[id]` to `ends[id + 1]`; empty when there is no such token. */
  readonly ends: Int32Array;
  readonly specialIds: readonly number[];
  /** Whether the encoder puts a space before a text. */
  readonly leadingSpace: boolean;
};

/** Text from token ids, one at a time; an incomplete character waits for its other bytes. */
export type TokenDecoder = {
  push(tokenId: number): string;
  /** Call at the end: an incomplete character becomes U+FFFD. */
  flush(): string;
};

export type TokenReader = {
  /** The bytes of a token; for a special token, the bytes of its name; empty for an id without a token. */
  tokenBytes(tokenId: number): Uint8Array;
  /** `showSpecial: false` leaves special tokens out of the text. */
  createDecoder(options: { readonly showSpecial: boolean }): TokenDecoder;
  /** Bytes of the longest token; from it follows when a prompt is too long without encoding it. */
  readonly tokenBytesMax: number;
};

export function createTokenReader({ bytes, ends, specialIds }: TokenTable): TokenReader {
  const special = new Set(specialIds);
  const tokenBytes = (id: number) =>
    id >= 0 && id + 1 < ends.length ? bytes.subarray(ends[id]!, ends[id + 1]!) : NO_BYTES;
  let tokenBytesMax = 1;
  for (let id = 0; id + 1 < ends.length; id++)
    tokenBytesMax = Math.max(tokenBytesMax, ends[id + 1]! - ends[id]!);
  return {
    tokenBytes,
    createDecoder({ showSpecial }) {
      const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
      return {
        push: (id) =>
          !showSpecial && special.has(id) ? '' : decoder.decode(tokenBytes(id), { stream: true }),
        flush: () => decoder.decode(),
      };
    },
    tokenBytesMax,
  };
}

type AddedToken = { readonly id: number; readonly content: string; readonly special?: boolean };

/** `json`: a tokenizer.json. `names`: all of its vocabulary. */
export function tokenTable(
  json: object,
  added: readonly AddedToken[],
  names: readonly (readonly [string, number])[] = vocabularyOf(json),
): TokenTable {
  const parts = decoderParts((json as { decoder?: DecoderJson | null }).decoder);
  const convert = parts.some((part) => part.type === 'ByteLevel') ? byteLevel : sentencePiece;
  const table: Uint8Array[] = [];
  for (const [name, id] of names) table[id] = convert(name);
  // Runs of spaces are such tokens of a Gemma. Control tokens keep their names, by which templates know them.
  const isText = convert === sentencePiece;
  for (const { id, content, special } of added)
    table[id] = isText && special !== true ? sentencePiece(content) : utf8.encode(content);
  const ends = new Int32Array(table.length + 1);
  for (let id = 0; id < table.length; id++) ends[id + 1] = ends[id]! + (table[id]?.length ?? 0);
  const bytes = new Uint8Array(ends[table.length]!);
  table.forEach((one, id) => {
    bytes.set(one, ends[id]!);
  });
  return {
    bytes,
    ends,
    specialIds: added.filter(({ special }) => special === true).map(({ id }) => id),
    leadingSpace: parts.some(
      ({ type, start = 0, prepend_scheme: scheme, add_prefix_space: adds }) =>
        (type === 'Strip' && start > 0) ||
        (type === 'Metaspace' && scheme !== 'never' && (scheme !== undefined || adds !== false)),
    ),
  };
}

/** Names and ids of all tokens. A unigram model is a list in order of ids, others are a record. `json`: a tokenizer.json. */
export function vocabularyOf(json: object): [string, number][] {
  const { vocab } = (json as VocabularyJson).model;
  if (!Array.isArray(vocab)) return Object.entries(vocab);
  return (vocab as [string, number][]).map(([piece], id) => [piece, id]);
}

type VocabularyJson = {
  readonly model: {
    readonly vocab: Readonly<Record<string, number>> | readonly (readonly [string, number])[];
  };
};
type DecoderJson = {
  readonly type: string;
  readonly prepend_scheme?: string;
  readonly add_prefix_space?: boolean;
  readonly start?: number;
  readonly decoders?: readonly DecoderJson[];
};

const decoderParts = (decoder: DecoderJson | null | undefined): readonly DecoderJson[] =>
  decoder?.type === 'Sequence' ? (decoder.decoders ?? []) : decoder ? [decoder] : [];

function byteLevel(token: string): Uint8Array {
  const bytes = new Uint8Array(token.length);
  for (let i = 0; i < token.length; i++) {
    const byte = BYTE_OF_CODE[token.charCodeAt(i)];
    if (byte === undefined) return damaged(token);
    bytes[i] = byte;
  }
  return bytes;
}

/** A character outside the alphabet is only in a damaged vocabulary; it is shown as it is. */
const damaged = (token: string): Uint8Array =>
  Uint8Array.from(
    [...token].flatMap((character) => BYTE_OF_CHARACTER.get(character) ?? [...utf8.encode(character)]),
  );

/** U+2581 is a space; `<0x0A>` is a byte of a character without a token. */
function sentencePiece(token: string): Uint8Array {
  const byte = /^<0x([0-9A-F]{2})>$/.exec(token);
  return byte === null
    ? utf8.encode(token.replaceAll('\u2581', ' '))
    : Uint8Array.of(Number.parseInt(byte[1]!, 16));
}
