/**
 * The WordPiece tokenizer of uncased BERT models, made from the vocabulary: the library's tokenizer with the settings
 * that all these models share, and a fast path to the same ids for plain ASCII text (a test compares the two). Special
 * tokens such as `[SEP]` in a user's text are read as text.
 */
import { Tokenizer } from '@huggingface/tokenizers';
import { MaskrouteError } from '../wire/errors.ts';

export type WordPiece = {
  readonly vocabularySize: number;
  /** Ids of the words of `text`, without special tokens; unknown words give the id of `[UNK]`. */
  tokenIds(text: string): readonly number[];
  readonly clsTokenId: number;
  readonly sepTokenId: number;
  readonly unkTokenId: number;
};

/** `vocabulary`: tokens in id order. @throws MaskrouteError `invalid_encoder` when a special token is missing. */
export function loadWordPiece(vocabulary: readonly string[]): WordPiece {
  const ids = new Map(vocabulary.map((token, id) => [token, id]));
  const [unkTokenId, clsTokenId, sepTokenId] = ['[UNK]', '[CLS]', '[SEP]'].map((token) => {
    const id = ids.get(token);
    if (id !== undefined) return id;
    throw new MaskrouteError('invalid_encoder', `The vocabulary of the encoder lacks ${token}.`);
  }) as [number, number, number];
  const ofAnyText = createTokenizer(ids);
  const ofPlainAscii = plainAsciiIds(ids, unkTokenId);
  return {
    vocabularySize: vocabulary.length,
    tokenIds(text) {
      const lower = text.toLowerCase();
      return PLAIN_ASCII.test(lower)
        ? ofPlainAscii(lower)
        : ofAnyText.encode(text, { add_special_tokens: false }).ids;
    },
    clsTokenId,
    sepTokenId,
    unkTokenId,
  };
}

const WORD_CHARS_MAX = 100;
const CONTINUED = '##';

const createTokenizer = (ids: ReadonlyMap<string, number>): Tokenizer =>
  new Tokenizer(
    {
      // No special tokens are listed: the library would recognise them in a user's text.
      added_tokens: [],
      normalizer: {
        type: 'BertNormalizer',
        clean_text: true,
        handle_chinese_chars: true,
        strip_accents: null,
        lowercase: true,
      },
      pre_tokenizer: { type: 'BertPreTokenizer' },
      post_processor: null,
      decoder: { type: 'WordPiece', prefix: CONTINUED, cleanup: true },
      model: {
        type: 'WordPiece',
        unk_token: '[UNK]',
        continuing_subword_prefix: CONTINUED,
        max_input_chars_per_word: WORD_CHARS_MAX,
        vocab: Object.fromEntries(ids),
      },
    },
    {},
  );

/** Texts with other control characters, which the tokenizer removes, take the library's path. */
const PLAIN_ASCII = /^[\t\n\r -~]*$/;
const WORD_OR_MARK = /[a-z0-9]+|[!-~]/g;

/** Takes lower-case text: plain ASCII only needs to be split into words and looked up. */
function plainAsciiIds(ids: ReadonlyMap<string, number>, unkTokenId: number): (lower: string) => number[] {
  /** Pieces that continue a word, without their `##`. */
  const continued = new Map(
    [...ids].flatMap(([token, id]): [string, number][] =>
      token.startsWith(CONTINUED) ? [[token.slice(CONTINUED.length), id]] : [],
    ),
  );
  return (lower) => {
    const found: number[] = [];
    for (const word of lower.match(WORD_OR_MARK) ?? []) {
      const whole = word.length > WORD_CHARS_MAX ? unkTokenId : ids.get(word);
      if (whole === undefined) found.push(...(pieces(word, ids, continued) ?? [unkTokenId]));
      else found.push(whole);
    }
    return found;
  };
}

/**
 * Splits a word greedily into its longest known pieces; undefined if a rest is unknown, since the whole word is then
 * unknown.
 */
function pieces(
  word: string,
  begins: ReadonlyMap<string, number>,
  goesOn: ReadonlyMap<string, number>,
): number[] | undefined {
  const found: number[] = [];
  for (let start = 0; start < word.length; ) {
    const known = start === 0 ? begins : goesOn;
    let end = word.length;
    let id = known.get(word.slice(start, end));
    while (id === undefined && --end > start) id = known.get(word.slice(start, end));
    if (id === undefined) return undefined;
    found.push(id);
    start = end;
  }
  return found;
}
