/**
 * Words to token ids, by the models of @huggingface/tokenizers. They see a vocabulary without the special tokens: the
 * library finds these in plain text, too, where a word or the product of a merge has the name of a special token.
 */
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers';

export type BytePairsJson = {
  readonly vocab: Readonly<Record<string, number>>;
  readonly merges: readonly (string | readonly [string, string])[];
  readonly unk_token?: string | null;
  readonly byte_fallback?: boolean;
  readonly ignore_merges?: boolean;
  readonly end_of_word_suffix?: string | null;
  readonly continuing_subword_prefix?: string | null;
};

export type UnigramJson = {
  readonly type: 'Unigram';
  /** By id: a piece and its score. */
  readonly vocab: readonly (readonly [string, number])[];
  readonly unk_id: number | null;
  readonly byte_fallback?: boolean;
};

/** The ids of a word that is bounded in length. A word of byte-level BPE is spelled in the names of its bytes. */
type WordEncoder = (word: string) => readonly number[];

/**
 * @param ids of all names of the vocabulary.
 * @param reserved names of special tokens, which text never becomes.
 * @throws Error for a kind of merging that is not supported.
 */
export function bytePairEncoder(
  json: BytePairsJson,
  ids: ReadonlyMap<string, number>,
  reserved: ReadonlySet<string>,
): WordEncoder {
  if (json.end_of_word_suffix || json.continuing_subword_prefix) {
    throw new Error('its tokens are marked at the ends of words');
  }
  // Most large vocabularies have their special tokens elsewhere, and need no copy without them.
  const isWhole = ![...reserved].some((name) => ids.has(name));
  const idOf = isWhole ? ids : new Map([...ids].filter(([name]) => !reserved.has(name)));
  // Longer parts come from merges, and no merge makes a part that is no token.
  const isPart = (name: string) => name.length > 2 || idOf.has(name);
  const merges = json.merges
    .map((pair) => (typeof pair === 'string' ? pair.split(' ', 2) : pair))
    .filter(([left = '', right = '']) => idOf.has(left + right) && isPart(left) && isPart(right));
  // The model needs its vocabulary as a map, which is there: a large one as an object takes a second to make and to read.
  const unknownId = json.unk_token == null ? undefined : idOf.get(json.unk_token);
  const vocab = unknownId === undefined ? {} : { [json.unk_token!]: unknownId };
  const split = modelOf({ ...json, type: 'BPE', vocab, merges }, idOf);
  // The token for unknown characters is special itself.
  const unknown = json.unk_token == null ? undefined : ids.get(json.unk_token);
  return (word) => split([word]).flatMap((token) => idOf.get(token) ?? unknown ?? []);
}

/** @param reserved names of special tokens, which text never becomes. @throws Error without an unknown token. */
export function unigramEncoder(json: UnigramJson, reserved: ReadonlySet<string>): WordEncoder {
  const unknown = json.unk_id;
  if (unknown === null || json.vocab[unknown] === undefined) throw new Error('it has no unknown token');
  const pieces = json.vocab.map(([piece, score], id) => ({ piece, score, id }));
  const found = pieces.filter(({ piece, id }) => id !== unknown && piece !== '' && !reserved.has(piece));
  // The library gives unknown characters a score below the least of all, so the pieces that it does not see count here.
  const least = json.vocab.reduce((min, [, score]) => Math.min(min, score), Number.POSITIVE_INFINITY);
  // No text has an empty piece.
  const vocab = [['', least], ...found.map(({ piece, score }) => [piece, score])];
  const split = modelOf({ ...json, vocab, unk_id: 0 });
  const idOf = new Map(found.map(({ piece, id }) => [piece, id]));
  const bytes = json.byte_fallback ? bytePieces(json.vocab) : [];
  // Neighbouring unknown characters come as one text.
  const spelled = (text: string): readonly number[] => {
    const ids = Array.from(new TextEncoder().encode(text), (byte) => bytes[byte]);
    return ids.every((id) => id !== undefined) ? ids : [unknown];
  };
  return (word) => split([word]).flatMap((token) => idOf.get(token) ?? spelled(token));
}

/** The piece of each byte, also if it is a special token; undefined for a byte without a piece. */
function bytePieces(vocab: UnigramJson['vocab']): readonly (number | undefined)[] {
  const ids = new Map(vocab.map(([piece], id) => [piece, id]));
  return Array.from({ length: 256 }, (_, byte) =>
    ids.get(`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`),
  );
}

/** The library's model alone: words to the names of tokens. `ids`: in the place of the model's own vocabulary. */
function modelOf(model: object, ids?: ReadonlyMap<string, number>): (words: string[]) => string[] {
  const parts = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null };
  const library = new LibraryTokenizer({ ...parts, model, added_tokens: [] }, {});
  if (ids !== undefined) library.model.tokens_to_ids = ids as Map<string, number>;
  return (words) => library.model._call(words);
}
