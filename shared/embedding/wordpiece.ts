/**
 * The WordPiece tokenizer of uncased BERT models, from its vocabulary alone: the library's tokenizer with the
 * settings that every one of those models shares, and a short way to the same ids for plain ASCII
 * (`ascii-wordpiece.ts`), which most prompts are.
 */
import { Tokenizer } from '@huggingface/tokenizers';
import { MaskrouteError } from '../wire/errors.ts';

/*
 * Words of ASCII by their place in a text: finds a word's id without cutting it out, which a `Map` would need, and which
 * is most of a tokenizer's time. Whoever scans the text hashes the word as it goes (FNV-1a, 32 bits).
 */

const HASH_START = 0x811c9dc5;
const hashNext = (hash: number, code: number): number => Math.imul(hash ^ code, 0x01000193);

/** The id of `text.slice(start, end)`, whose codes `hash` is of; -1 when it is no word of the table. */
type WordTable = (text: string, start: number, end: number, hash: number) => number;

/** @param ids what is more than small letters and digits is left out. */
function createWordTable(ids: ReadonlyMap<string, number>): WordTable {
  const words: string[] = [];
  const wordIds = new Int32Array(ids.size);
  // At most half full, so that a search ends after a step or two.
  const slots = new Int32Array(2 ** Math.ceil(Math.log2(2 * ids.size + 1))).fill(EMPTY);
  const mask = slots.length - 1;
  const first = (hash: number): number => (hash ^ (hash >>> 16)) & mask;
  for (const [word, id] of ids) {
    const hash = hashOf(word);
    if (hash === undefined) continue;
    let slot = first(hash);
    while (slots[slot] !== EMPTY) slot = (slot + 1) & mask;
    slots[slot] = words.length;
    wordIds[words.length] = id;
    words.push(word);
  }
  return (text, start, end, hash) => {
    for (let slot = first(hash); ; slot = (slot + 1) & mask) {
      const index = slots[slot]!;
      if (index === EMPTY) return -1;
      const word = words[index]!;
      if (word.length === end - start && isAt(text, start, word)) return wordIds[index]!;
    }
  };
}

const EMPTY = -1;

/** Undefined for a word of anything but small letters and digits. */
function hashOf(word: string): number | undefined {
  let hash = HASH_START;
  for (let i = 0; i < word.length; i++) {
    const code = word.charCodeAt(i);
    const isPlain = (code >= 0x61 && code <= 0x7a) || (code >= 0x30 && code <= 0x39);
    if (!isPlain) return undefined;
    hash = hashNext(hash, code);
  }
  return hash;
}

/** `text.startsWith(word, start)`, without a call into the runtime. */
function isAt(text: string, start: number, word: string): boolean {
  for (let i = 0; i < word.length; i++) {
    if (text.charCodeAt(start + i) !== word.charCodeAt(i)) return false;
  }
  return true;
}

/*
 * WordPiece for plain ASCII text: nothing to normalise but the case, so words are found and looked up in one pass. It
 * gives the ids that the library gives (a test compares them), in a tenth of its time.
 */

/** A longer word is unknown. */
const WORD_CHARS_MAX = 100;
const CONTINUED = '##';

/** Ids of a text's words; undefined for a text that is not plain ASCII, or may hold a special token. */
type AsciiWordPiece = (text: string) => number[] | undefined;

function createAsciiWordPiece(ids: ReadonlyMap<string, number>, unkTokenId: number): AsciiWordPiece {
  /** Pieces that go on a word, without their mark. */
  const continued = new Map(
    [...ids].flatMap(([token, id]): [string, number][] =>
      token.startsWith(CONTINUED) ? [[token.slice(CONTINUED.length), id]] : [],
    ),
  );

  /**
   * Of a word that is not known as a whole. Greedy: always the longest piece that is known. If a rest is not known either,
   * all of the word is unknown.
   */
  const pushPieces = (found: number[], word: string): void => {
    const before = found.length;
    let start = word.length > WORD_CHARS_MAX ? -1 : 0;
    while (start >= 0 && start < word.length) {
      const pieces = start === 0 ? ids : continued;
      let end = start === 0 ? word.length - 1 : word.length;
      let id: number | undefined;
      while (end > start) {
        id = pieces.get(word.slice(start, end));
        if (id !== undefined) break;
        end--;
      }
      if (id !== undefined) found.push(id);
      start = id === undefined ? -1 : end;
    }
    if (start >= 0) return;
    found.length = before;
    found.push(unkTokenId);
  };

  const words = createWordTable(ids);
  /** Of a single character, by its code. */
  const marks = Int32Array.from(KINDS, (_, code) => ids.get(String.fromCharCode(code)) ?? unkTokenId);
  return (text) => {
    const lower = text.toLowerCase();
    const found: number[] = [];
    let wordAt = -1;
    let hash = HASH_START;
    for (let i = 0; i <= lower.length; i++) {
      const code = i === lower.length ? SPACE_CODE : lower.charCodeAt(i);
      const kind = code < KINDS.length ? KINDS[code]! : OTHER;
      if (kind === OTHER) return undefined;
      if (kind === WORD) {
        if (wordAt < 0) {
          wordAt = i;
          hash = HASH_START;
        }
        hash = hashNext(hash, code);
        continue;
      }
      if (wordAt >= 0) {
        const whole = words(lower, wordAt, i, hash);
        if (whole < 0) pushPieces(found, lower.slice(wordAt, i));
        else found.push(whole);
        wordAt = -1;
      }
      if (kind === PUNCTUATION) found.push(marks[code]!);
    }
    return found;
  };
}

const SPACE_CODE = 0x20;
const [OTHER, SPACE, WORD, PUNCTUATION] = [0, 1, 2, 3] as const;

/** By character code. `[` may begin a special token, and control characters vanish: the library knows how. */
const KINDS: Uint8Array = Uint8Array.from({ length: 128 }, (_, code) => {
  const char = String.fromCharCode(code);
  if (/[\t\n\r ]/.test(char)) return SPACE;
  if (code < 0x20 || code === 0x7f || char === '[') return OTHER;
  return /[a-z0-9]/i.test(char) ? WORD : PUNCTUATION;
});

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
