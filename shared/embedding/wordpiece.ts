/**
 * The WordPiece tokenizer of uncased BERT models, from its vocabulary alone: the library's tokenizer with the
 * settings that every one of those models shares, and a short way to the same ids for plain ASCII
 * (`ascii-wordpiece.ts`), which most prompts are.
 */
import { Tokenizer } from '@huggingface/tokenizers';
import { MaskrouteError } from '../errors.ts';
import { createAsciiWordPiece } from './ascii-wordpiece.ts';

export type WordPiece = {
  readonly vocabularySize: number;
  /** Ids of the words of `text`, without special tokens; unknown words give the id of `[UNK]`. */
  tokenIds(text: string): readonly number[];
  readonly clsTokenId: number;
  readonly sepTokenId: number;
  readonly unkTokenId: number;
};

const SPECIAL_TOKENS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'] as const;

/** `vocabulary`: tokens in id order. @throws MaskrouteError `invalid_encoder` when a special token is missing. */
export function loadWordPiece(vocabulary: readonly string[]): WordPiece {
  const ids = new Map(vocabulary.map((token, id) => [token, id]));
  const id = (token: string): number => {
    const found = ids.get(token);
    if (found === undefined) {
      throw new MaskrouteError('invalid_encoder', `The vocabulary of the encoder lacks ${token}.`);
    }
    return found;
  };
  const tokenizer = new Tokenizer(
    {
      added_tokens: SPECIAL_TOKENS.map((content) => ({
        id: id(content),
        content,
        special: true,
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
      })),
      normalizer: {
        type: 'BertNormalizer',
        clean_text: true,
        handle_chinese_chars: true,
        strip_accents: null,
        lowercase: true,
      },
      pre_tokenizer: { type: 'BertPreTokenizer' },
      post_processor: null,
      decoder: { type: 'WordPiece', prefix: '##', cleanup: true },
      model: {
        type: 'WordPiece',
        unk_token: '[UNK]',
        continuing_subword_prefix: '##',
        max_input_chars_per_word: 100,
        vocab: Object.fromEntries(ids),
      },
    },
    {},
  );
  const asciiIds = createAsciiWordPiece(ids, id('[UNK]'));
  return {
    vocabularySize: vocabulary.length,
    tokenIds: (text) => asciiIds(text) ?? tokenizer.encode(text, { add_special_tokens: false }).ids,
    clsTokenId: id('[CLS]'),
    sepTokenId: id('[SEP]'),
    unkTokenId: id('[UNK]'),
  };
}
