/** The bytes that a token stands for, by what the tokenizer's decoder does with it. */

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

const utf8 = new TextEncoder();
const NO_BYTES = new Uint8Array(0);

export type TokenBytes = {
  bytes(tokenId: number): Uint8Array;
  /** Whether a text begins with a space that the encoder put there. */
  readonly leadingSpace: boolean;
  /** Of the longest token. */
  readonly max: number;
};

/** `name(id)`: a token as the vocabulary has it. */
export function tokenBytesOf(
  json: object,
  name: (id: number) => string | undefined,
  added: readonly { readonly id: number; readonly content: string }[],
): TokenBytes {
  const parts = decoderParts((json as { decoder?: DecoderJson | null }).decoder);
  const convert = parts.some((part) => part.type === 'ByteLevel') ? byteLevel : sentencePiece;
  const table: Uint8Array[] = [];
  for (const token of added) table[token.id] = utf8.encode(token.content);
  let max = 1;
  const count = vocabularyEnd(json, added);
  for (let id = 0; id < count; id++) {
    const token = name(id);
    if (token !== undefined) table[id] ??= convert(token);
    max = Math.max(max, table[id]?.length ?? 0);
  }
  const leadingSpace = parts.some((part) => part.type === 'Strip' && (part.start ?? 0) > 0);
  return { bytes: (id) => table[id] ?? NO_BYTES, leadingSpace, max };
}

type DecoderJson = {
  readonly type: string;
  readonly start?: number;
  readonly decoders?: readonly DecoderJson[];
};

const decoderParts = (decoder: DecoderJson | null | undefined): readonly DecoderJson[] =>
  decoder?.type === 'Sequence' ? (decoder.decoders ?? []) : decoder ? [decoder] : [];

function vocabularyEnd(json: object, added: readonly { readonly id: number }[]): number {
  const { vocab } = (json as { model: { vocab: Record<string, number> } }).model;
  return added.reduce((end, { id }) => Math.max(end, id + 1), Object.keys(vocab).length);
}

function byteLevel(token: string): Uint8Array {
  const bytes: number[] = [];
  for (const character of token) {
    const byte = BYTE_OF_CHARACTER.get(character);
    // A character outside the alphabet can only come from a damaged vocabulary: shown as it is.
    if (byte === undefined) bytes.push(...utf8.encode(character));
    else bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

/** U+2581 is a space; `<0x0A>` is a byte for what has no token. */
function sentencePiece(token: string): Uint8Array {
  const byte = /^<0x([0-9A-F]{2})>$/.exec(token);
  return byte === null
    ? utf8.encode(token.replaceAll('\u2581', ' '))
    : Uint8Array.of(Number.parseInt(byte[1]!, 16));
}
