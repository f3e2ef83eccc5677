/**
 * Converts the tokenizer of a GGUF file to tokenizer.json and tokenizer_config.json, which @huggingface/tokenizers reads;
 * and reads the ids that end an answer, and the chat template.
 */
import { numberArray, readVocabulary, stringArray, TOKEN_TYPES, type Vocabulary } from '../formats/gguf.ts';
import type { GgufValue } from '../formats/gguf-header.ts';
import { corruptModel, type ModelManifest, quoted, unsupportedModel } from '../model-source.ts';
import { type PreTokenizerJson, preTokenizerJson, preTokenizerKind } from './text-pieces.ts';

/** A tokenizer in the form that the store keeps. */
export type ImportedTokenizer = {
  readonly tokenizerJson: Readonly<Record<string, unknown>>;
  readonly tokenizerConfig: Readonly<Record<string, unknown>>;
} & Pick<ModelManifest, 'chatTemplate' | 'bosTokenId' | 'eosTokenIds' | 'addBos'>;

type Metadata = ReadonlyMap<string, GgufValue>;

/** `rows`: the rows of the embedding, at least as many as tokens. @throws MaskrouteError `corrupt_model`, `unsupported_model`. */
export function tokenizerFromGguf(metadata: Metadata, rows: number): ImportedTokenizer {
  const kind = metadata.get('tokenizer.ggml.model');
  const vocabulary = readVocabulary(metadata, rows);
  switch (kind) {
    case 'gpt2': {
      const { model, preTokenizer, addBos, nfc } = byteLevelBpe(metadata, vocabulary);
      return assemble(metadata, vocabulary, addBos, {
        normalizer: nfc ? { type: 'NFC' } : null,
        pre_tokenizer: preTokenizer,
        decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
        model,
      });
    }
    case 'llama':
      return assemble(metadata, vocabulary, true, {
        pre_tokenizer: null,
        ...sentencePiece(metadata, vocabulary),
      });
    case 't5':
      return assemble(metadata, vocabulary, false, unigram(metadata, vocabulary));
    case undefined:
      throw unsupportedModel('it has no tokenizer');
    default:
      throw unsupportedModel(
        `its tokenizer is of the kind ${quoted(String(kind))} (supported: gpt2, llama, t5)`,
      );
  }
}

type Parts = {
  readonly normalizer: unknown;
  readonly pre_tokenizer: unknown;
  readonly decoder: unknown;
  readonly model: unknown;
};

function assemble(
  metadata: Metadata,
  vocabulary: Vocabulary,
  addBosDefault: boolean,
  parts: Parts,
): ImportedTokenizer {
  const bos = specialId(metadata, vocabulary, 'bos');
  // `add_eos_token` is ignored on purpose: after an end of text, the model would not continue the prompt.
  const wantsBos = metadata.get('tokenizer.ggml.add_bos_token') ?? addBosDefault;
  const addBos = wantsBos === true && bos !== null;
  const eosTokenIds = endOfAnswerIds(metadata, vocabulary);
  const token = (id: number | null) => (id === null ? null : vocabulary.tokens[id]!);
  return {
    tokenizerJson: {
      version: '1.0',
      truncation: null,
      padding: null,
      added_tokens: vocabulary.added.map(addedToken(metadata)),
      ...parts,
      post_processor: addBos ? prefixWith(bos!, token(bos)!) : null,
    },
    tokenizerConfig: {
      add_bos_token: addBos,
      bos_token: token(bos),
      eos_token: token(eosTokenIds[0]!),
      unk_token: token(specialId(metadata, vocabulary, 'unknown')),
      clean_up_tokenization_spaces: false,
      tokenizer_class: 'PreTrainedTokenizerFast',
    },
    chatTemplate: textOrNull(metadata.get('tokenizer.chat_template')),
    bosTokenId: bos,
    eosTokenIds,
    addBos,
  };
}

/** Tokens of a Phi-3 that keep the white space behind them. */
const PHI3_KEEPING = new Set(['<unk>', '<s>', '<|endoftext|>']);

function addedToken(metadata: Metadata) {
  // A Phi-3's other added tokens take it: its tokenizer.json says so, and GGUF cannot. Of this architecture, only Phi-3 has
  // SentencePiece.
  const isPhi3 =
    metadata.get('general.architecture') === 'phi3' && metadata.get('tokenizer.ggml.model') === 'llama';
  return ({ id, content, special }: Vocabulary['added'][number]) => ({
    id,
    content,
    single_word: false,
    lstrip: false,
    rstrip: isPhi3 && !PHI3_KEEPING.has(content),
    normalized: false,
    special,
  });
}

const prefixWith = (id: number, content: string) => ({
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: content, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [
    { SpecialToken: { id: content, type_id: 0 } },
    { Sequence: { id: 'A', type_id: 0 } },
    { SpecialToken: { id: content, type_id: 1 } },
    { Sequence: { id: 'B', type_id: 1 } },
  ],
  special_tokens: { [content]: { id: content, ids: [id], tokens: [content] } },
});

/* The tokens that end an answer, and other tokens that a file names. */

/** Tokens with these names end a turn, even if the file does not say so (llama.cpp's list, llama-vocab.cpp). */
const END_OF_ANSWER_NAMES = new Set([
  '<|eot_id|>',
  '<|im_end|>',
  '<|end|>',
  '<|return|>',
  '<|call|>',
  '<end_of_turn>',
  '<|endoftext|>',
  '<|eom_id|>',
  '<EOT>',
  '_<EOT>',
  '<|end_of_text|>',
  '<end_of_utterance>',
  '<eos>',
  '</s>',
]);

export const isEndOfAnswerName = (name: string): boolean => END_OF_ANSWER_NAMES.has(name);

function endOfAnswerIds(metadata: Metadata, vocabulary: Vocabulary): number[] {
  const ids = new Set<number>();
  for (const kind of ['eos', 'eot', 'eom']) {
    const id = specialId(metadata, vocabulary, kind);
    if (id !== null) ids.add(id);
  }
  for (const { id, content, special } of vocabulary.added) {
    // A Gemma has the tags of HTML as tokens, and this is one of them.
    const isTag = content === '</s>' && !special;
    if (END_OF_ANSWER_NAMES.has(content) && !isTag) ids.add(id);
  }
  if (ids.size === 0) throw unsupportedModel('it names no token that ends an answer');
  return [...ids];
}

function specialId(metadata: Metadata, vocabulary: Vocabulary, kind: string): number | null {
  const key = `tokenizer.ggml.${kind}_token_id`;
  const value = metadata.get(key);
  if (value === undefined) return null;
  const id = Number(value);
  if (!Number.isInteger(id) || id < 0 || id >= vocabulary.tokens.length) {
    throw corruptModel(`${key} is ${quoted(String(value))}, not a token of its vocabulary`);
  }
  return id;
}

export const textOrNull = (value: unknown): string | null =>
  typeof value === 'string' && value !== '' ? value : null;

/* Byte-level byte-pair encoding (GPT-2's kind, `tokenizer.ggml.model` = gpt2) as tokenizer.json parts. */

type ByteLevelBpe = {
  readonly model: unknown;
  readonly preTokenizer: PreTokenizerJson;
  /** Whether BOS is added unless the file says otherwise. */
  readonly addBos: boolean;
  readonly nfc: boolean;
};

function byteLevelBpe(metadata: Metadata, vocabulary: Vocabulary): ByteLevelBpe {
  const pre = metadata.get('tokenizer.ggml.pre');
  const kind = preTokenizerKind(typeof pre === 'string' ? pre : undefined);
  return {
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: kind.ignoreMerges,
      vocab: Object.fromEntries(vocabulary.idOf),
      merges: readMerges(metadata, vocabulary),
    },
    preTokenizer: preTokenizerJson(kind),
    addBos: kind.addBos,
    nfc: kind.nfc === true,
  };
}

/** Pairs in order of rank. Refuses a merge into a token that does not exist, as its text would vanish. */
function readMerges(metadata: Metadata, vocabulary: Vocabulary): (readonly [string, string])[] {
  return stringArray(metadata, 'tokenizer.ggml.merges').map((merge) => {
    const space = merge.indexOf(' ', 1);
    const left = merge.slice(0, Math.max(space, 0));
    const right = merge.slice(space + 1);
    if (space < 1 || right === '' || !vocabulary.idOf.has(left + right)) {
      throw corruptModel(`the merge ${quoted(merge)} makes a token that is not in its vocabulary`);
    }
    return [left, right] as const;
  });
}

/*
 * SentencePiece byte-pair encoding (`tokenizer.ggml.model` = llama: Llama 2, Mistral, TinyLlama) as tokenizer.json
 * parts, converted as in transformers (convert_slow_tokenizer.py): spaces become U+2581, which is also put before every
 * piece of text; merges follow from the tokens' scores; characters without a token become bytes.
 */

const SPACE = '\u2581';

type SentencePiece = {
  readonly model: unknown;
  readonly normalizer: unknown;
  readonly decoder: unknown;
};

function sentencePiece(metadata: Metadata, vocabulary: Vocabulary): SentencePiece {
  const scores = scoresOf(metadata, vocabulary);
  const unknown = vocabulary.types.indexOf(TOKEN_TYPES.unknown);
  const prefix = metadata.get('tokenizer.ggml.add_space_prefix') !== false;
  return {
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: unknown === -1 ? null : vocabulary.tokens[unknown],
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab: Object.fromEntries(vocabulary.idOf),
      merges: mergesFromScores(vocabulary, scores),
    },
    normalizer: {
      type: 'Sequence',
      normalizers: [
        ...(prefix ? [{ type: 'Prepend', prepend: SPACE }] : []),
        { type: 'Replace', pattern: { String: ' ' }, content: SPACE },
      ],
    },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: SPACE }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        ...(prefix ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
      ],
    },
  };
}

function scoresOf(metadata: Metadata, vocabulary: Vocabulary): readonly number[] {
  const scores = numberArray(metadata, 'tokenizer.ggml.scores');
  if (scores === undefined || scores.length < vocabulary.tokens.length) {
    throw corruptModel('tokenizer.ggml.scores is shorter than its vocabulary');
  }
  return scores;
}

/** Most work for merges: a token of n characters costs n². A real vocabulary of 250,000 tokens costs 10^7. */
const CUT_CHARS_MAX = 3e8;

type Merge = { readonly left: string; readonly right: string; readonly score: number };

/**
 * All pairs of tokens that make another token; pairs for tokens with higher scores come first. A token of n characters has
 * n − 1 cuts, and tokens are short, so the list has about the size of the vocabulary.
 */
function mergesFromScores(vocabulary: Vocabulary, scores: readonly number[]): (readonly [string, string])[] {
  const work = vocabulary.tokens.reduce((sum, token) => sum + token.length ** 2, 0);
  if (work > CUT_CHARS_MAX) throw corruptModel('the tokens of its vocabulary are too long');
  const merges: Merge[] = [];
  vocabulary.tokens.forEach((token, id) => {
    if (vocabulary.types[id] !== TOKEN_TYPES.normal) return;
    for (let cut = 1; cut < token.length; cut++) {
      const [left, right] = [token.slice(0, cut), token.slice(cut)];
      if (vocabulary.idOf.has(left) && vocabulary.idOf.has(right))
        merges.push({ left, right, score: scores[id]! });
    }
  });
  merges.sort(
    (a, b) => b.score - a.score || b.left.length - a.left.length || b.right.length - a.right.length,
  );
  return merges.map(({ left, right }) => [left, right]);
}

/*
 * SentencePiece unigrams (`tokenizer.ggml.model` = t5) as tokenizer.json parts, converted as in transformers
 * (`SpmConverter` in convert_slow_tokenizer.py).
 */

function unigram(metadata: Metadata, vocabulary: Vocabulary): Parts {
  const scores = scoresOf(metadata, vocabulary);
  const unknown = vocabulary.types.indexOf(TOKEN_TYPES.unknown);
  if (unknown === -1) throw corruptModel('its vocabulary has no unknown token');
  const table = numberArray(metadata, 'tokenizer.ggml.precompiled_charsmap') ?? [];
  const joins = metadata.get('tokenizer.ggml.remove_extra_whitespaces') === true;
  const scheme = metadata.get('tokenizer.ggml.add_space_prefix') === false ? 'never' : 'always';
  const metaspace = { type: 'Metaspace', replacement: SPACE, prepend_scheme: scheme, split: true };
  return {
    normalizer: {
      type: 'Sequence',
      normalizers: [
        ...(table.length > 0
          ? [{ type: 'Precompiled', precompiled_charsmap: Buffer.from(table).toString('base64') }]
          : []),
        ...(joins
          ? [
              { type: 'Strip', strip_left: false, strip_right: true },
              { type: 'Replace', pattern: { Regex: ' {2,}' }, content: SPACE },
            ]
          : []),
      ],
    },
    pre_tokenizer: metaspace,
    decoder: metaspace,
    model: {
      type: 'Unigram',
      unk_id: unknown,
      byte_fallback: vocabulary.types.includes(TOKEN_TYPES.byte),
      vocab: vocabulary.tokens.map((token, id) => [token, scores[id]!]),
    },
  };
}
